"""Results that can be trusted: nothing of somebody else's is touched, and no figure is what it does not seem to be."""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from filelock import FileLock

from storymem.evaluation.metric import Column, Metric, Scores, Screening, mean, reasons_for
from storymem.evaluation.metrics import AestheticQuality, Appearance, ViclipScores
from storymem.evaluation.scoring import FORMAT, metric_settings
from storymem.evaluation.stbench import System, evaluate, score
from storymem.evaluation.workers import Workers
from storymem.io import FileError, NotFiniteError
from storymem.media.video import READER, write_video
from storymem.story import Shot
from storymem.weights import MissingWeights
from tests.composing import composed
from tests.evaluation import small
from tests.forking import fork
from tests.scorers import tiny
from tests.stories import single_thread

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stories and their films."""
    small.write_films(tmp_path / "one", small.stories(tmp_path / "stories"))
    return tmp_path


class Means(Metric):
    """The mean of all pixels: a metric that takes no time; ``value`` stands for that of the first shot."""

    columns = (Column(name="mean", title="Mean", heading="Mean"),)

    def __init__(self, value: float | str | None = None) -> None:
        self.value = None if value is None else float(value)

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> float:
        return float(frames.mean()) / 255 if shot.index or self.value is None else self.value

    def conclude(self, seen: Sequence[float | None], screening: Screening) -> Scores:
        columns = {"mean": mean(seen)}
        return Scores(columns=columns, reasons=reasons_for(columns, screening), shots={"mean": tuple(seen)})


@cache  # composing takes longer than all else here
def composition() -> dict[str, Any]:
    return composed("statistics.resamples=200", name="eval_stbench")


def config(folder: Path, value: str | None = None) -> dict[str, Any]:
    return composition() | {
        "stbench": {"stories": str(folder / "stories")},
        "output": str(folder / "out"),
        "films": str(folder / "one"),
        "metrics": {"means": {"_target_": f"{__name__}.Means", "value": value}},
    }


def written(folder: Path, name: str = "results.json") -> Any:
    """A JSON file of the output, which must be valid."""

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    return json.loads((folder / "out" / name).read_text(), parse_constant=refuse)


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command as a person runs it, in a process of its own: its status, and what it says on both streams."""

    def run(*arguments: str, largest: int | None = None) -> tuple[int, str, str]:
        def work() -> None:
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            os.environ["HOME"] = str(folder)
            where = [f"films={folder}/one", f"stbench.stories={folder}/stories", f"output={folder}/out"]
            sys.argv = ["eval_stbench.py", *where, *arguments]
            runpy.run_path(str(ROOT / "scripts" / "eval_stbench.py"), run_name="__main__")

        single_thread()
        (status,) = fork(1, work)
        return status, *capfd.readouterr()

    return run


# --- weights


