"""One film: read once, with what cannot be read named; its result as a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storymem.evaluation.metric import Column, Metric, Scores, Screening
from storymem.evaluation.scoring import metric_settings, read_result, result_key, score_film
from storymem.media.video import READER
from storymem.story import Shot, Story
from tests.encoding import turned
from tests.evaluation import small


class Watcher(Metric):
    """Writes down what it is shown."""

    columns = (Column(name="frames", title="Frames", heading="Frames"),)

    def __init__(self) -> None:
        self.screenings: list[Screening] = []

    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> tuple[int, int]:
        assert frames.dtype == np.uint8
        return screening.starts[shot.index], len(frames)

    def conclude(self, seen: Sequence[Any | None], screening: Screening) -> Scores:
        self.screenings.append(screening)
        return Scores(columns={"frames": screening.total}, details={"seen": list(seen)})


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path / "stories")[0]


@pytest.fixture
def films(tmp_path: Path, story: Story) -> Path:
    return small.write_films(tmp_path / "films", [story], lengths=(9, 5, 13))


def test_metrics_are_told_the_places_of_the_shots(films: Path, story: Story) -> None:
    result, _ = score_film(story, small.film(films, story), {"watcher": Watcher()}, "key")
    assert result.scores["watcher"].details["seen"] == [(0, 9), (9, 5), (14, 13)]
    assert result.value("frames") == 27
    assert [shot.frames for shot in result.shots] == [9, 5, 13]


def test_a_result_names_the_reader_and_how_it_read(films: Path, story: Story, tmp_path: Path) -> None:
    turned(films / "the_red_boat" / "01_02.mp4", -1, 0, 0, -1)
    result, _ = score_film(story, small.film(films, story), {"watcher": Watcher()}, "key")
    result.write(tmp_path / "result.json")
    shots = read_result(tmp_path / "result.json").shots  # type: ignore[union-attr]
    assert [shot.reader for shot in shots] == [READER] * 3
    assert [any(note.startswith("rotated: by 180") for note in shot.notes) for shot in shots] == [False, True, False]


@pytest.mark.parametrize("fault", ["absent", "empty", "text", "cut off", "damaged"])
def test_what_cannot_be_read_is_missing_with_a_reason(films: Path, story: Story, fault: str) -> None:
    path = films / "the_red_boat" / "01_02.mp4"
    content = path.read_bytes()
    if fault == "absent":
        path.unlink()
    elif fault == "damaged":  # the index is whole and the pictures are not
        start = content.index(b"mdat") + 8
        path.write_bytes(content[:start] + bytes(len(content) - start - 1200) + content[-1200:])
    else:
        path.write_bytes({"empty": b"", "text": b"not a video", "cut off": content[:200]}[fault])
    watcher = Watcher()
    result, strips = score_film(story, small.film(films, story), {"watcher": watcher}, "key")
    assert result.shots[1].missing
    assert "01_02.mp4" in result.shots[1].missing
    assert result.value("frames") is None
    assert result.scores["watcher"].details["seen"] == [(0, 9), None, (9, 13)]
    assert watcher.screenings[0].missing == "missing: shot 2 (scene 1, shot 2)"
    assert sorted(strips) == [0, 2]


def test_strips_show_first_middle_and_last_frame(films: Path, story: Story) -> None:
    _, strips = score_film(story, small.film(films, story), {}, "key")
    strip = np.asarray(Image.open(io.BytesIO(strips[0])))
    assert strip.shape == (96, 3 * 144, 3)
    first = np.asarray(Image.fromarray(small.frames(0)[0]).resize((144, 96)))
    assert np.abs(strip[:, :144].astype(int) - first).mean() < 12


def test_a_result_is_read_back_as_it_was_written(films: Path, story: Story, tmp_path: Path) -> None:
    result, _ = score_film(story, small.film(films, story), small.metrics(), "key")
    result.write(tmp_path / "deep" / "r.json")
    assert read_result(tmp_path / "deep" / "r.json") == result
    assert read_result(tmp_path / "nowhere.json") is None
    (tmp_path / "half.json").write_text('{"format": 1, "k')
    assert read_result(tmp_path / "half.json") is None
    replace(result, format=0).write(tmp_path / "old.json")
    assert read_result(tmp_path / "old.json") is None


def test_the_key_changes_with_all_that_decides_the_scores(films: Path, story: Story, tmp_path: Path) -> None:
    settings = metric_settings({"viclip": small.metrics()["viclip"]})
    assert settings["viclip"]["version"] == 1
    film = small.film(films, story)
    key = result_key(story, film, settings)
    assert result_key(story, film, settings) == key
    assert result_key(replace(story, overview="Another."), film, settings) != key
    assert result_key(story, film, {"viclip": {**settings["viclip"], "version": 2}}) != key
    moved = small.write_films(tmp_path / "elsewhere", [story], lengths=(9, 5, 13))
    assert result_key(story, small.film(moved, story), settings) == key, "where films lie does not matter"
    other = small.write_films(tmp_path / "films", [story], seed=1)
    assert result_key(story, small.film(other, story), settings) != key
    (films / "the_red_boat" / "01_01.mp4").unlink()
    assert result_key(story, small.film(films, story), settings) != key
