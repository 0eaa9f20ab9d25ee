"""Control films: what a metric reports where the right answer is known. They are made of scored films, in RAM."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from storymem.evaluation.metric import FilmInfo, Metric
from storymem.story import Scene, Shot, Story

Alter = Callable[[Shot, np.ndarray, FilmInfo], np.ndarray]
"""A shot and its frames -> other frames of the same number and size."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A way to alter films.

    Args:
        name: in files.
        title: in tables.
        expected: what a good metric reports.
        story: the story that the altered film is scored with; None if the control does not apply to it.
        alter: makes what alters the frames of one film, with the run's metrics.
    """

    name: str
    title: str
    expected: str
    story: Callable[[Story], Story | None] = lambda story: story
    alter: Callable[[Mapping[str, Metric]], Alter] = lambda metrics: lambda shot, frames, film: frames


def with_names_shuffled(story: Story) -> Story | None:
    """The story with its characters' names exchanged at random in every shot, in prompts and casts.

    None for a story with fewer than two characters. The same story is always shuffled in the same way.
    """
    names = [character.name for character in story.characters]
    if len(names) < 2:
        return None
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))  # "Ann Lee" before "Ann"
    draw, pattern = random.Random(story.title), re.compile(rf"(?<!\w)({longest_first})(?!\w)")

    def shuffled(shot: Shot) -> Shot:
        other = dict(zip(names, draw.sample(names, len(names)), strict=True))
        prompt = pattern.sub(lambda found: other[found[0]], shot.prompt)
        return replace(shot, prompt=prompt, characters=tuple(other[name] for name in shot.characters))

    scenes = [Scene(number=scene.number, shots=tuple(map(shuffled, scene.shots))) for scene in story.scenes]
    return replace(story, scenes=tuple(scenes))


def _still(metrics: Mapping[str, Metric]) -> Alter:
    first: list[np.ndarray] = []

    def alter(shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        first.append(frames[len(frames) // 2])
        return np.repeat(first[0][None], len(frames), axis=0)

    return alter


def _without_characters(metrics: Mapping[str, Metric]) -> Alter:
    def alter(shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        finders = [metric for metric in metrics.values() if metric.finds_characters(film.story)]
        finder = max(finders, key=lambda metric: any(column.exact for column in metric.columns))  # in any order
        return finder.without_characters(shot, frames, film)

    return alter


STILL = Control(
    name="still",
    title="One still repeated",
    expected="the highest consistency there is, without motion, of all that can be read or found in its frame",
    alter=_still,
)
SHUFFLED = Control(
    name="shuffled",
    title="Names shuffled",
    expected="chance: consistency of characters must fall",
    story=with_names_shuffled,
)
BACKGROUND = Control(
    name="background",
    title="Characters replaced by background",
    expected="what measures characters must fall; what stays is due to places",
    alter=_without_characters,
)
CONTROLS = {control.name: control for control in (STILL, SHUFFLED, BACKGROUND)}


def controls_for(metrics: Mapping[str, Metric]) -> list[Control]:
    """All controls; the last applies to stories whose characters one of the metrics can find."""

    def findable(story: Story) -> Story | None:
        return story if any(metric.finds_characters(story) for metric in metrics.values()) else None

    return [STILL, SHUFFLED, replace(BACKGROUND, story=findable)]