def test_without_weights_nothing_is_scored_and_nothing_written(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    status, _, said = run()
    assert status == 2
    for part in ("LAION aesthetic head v1", "ViCLIP-L-14", "hf download OpenGVLab/ViCLIP-L-14-hf", "metrics=[tiny]"):
        assert part in said
    assert "Traceback" not in said
    assert not (folder / "out").exists()


def test_a_dry_run_lists_the_weights_that_are_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    viclip = composition()["metrics"]["viclip"]
    viclip = viclip | {"scorer": viclip["scorer"] | {"source": str(folder / "nowhere")}}
    run = config(folder) | {"metrics": {"viclip": viclip}}
    evaluate(run | {"dry_run": True})
    assert f"ViCLIP-L-14: {folder}/nowhere does not exist" in capsys.readouterr().out
    with pytest.raises(MissingWeights, match=r"ViCLIP-L-14"):
        evaluate(run)
    assert not (folder / "out").exists()


def test_the_scorers_say_whether_they_are_trained() -> None:
    viclip = tiny.viclip()
    assert ViclipScores(viclip).weights == AestheticQuality(tiny.aesthetic()).weights == "untrained"
    assert Appearance(tiny.clip()).weights == "untrained"
    viclip.origin = "published"
    assert ViclipScores(viclip).weights == "own", "not of the paper's size"


# --- values that are no numbers


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_none_with_a_reason_and_is_made_again(
    folder: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(config(folder, value=value))
    assert results is not None
    found = written(folder)["systems"]["one"]
    assert found["columns"]["mean"]["mean"] is None
    fault = "means: mean of shot 1 (scene 1, shot 1) is not a finite number"
    assert f"The Red Boat: {fault}" in found["not_finite"]
    boat = written(folder, "stories/one/the_red_boat.json")
    scores = boat["scores"]["means"]
    assert scores["shots"]["mean"][0] is None
    assert scores["shots"]["mean"][1] is not None
    assert "shot 1 (scene 1, shot 1) is not a finite number" in scores["reasons"]["mean"]
    said = capsys.readouterr()
    assert "is not a finite number" in said.out
    assert "is not a finite number" in said.err
    page = (folder / "out" / "index.html").read_text()
    assert "one: values that are not finite" in page
    assert "nan" not in page.replace("nance", "")
    before = (folder / "out" / "stories" / "one" / "the_red_boat.json").stat().st_mtime_ns
    evaluate(config(folder, value=value))
    assert (folder / "out" / "stories" / "one" / "the_red_boat.json").stat().st_mtime_ns != before, "not kept"


def test_large_values_are_drawn(folder: Path) -> None:
    evaluate(config(folder, value="1e300"))
    assert "<svg" in (folder / "out" / "index.html").read_text()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["shots", "texts", "frames", "scores"])
def test_features_that_are_no_numbers_give_no_values(folder: Path, value: float, part: str) -> None:
    """Also where they would only decide which pairs count."""
    metrics = {
        "aesthetic": AestheticQuality(tiny.aesthetic()),
        "viclip": ViclipScores(tiny.viclip()),
        "identity": Appearance(tiny.clip(), frames=4),
    }
    networks = {
        "shots": metrics["viclip"].scorer.network.vision_encoder.ln_post.bias,  # type: ignore[attr-defined]
        "texts": metrics["viclip"].scorer.network.text_encoder.ln_final.bias,  # type: ignore[attr-defined]
        "frames": metrics["identity"].embedder.network.visual.ln_post.bias,  # type: ignore[attr-defined]
        "scores": metrics["aesthetic"].scorer.head.bias,  # type: ignore[attr-defined]
    }
    networks[part].data[0] = value
    name = {"shots": "viclip", "texts": "viclip", "frames": "identity", "scores": "aesthetic"}[part]
    measured = metric_settings({key: metric for key, metric in metrics.items() if key == name})
    told = small.stories(folder / "stories")
    systems = [System(name="one", films=folder / "one")]
    found = score(systems, told, {name: metrics[name]}, measured, folder / "out", Workers())["one"][0]
    assert set(found.scores[name].columns.values()) == {None}
    assert all("NaN or infinite" in found.reason(column) for column in found.scores[name].columns)  # type: ignore[operator]
    assert found.faults
    written(folder, "stories/one/the_red_boat.json")


def test_somebody_elses_scorer_is_checked_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny.viclip()
    monkeypatch.setattr(scorer, "embed_texts", lambda texts: torch.full((len(texts), 32), torch.nan))
    metric = ViclipScores(scorer)
    story = small.stories(folder / "stories")[1]
    screening = small.screening(story, [9, 9])
    seen = [metric.see(shot, small.frames(shot.index), screening) for shot in story.shots]
    with pytest.raises(NotFiniteError, match="embeddings of texts"):
        metric.conclude(seen, screening)


# --- what the results say of themselves


def test_a_result_names_film_story_reader_and_measure(folder: Path) -> None:
    evaluate(config(folder))
    boat = written(folder, "stories/one/the_red_boat.json")
    assert boat["folder"] == str(folder / "one" / "the_red_boat")
    assert len(boat["story_sha256"]) == 64
    assert [(shot["file"], shot["frames"], shot["reader"]) for shot in boat["shots"]] == [
        (f"{name}.mp4", 9, READER) for name in ("01_01", "01_02", "02_01")
    ]
    assert boat["metrics"]["means"] == {"version": 1, "weights": "own", "columns": ["mean"]}
    assert written(folder)["reader"] == READER
    cat = written(folder, "stories/one/a_cat.json")
    assert cat["story_sha256"] != boat["story_sha256"]


def test_how_videos_were_read_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("01_01", "01_02"):
        with av.open(str(folder / "one" / "a_cat" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = small.WIDTH, small.HEIGHT, "yuv420p"
            for frame in small.frames(0):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))
    evaluate(config(folder))
    (note,) = written(folder)["systems"]["one"]["reading_notes"]
    assert note.startswith("untagged: ")
    assert note.endswith("(2 shots, first A Cat, shot 1 (scene 1, shot 1))")
    assert note in capsys.readouterr().out


def test_the_first_thing_said_is_which_film_serves_which_story(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(config(folder))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["2 stories, 5 shots", f"one: 5 of 5 shots in {folder}/one", lines[2]]
    assert lines[2].startswith("  The Red Boat: the_red_boat, ")
    assert lines[3].startswith("  A Cat: a_cat, ")


def test_the_same_film_elsewhere_is_not_scored_again_but_named(folder: Path) -> None:
    evaluate(config(folder))
    before = written(folder, "stories/one/a_cat.json")
    (folder / "one" / "a_cat").rename(folder / "one" / "A Cat")
    evaluate(config(folder))
    assert written(folder, "stories/one/a_cat.json") == before | {"folder": str(folder / "one" / "A Cat")}


def test_shots_of_one_file_are_its_frames(folder: Path) -> None:
    frames = np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 32 * 48 * 3).reshape(25, 32, 48, 3)
    for path in (folder / "one" / "a_cat").iterdir():
        path.unlink()
    write_video(folder / "one" / "a_cat" / "video1.mp4", frames, 8, crf=0)
    mapping = folder / "one" / "films.yaml"
    mapping.write_text("stories: {A Cat: {file: a_cat/video1.mp4, cuts: [5]}}")
    evaluate(config(folder))
    first = written(folder, "stories/one/a_cat.json")
    assert [shot["file_frames"] for shot in first["shots"]] == [[0, 5], [5, 25]]
    assert [shot["frames"] for shot in first["shots"]] == [5, 20]
    expected = [frames[:5].mean() / 255, frames[5:].mean() / 255]
    assert first["scores"]["means"]["shots"]["mean"] == pytest.approx(expected, abs=0.02)
    mapping.write_text("stories: {A Cat: {file: a_cat/video1.mp4, cuts: [6]}}")
    evaluate(config(folder))
    assert written(folder, "stories/one/a_cat.json")["shots"][0]["frames"] == 6, "other cuts are another film"


# --- the output folder


def test_a_folder_of_somebody_elses_is_refused(folder: Path, run: Run) -> None:
    (folder / "out" / "stories" / "one" / "a_cat").mkdir(parents=True)
    picture = folder / "out" / "stories" / "one" / "a_cat" / "holiday.jpg"
    picture.write_bytes(b"mine")
    status, _, said = run("metrics=[tiny]")
    assert status == 2
    assert f"output={folder}/out is not empty and not a folder of results: it holds stories" in said
    assert [path for path in (folder / "out").rglob("*") if path.is_file()] == [picture]


def test_a_file_in_the_outputs_place_is_refused(folder: Path) -> None:
    (folder / "out").write_text("mine")
    with pytest.raises(FileError, match="is a file"):
        evaluate(config(folder))
    assert (folder / "out").read_text() == "mine"


def test_only_pictures_that_were_written_are_removed(folder: Path) -> None:
    evaluate(config(folder))
    pictures = folder / "out" / "stories" / "one" / "a_cat"
    (pictures / "holiday.jpg").write_bytes(b"mine")
    (folder / "one" / "a_cat" / "01_02.mp4").unlink()
    evaluate(config(folder))
    assert sorted(path.name for path in pictures.iterdir()) == ["01.jpg", "holiday.jpg"]


def test_a_killed_run_and_jobs_on_a_cluster_leave_a_folder_that_is_known(folder: Path) -> None:
    (folder / "out" / "jobs" / "0").mkdir(parents=True)  # Hydra's
    evaluate(config(folder))
    for name in ("results.json", "index.html", "results.csv"):
        (folder / "out" / name).unlink()
    left = folder / "out" / "stories" / "one" / "a_cat" / ".01.jpg.partial"
    left.write_bytes(b"half")
    (folder / "one" / "a_cat" / "01_02.mp4").unlink()
    evaluate(config(folder))
    assert (folder / "out" / "results.json").is_file()
    assert not left.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "NaN", '{"format": 2}', '{"format": 2, "key": 1, "shots": 3}', "\x00", "[" * 5000, "old"]
)
def test_a_damaged_result_is_made_again(folder: Path, content: str) -> None:
    evaluate(config(folder))
    path = folder / "out" / "stories" / "one" / "a_cat.json"
    before = path.read_text()
    if content == "old":
        content = before.replace(f'"format": {FORMAT}', '"format": 1')
    path.write_text(content)
    (folder / "out" / "results.json").write_text(content)
    evaluate(config(folder))
    assert path.read_text() == before
    written(folder)


