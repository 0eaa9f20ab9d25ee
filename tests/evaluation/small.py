"""Small stories, films and metrics for tests of the evaluation: real classes, a few pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from storymem.evaluation.films import find_films
from storymem.evaluation.layouts import FilmFiles
from storymem.evaluation.metric import Column, FilmInfo, Metric, Scores, mean
from storymem.evaluation.metrics import AestheticQuality, Appearance, ViclipScores
from storymem.film.folder import Film
from storymem.media.video import write_video
from storymem.story import Shot, Story, load_story
from tests.composing import composed
from tests.scorers import tiny

FRAMES, HEIGHT, WIDTH = 9, 32, 48

THREE_SHOTS = """\
title: The Red Boat
overview: A fisherman rows out and comes home.
characters: [{name: Ada, description: A woman in a red coat}, {name: Ben}]
scenes:
  - shots:
      - {prompt: "Ada pushes a red boat into the water.", characters: [Ada]}
      - {prompt: "Ada rows out to sea.", characters: [Ada], cut: false}
  - shots:
      - {prompt: "Ben waits for Ada at the pier.", characters: [Ada, Ben]}
"""
TWO_SHOTS = """\
title: A Cat
overview: A cat on a wall.
scenes:
  - shots:
      - {prompt: "A cat sits on a wall."}
      - {prompt: "A dog runs by."}
"""


def stories(folder: Path) -> list[Story]:
    """Two stories, with files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "01_the_red_boat.yaml").write_text(THREE_SHOTS)
    (folder / "02_a_cat.yaml").write_text(TWO_SHOTS)
    return [load_story(path) for path in sorted(folder.glob("*.yaml"))]


def frames(seed: int, count: int = FRAMES) -> np.ndarray:
    """A shot that moves a little: one smooth image, shifted from frame to frame."""
    image = (tiny.images(1, 3, HEIGHT, WIDTH + count, seed=seed)[0] * 255).round().byte().movedim(0, -1).numpy()
    return np.stack([image[:, shift : shift + WIDTH] for shift in range(count)])


def write_films(folder: Path, stories: Sequence[Story], *, seed: int = 0, lengths: Sequence[int] = ()) -> Path:
    """Films as others write them: ``the_red_boat/01_02.mp4``."""
    for number, story in enumerate(stories):
        for shot in story.shots:
            length = lengths[shot.index] if shot.index < len(lengths) else FRAMES
            place = folder / story.slug
            place.mkdir(parents=True, exist_ok=True)
            shown = frames(100 * number + shot.index + 1000 * seed, length)
            write_video(place / f"{shot.scene:02d}_{shot.number:02d}.mp4", shown, 8)
    return folder


def own_film(
    folder: Path, story: Story, shots: int = 3, seconds: dict[str, float] | None = None, prompt: str | None = None
) -> None:
    """A film of ours with so many finished shots; the first of another ``prompt``, if given."""
    folder.mkdir(parents=True, exist_ok=True)
    record = story.to_dict()
    record["scenes"][0]["shots"][0]["prompt"] = prompt or story.shots[0].prompt
    film = Film(folder, story=record, config={})
    for shot in story.shots[:shots]:
        take = film.write_take(shot.index, np.zeros((5, 32, 48, 3), np.uint8), mode="m2v", seed=0, fps=8)
        film.add(replace(take, seconds=seconds or {}))


@cache  # a metric keeps nothing from one film to the next
def metrics(batch_size: int = 8) -> dict[str, Metric]:
    """All metrics that need no further library."""
    return {
        "aesthetic": AestheticQuality(tiny.aesthetic(batch_size=batch_size)),
        "viclip": ViclipScores(tiny.viclip(batch_size=batch_size), top_pairs=2),
        "identity": Appearance(tiny.clip(batch_size=batch_size), frames=4),
    }


def film(folder: Path, story: Story) -> FilmFiles:
    """The film of one story."""
    return find_films(folder, [story]).films[0]


def film_info(story: Story, lengths: Sequence[int | None]) -> FilmInfo:
    """A film of shots with these lengths."""
    return FilmInfo(story=story, lengths=tuple(lengths))


class Means(Metric):
    """The mean of all pixels: a metric that takes no time; ``value`` replaces that of the first shot."""

    columns = (Column(name="mean", title="Mean", heading="Mean"),)

    def __init__(self, value: float | str | None = None) -> None:
        self.value = None if value is None else float(value)

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> float:
        return float(frames.mean()) / 255 if shot.index or self.value is None else self.value

    def compute(self, measured: Sequence[float | None], film: FilmInfo) -> Scores:
        return Scores.of({"mean": mean(measured)}, film.missing, shots={"mean": tuple(measured)})


@cache  # composing takes longer than all else here
def _composed() -> dict[str, Any]:
    return composed("statistics.resamples=200", name="eval_stbench")


def config(folder: Path, value: str | None = None) -> dict[str, Any]:
    """Scores the films of ``folder`` by `Means`."""
    return _composed() | {
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
