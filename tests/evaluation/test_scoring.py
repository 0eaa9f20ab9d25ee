"""One film: read once, with what cannot be read named; its result as a file that is recomputed only if need be."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from storymem.evaluation.metric import Column, FilmInfo, Metric, Scores
from storymem.evaluation.metrics import AestheticQuality, Appearance, ViclipScores
from storymem.evaluation.scoring import FORMAT, metric_settings, read_result, result_key, score_film
from storymem.evaluation.stbench import evaluate
from storymem.io import NotFiniteError
from storymem.media.video import READER, write_video
from storymem.story import Shot, Story
from tests.encoding import turned
from tests.evaluation import small
from tests.evaluation.small import config, written
from tests.scorers import tiny


class Recorder(Metric):
    """Records what it is given."""

    columns = (Column(name="frames", title="Frames", heading="Frames"),)

    def __init__(self) -> None:
        self.films: list[FilmInfo] = []

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> tuple[int, int]:
        assert frames.dtype == np.uint8
        return film.starts[shot.index], len(frames)

    def compute(self, measured: Sequence[Any | None], film: FilmInfo) -> Scores:
        self.films.append(film)
        return Scores(columns={"frames": film.total}, details={"measured": list(measured)})


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path / "stories")[0]


@pytest.fixture
def films(tmp_path: Path, story: Story) -> Path:
    return small.write_films(tmp_path / "films", [story], lengths=(9, 5, 13))


def test_metrics_are_given_the_places_of_the_shots(films: Path, story: Story) -> None:
    result, strips = score_film(story, small.film(films, story), {"recorder": Recorder()}, "key")
    assert result.scores["recorder"].details["measured"] == [(0, 9), (9, 5), (14, 13)]
    assert result.value("frames") == 27
    assert [(shot.number, shot.frames, shot.reader) for shot in result.shots] == [
        (1, 9, READER),
        (2, 5, READER),
        (3, 13, READER),
    ]
    strip = np.asarray(Image.open(io.BytesIO(strips["01.jpg"])))
    assert strip.shape == (96, 3 * 144, 3), "first, middle and last frame"
    first = np.asarray(Image.fromarray(small.frames(0)[0]).resize((144, 96)))
    assert np.abs(strip[:, :144].astype(int) - first).mean() < 12


@pytest.mark.parametrize("fault", ["absent", "empty", "text", "cut off", "damaged"])
def test_what_cannot_be_read_is_missing_with_a_reason(films: Path, story: Story, fault: str) -> None:
    path = films / "the_red_boat" / "01_02.mp4"
    content = path.read_bytes()
    if fault == "absent":
        path.unlink()
    elif fault == "damaged":  # the index is whole and the frames are not
        start = content.index(b"mdat") + 8
        path.write_bytes(content[:start] + bytes(len(content) - start - 1200) + content[-1200:])
    else:
        path.write_bytes({"empty": b"", "text": b"not a video", "cut off": content[:200]}[fault])
    recorder = Recorder()
    result, strips = score_film(story, small.film(films, story), {"recorder": recorder}, "key")
    assert "01_02.mp4" in str(result.shots[1].missing)
    assert result.value("frames") is None
    assert result.scores["recorder"].details["measured"] == [(0, 9), None, (9, 13)]
    assert recorder.films[0].missing == "missing: shot 2 (scene 1, shot 2)"
    assert sorted(strips) == ["01.jpg", "03.jpg"]


def test_the_key_changes_with_all_that_decides_the_scores(films: Path, story: Story, tmp_path: Path) -> None:
    settings = metric_settings({"viclip": small.metrics()["viclip"]})
    film = small.film(films, story)
    key = result_key(story, film, settings)
    assert result_key(story, film, settings) == key
    assert result_key(replace(story, overview="Another."), film, settings) != key
    assert result_key(story, film, {"viclip": {**settings["viclip"], "version": 2}}) != key
    moved = small.write_films(tmp_path / "elsewhere", [story], lengths=(9, 5, 13))
    assert result_key(story, small.film(moved, story), settings) == key, "where films are does not matter"
    other = small.write_films(tmp_path / "films", [story], seed=1)
    assert result_key(story, small.film(other, story), settings) != key
    (films / "the_red_boat" / "01_01.mp4").unlink()
    assert result_key(story, small.film(films, story), settings) != key
    image = tmp_path / "ada.png"
    with_image = replace(story, characters=(replace(story.characters[0], references=(image,)), *story.characters[1:]))
    keys = []
    for shade in (0, 255):
        Image.new("L", (8, 8), shade).save(image)
        keys.append(result_key(with_image, film, settings))
    assert keys[0] != keys[1], "the same path, and another image"


# --- values that are not finite


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_none_with_a_reason_and_is_recomputed(
    folder: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(config(folder, value=value)) is not None
    found = written(folder)["systems"]["one"]
    assert found["columns"]["mean"]["mean"] is None
    fault = "means: mean of shot 1 (scene 1, shot 1) is not a finite number"
    assert f"The Red Boat: {fault}" in found["not_finite"]
    scores = written(folder, "stories/one/the_red_boat.json")["scores"]["means"]
    assert scores["shots"]["mean"][0] is None
    assert scores["shots"]["mean"][1] is not None
    assert "shot 1 (scene 1, shot 1) is not a finite number" in scores["reasons"]["mean"]
    output = capsys.readouterr()
    assert "is not a finite number" in output.out
    assert "is not a finite number" in output.err
    assert "values that are not finite" in (folder / "out" / "index.html").read_text()
    before = (folder / "out" / "stories" / "one" / "the_red_boat.json").stat().st_mtime_ns
    evaluate(config(folder, value=value))
    assert (folder / "out" / "stories" / "one" / "the_red_boat.json").stat().st_mtime_ns != before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["shots", "texts", "frames", "scores"])
def test_features_that_are_not_finite_give_no_values(films: Path, story: Story, value: float, part: str) -> None:
    """Also where they would only decide which pairs count."""
    aesthetic, viclip, clip = tiny.aesthetic(), tiny.viclip(), tiny.clip()
    metric, weight = {
        "shots": (ViclipScores(viclip), viclip.network.vision_encoder.ln_post.bias),
        "texts": (ViclipScores(viclip), viclip.network.text_encoder.ln_final.bias),
        "frames": (Appearance(clip, frames=4), clip.network.visual.ln_post.bias),
        "scores": (AestheticQuality(aesthetic), aesthetic.head.bias),
    }[part]
    weight.data[0] = value
    found, _ = score_film(story, small.film(films, story), {"metric": metric}, "key")
    assert set(found.scores["metric"].columns.values()) == {None}
    assert all("NaN or infinite" in str(found.reason(column)) for column in found.scores["metric"].columns)
    assert found.faults


def test_a_users_scorer_is_checked_too(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny.viclip()
    monkeypatch.setattr(scorer, "embed_texts", lambda texts: torch.full((len(texts), 32), torch.nan))
    metric, film = ViclipScores(scorer), small.film_info(story, [9, 9, 9])
    measured = [metric.measure_shot(shot, small.frames(shot.index), film) for shot in story.shots]
    with pytest.raises(NotFiniteError, match="embeddings of texts"):
        metric.compute(measured, film)


# --- the result's file


def test_a_result_names_film_story_reader_and_metrics(folder: Path) -> None:
    turned(folder / "one" / "a_cat" / "01_02.mp4", -1, 0, 0, -1)
    evaluate(config(folder))
    boat, cat = (written(folder, f"stories/one/{name}.json") for name in ("the_red_boat", "a_cat"))
    assert boat["folder"] == str(folder / "one" / "the_red_boat")
    assert len(boat["story_sha256"]) == 64
    assert boat["story_sha256"] != cat["story_sha256"]
    assert [(shot["file"], shot["frames"], shot["reader"]) for shot in boat["shots"]] == [
        (f"{name}.mp4", 9, READER) for name in ("01_01", "01_02", "02_01")
    ]
    assert boat["metrics"]["means"] == {"version": 1, "weights": "own", "columns": ["mean"]}
    assert written(folder)["reader"] == READER
    rotated = [any(note.startswith("rotated: by 180") for note in shot["notes"]) for shot in cat["shots"]]
    assert rotated == [False, True]


def test_how_videos_were_converted_is_reported_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_moved_film_is_not_scored_again_but_named(folder: Path) -> None:
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
    assert [(shot["file_frames"], shot["frames"]) for shot in first["shots"]] == [([0, 5], 5), ([5, 25], 20)]
    expected = [frames[:5].mean() / 255, frames[5:].mean() / 255]
    assert first["scores"]["means"]["shots"]["mean"] == pytest.approx(expected, abs=0.02)
    mapping.write_text("stories: {A Cat: {file: a_cat/video1.mp4, cuts: [6]}}")
    evaluate(config(folder))
    assert written(folder, "stories/one/a_cat.json")["shots"][0]["frames"] == 6, "other cuts are another film"


DAMAGED: list[str | dict[str, Any]] = ["", "{", "[]", "NaN", "\x00", "[" * 5000]
DAMAGED += [{"format": FORMAT - 1}, {"scores": 3}, {"shots": [{}]}, {"faults": None}, {"key": 1, "shots": 3}]


def test_a_damaged_result_is_recomputed(folder: Path) -> None:
    evaluate(config(folder))
    path = folder / "out" / "stories" / "one" / "a_cat.json"
    before = path.read_text()
    for content in DAMAGED:
        path.write_text(content if isinstance(content, str) else json.dumps(json.loads(before) | content))
        evaluate(config(folder))
        assert path.read_text() == before, content
        assert read_result(path) is not None
        written(folder)


def test_only_images_of_an_earlier_run_are_removed(folder: Path) -> None:
    evaluate(config(folder))
    results = folder / "out" / "stories" / "one"
    for mine in (results / "mine.jpg", results / "a_cat" / "holiday.jpg"):
        mine.write_bytes(b"mine")
    names = ["02.jpg", "../mine.jpg", str(results / "mine.jpg")]
    (results / "a_cat" / ".01.jpg.partial").write_bytes(b"half")
    content = json.loads((results / "a_cat.json").read_text()) | {"key": "x", "images": names}
    (results / "a_cat.json").write_text(json.dumps(content))
    (folder / "one" / "a_cat" / "01_02.mp4").unlink()
    evaluate(config(folder))
    assert sorted(path.name for path in (results / "a_cat").iterdir()) == ["01.jpg", "holiday.jpg"]
    assert (results / "mine.jpg").read_bytes() == b"mine"