def test_a_result_with_a_value_of_another_type_is_made_again(folder: Path) -> None:
    evaluate(config(folder))
    path = folder / "out" / "stories" / "one" / "a_cat.json"
    before = path.read_text()
    for key, value in (("scores", 3), ("pictures", "x"), ("shots", [{}]), ("faults", None)):
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        evaluate(config(folder))
        assert path.read_text() == before


def test_names_of_pictures_in_a_result_do_not_leave_its_folder(folder: Path) -> None:
    evaluate(config(folder))
    path = folder / "out" / "stories" / "one" / "a_cat.json"
    mine = folder / "out" / "stories" / "one" / "mine.jpg"
    mine.write_bytes(b"mine")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "x", "pictures": ["../mine.jpg", str(mine)]}))
    evaluate(config(folder))
    assert mine.read_bytes() == b"mine"


def test_two_runs_of_one_system_do_not_mix(folder: Path) -> None:
    evaluate(config(folder))
    before = (folder / "out" / "results.json").read_bytes()
    with FileLock(folder / "out" / "stories" / "one" / ".lock"):
        with pytest.raises(FileError, match=r"another process is scoring films in .*stories/one"):
            evaluate(config(folder))
        (folder / "one").rename(folder / "two")
        evaluate(config(folder) | {"films": str(folder / "two")})  # a job for another system
    assert (folder / "out" / "results.json").read_bytes() != before


def test_all_workers_end_when_the_first_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            evaluate(config(folder))
        except FileError as error:
            print(error)
            sys.exit(2)

    evaluate(config(folder))
    single_thread()
    with FileLock(folder / "out" / "stories" / "one" / ".lock"):
        assert fork(2, work) == [2, 2]
    assert capfd.readouterr().out.count("another process is scoring films in") == 2


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / "file").write_text("x")
    with pytest.raises(FileError, match=r"file/out cannot be written"):
        evaluate(config(folder) | {"output": str(folder / "file" / "out")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told(folder: Path) -> None:
    (folder / "out").mkdir(mode=0o500)
    with pytest.raises(FileError, match="cannot be written"):
        evaluate(config(folder))


def test_a_full_disk_is_told(folder: Path, run: Run) -> None:
    """A limit on the size of files stands for it; the next run goes on."""
    status, _, said = run("metrics=[tiny]", largest=4000)
    assert status == 2
    assert "could not be written" in said
    assert "Traceback" not in said
    status, table, said = run("metrics=[tiny]")
    assert status == 0, said
    assert "UNTRAINED SCORERS" in table
    assert "UNTRAINED SCORERS" in said
