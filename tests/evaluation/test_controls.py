"""What the tables say of control films, of exact columns beside learned ones, of costs, and of untrained scorers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storymem.evaluation.controls import BACKGROUND
from storymem.evaluation.metric import Column, FilmInfo, Metric, Scores
from storymem.evaluation.report import number
from storymem.evaluation.statistics import StatisticsSettings, rank_correlation
from storymem.evaluation.stbench import build_metrics, evaluate
from storymem.io import NotFiniteError
from storymem.media.video import write_video
from storymem.story import Shot, Story
from tests.composing import composed
from tests.evaluation import small
from tests.evaluation.small import config, written


class Alike(Metric):
    """One minus the distance of the shots' mean images: a learned column, and the same as an exact one."""

    def __init__(self, name: str = "alike", exact: bool = False, sign: int = 1) -> None:
        self.columns = (Column(name=name, title=name, heading=name, consistency=True, exact=exact),)
        self.sign = sign

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        assert film.fps[shot.index] == pytest.approx(8)
        return frames.mean(axis=0)

    def compute(self, measured: Sequence[Any], film: FilmInfo) -> Scores:
        if film.missing is not None:
            return Scores(columns={self.columns[0].name: None}, reasons={self.columns[0].name: film.missing})
        distance = float(np.mean([np.abs(one - measured[0]).mean() / 255 for one in measured[1:]]))
        return Scores(columns={self.columns[0].name: self.sign * (1 - distance)})


class Erasing(Alike):
    """Knows how to remove characters: everything becomes black."""

    def finds_characters(self, story: Story) -> bool:
        return bool(story.characters)

    def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        return np.zeros_like(frames)


def metrics(**arguments: Any) -> dict[str, Any]:
    return {"alike": {"_target_": f"{__name__}.Alike", **arguments}}


def test_control_films_are_scored_beside_the_films(folder: Path) -> None:
    run = config(folder) | {"metrics": {"alike": {"_target_": f"{__name__}.Erasing"}}, "controls": True}
    results = evaluate(run)
    assert results is not None
    assert list(results.control_summaries) == ["one", "still", "shuffled", "background"]
    value = {row: of["alike"].mean for row, of in results.control_summaries.items()}
    assert value["still"] == pytest.approx(1)
    assert value["background"] == pytest.approx(1), "black"
    assert value["one"] < 0.95  # type: ignore[operator]
    for control in ("shuffled", "background"):
        assert [result.title for result in results.controls[control]] == ["The Red Boat"], "the other has no characters"
    assert results.controls["shuffled"][0].shots[1].characters in (("Ada",), ("Ben",))
    assert results.control_summaries["still"]["motion"].mean == 0 < results.summaries["one"]["motion"].mean  # type: ignore[operator]
    text = (folder / "out" / "results.md").read_text()
    assert f"({number(results.control_partner('shuffled', 'alike'))}) |" in text, "of the films on the same story"
    assert "‡ these films hardly move" in text
    assert "| one |" in text
    assert "‡" not in text[: text.index("**What these")], "the films do move"
    assert "What these metrics report of controls" in (folder / "out" / "index.html").read_text()
    assert not list((folder / "out").rglob("*.mp4")), "control films are not written"
    path = folder / "out" / "controls" / "one" / "still" / "a_cat.json"
    before = path.stat().st_mtime_ns
    evaluate(run)
    assert path.stat().st_mtime_ns == before


class NotFinding(Erasing):
    """Finds nothing that is finite."""

    def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        raise NotFiniteError("boxes are not finite")


def test_a_control_film_that_cannot_be_made_has_a_reason(folder: Path) -> None:
    results = evaluate(
        config(folder) | {"metrics": {"alike": {"_target_": f"{__name__}.NotFinding"}}, "controls": True}
    )
    assert results is not None
    (found,) = results.controls["background"]
    assert {shot.missing for shot in found.shots} == {"boxes are not finite"}
    assert results.control_summaries["background"]["alike"].mean is None
    assert results.control_summaries["still"]["alike"].mean == pytest.approx(1)


@pytest.mark.parametrize("names", [("exact", "learned"), ("learned", "exact")])
def test_characters_are_removed_by_an_exact_metric_whatever_the_order(names: Sequence[str], tmp_path: Path) -> None:
    class Exact(Erasing):
        def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
            return np.full_like(frames, 9)

    finders: dict[str, Metric] = {"exact": Exact(exact=True), "learned": Erasing("learned")}
    story = small.stories(tmp_path)[0]
    alter = BACKGROUND.alter({name: finders[name] for name in names})
    assert (alter(story.shots[0], small.frames(0), small.film_info(story, [9] * 3)) == 9).all()


def test_films_that_hardly_move_are_marked(folder: Path) -> None:
    for path in (folder / "one").rglob("*.mp4"):
        write_video(path, np.repeat(small.frames(0)[:1], 9, axis=0), 8)
    evaluate(config(folder) | {"metrics": metrics()})
    table = (folder / "out" / "results.md").read_text().splitlines()
    assert table[0] == "|  | alike | Motion |"
    assert "‡ these films hardly move (motion below 0.02): their consistency means nothing." in table
    assert table[2].split("|")[2].startswith(" 1.0000‡")
    assert "1.0000$^\\ddagger$" in (folder / "out" / "results.tex").read_text()


def test_learned_columns_are_compared_with_exact_ones(folder: Path) -> None:
    small.write_films(folder / "two", small.stories(folder / "stories"), seed=1)
    films = {"one": str(folder / "one"), "two": str(folder / "two")}
    nodes = {
        "truth": {"_target_": f"{__name__}.Alike", "name": "truth", "exact": True},
        "same": {"_target_": f"{__name__}.Alike"},
        "opposite": {"_target_": f"{__name__}.Alike", "name": "opposite", "sign": -1},
    }
    results = evaluate(config(folder) | {"metrics": nodes, "films": films})
    assert results is not None
    found = {one: row["truth"].rho for one, row in results.agreement.items() if one != "motion" and row["truth"]}
    assert found == pytest.approx({"alike": 1, "opposite": -1})
    assert "| opposite | -1.00 [-1.00, -1.00] (4) |" in (folder / "out" / "results.md").read_text()


def test_rank_correlation() -> None:
    settings = StatisticsSettings(resamples=200)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3))
    related = [list(zip(of, of + draw.normal(size=3) * 0.3, strict=True)) for of in x]
    found = rank_correlation(related, settings)
    assert found is not None
    assert found.interval is not None
    assert 0.8 < found.interval[0] < found.rho < found.interval[1] < 1
    assert found.films == 120
    ties = rank_correlation([[(1, 1), (2, 2)], [(2, 3), (3, 3)]], settings)
    assert ties is not None
    assert ties.rho == pytest.approx(0.8333, abs=1e-4), "ties share their rank"
    assert rank_correlation([[(1, 1), (1, 2), (1, 3)]], settings) is None


def test_films_with_manifests_need_no_stories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no st_bench/
    boat, cat = small.stories(tmp_path / "stories")
    small.own_film(tmp_path / "films" / "a", boat, seconds={"denoise": 2.0, "select": 0.5})
    small.own_film(tmp_path / "films" / "b", cat, seconds={"denoise": 1.0})
    benchmark = composed("metrics=[tiny]", name="eval_stbench")["stbench"]
    run = config(tmp_path) | {"films": str(tmp_path / "films"), "stbench": benchmark}
    results = evaluate(run)
    assert results is not None
    assert results.benchmark == {"folder": "those of the films", "titles": ["The Red Boat", "A Cat"]}
    assert results.summaries["films"]["mean"].complete == 2
    assert results.stories["films"][0].shots[2].characters == ("Ada", "Ben")
    assert results.costs["films"].mean == pytest.approx((3 * 2.5 + 2 * 1.0) / 2)
    assert "| Seconds per film |" in capsys.readouterr().out
    assert (
        evaluate(run | {"stbench": benchmark | {"only": ["a_cat"]}, "films": str(tmp_path / "films" / "b")}) is not None
    )
    small.own_film(tmp_path / "films" / "c", small.stories(tmp_path / "stories")[1], prompt="Another.")
    with pytest.raises(ValueError, match=r"films/c and another film are called 'A Cat' and have other prompts"):
        evaluate(run)


def test_untrained_scorers_are_refused_unless_they_are_asked_for(folder: Path) -> None:
    where = (f"stbench.stories={folder}/stories", f"output={folder}/out", f"films={folder}/one")
    scorers = ("scorer/viclip@metrics.viclip.scorer=tiny", "scorer/quality@metrics.aesthetic.scorer=tiny")
    for run in (
        composed("metrics=[stbench]", *scorers, *where, name="eval_stbench"),
        composed("metrics=[tiny]", *where, name="eval_stbench") | {"untrained": False},
    ):
        with pytest.raises(
            ValueError, match=r"metrics: aesthetic, viclip.* have untrained scorers: .*metrics=\[tiny\]"
        ):
            evaluate(run)
    assert not (folder / "out").exists()


def test_motion_comes_with_consistency_and_only_then() -> None:
    assert list(build_metrics(metrics())) == ["alike", "motion"]
    means = {"means": {"_target_": "tests.evaluation.small.Means"}}
    assert list(build_metrics(means)) == ["means"]
    assert list(build_metrics(means | metrics() | {"b": {"_target_": f"{__name__}.Alike", "name": "b"}})) == [
        *("means", "alike", "motion", "b"),
    ]


def test_one_story_is_not_several(folder: Path) -> None:
    evaluate(config(folder) | {"stbench": {"stories": str(folder / "stories"), "only": ["a_cat"]}})
    assert "Means over 1 story. " in (folder / "out" / "results.md").read_text()
    assert json.loads((folder / "out" / "results.json").read_text())["benchmark"]["titles"] == ["A Cat"]
    assert written(folder)["controls"]["rows"] == {}
