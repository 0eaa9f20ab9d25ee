"""The toy world: stories of a few drawn shots whose prompts name characters and do not describe them.

`story(seed)` is deterministic: the same seed gives the same prompts, the same pixels and the same attributes. All
seeds from `HELD_OUT` on are kept out of training.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from toyworld.attributes import (
    ACTIONS,
    FRAMINGS,
    LOOKS,
    NAMES,
    PLACES,
    PROP_COLOURS,
    SIDES,
    TIMES,
    Character,
    Scenery,
    Seen,
)
from toyworld.characters import SHOES, Pose, paint_character, paint_shadow
from toyworld.draw import to_frames
from toyworld.motion import act, end_state, possible_actions, starting_state
from toyworld.places import draw_place
from toyworld.words import sentence

HELD_OUT = 1_000_000_000  # stories with these seeds and above are for measuring only

PAINTED = 6  # grey levels by which a character changes what is behind it


@dataclass(frozen=True, kw_only=True)
class ToyShot:
    """One shot: its prompt, everything that is in it, and how it moves.

    `cut` is False where the shot goes on from the one before: its first frame is then the other's last one.
    """

    prompt: str
    cut: bool
    place: str
    time: str
    framing: str
    action: str
    cast: tuple[Character, ...]
    scenery: Scenery
    poses: tuple[Pose, ...]

    @cached_property
    def frames(self) -> npt.NDArray[np.uint8]:
        """The drawn shot, uint8 [17, 64, 96, 3]."""
        return render(self)

    def seen(self, frame: int) -> Seen:
        """What one frame shows, exactly."""
        order = sorted(range(len(self.cast)), key=lambda i: float(self.poses[i].x[frame]))
        return Seen(
            place=self.place,
            time=self.time,
            framing=self.framing,
            landmark=self.scenery.landmark,
            side=self.scenery.side,
            flag=self.scenery.flag,
            looks=tuple(self.cast[i].look for i in order),
        )


@dataclass(frozen=True, kw_only=True)
class ToyStory:
    """A story: its shots in order, scene by scene, and the people in it."""

    seed: int
    scenes: tuple[tuple[ToyShot, ...], ...]
    cast: tuple[Character, ...]

    @property
    def shots(self) -> tuple[ToyShot, ...]:
        """All shots in order."""
        return tuple(shot for scene in self.scenes for shot in scene)


def render(shot: ToyShot, frames: slice = slice(None)) -> npt.NDArray[np.uint8]:
    """Draw a shot, or some frames of it: uint8 [F, 64, 96, 3]."""
    return render_layers(shot, frames)[0]


def render_layers(shot: ToyShot, frames: slice) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The drawn frames, and the same without characters, each uint8 [F, 64, 96, 3]."""
    poses = [Pose(**{name: values[frames] for name, values in vars(pose).items()}) for pose in shot.poses]
    place = draw_place(shot.place, shot.time, shot.framing, shot.scenery)[:, None]
    canvas = np.repeat(place, len(poses[0].x), axis=1)
    for pose in poses:
        paint_shadow(canvas, shot.framing, pose)
    for character, pose in zip(shot.cast, poses, strict=True):
        shoes = SHOES[introduced(character.name)]
        paint_character(canvas, shot.framing, shot.time, character.look, pose, shoes=shoes)
    return to_frames(canvas), np.repeat(to_frames(place), canvas.shape[1], axis=0)


def people_mask(drawn: npt.NDArray[np.uint8], empty: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where characters and their shadows are, bool [F, 64, 96], by what `render_layers` gives."""
    return np.abs(drawn.astype(np.int16) - empty).max(axis=-1) > PAINTED


def story(seed: int, *, shots: int = 8, looks: bool = False, where: tuple[str, str] | None = None) -> ToyStory:
    """A story of `shots` shots in two or three scenes with one to three characters.

    The first shots introduce the characters one at a time, in the order of the three groups that names come in
    (`introduced`). Each group wears shoes of its own: so a name says which of the characters in memory is meant.

    looks: let every prompt also describe characters and things (for measuring text following).
    where: place and time of all scenes, instead of those drawn.
    """
    rng = np.random.default_rng([seed, 20_251])
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25]))
    kinds = rng.choice(len(LOOKS), size=count, replace=False)
    names = [NAMES[4 * group + int(rng.integers(4))] for group in range(count)]
    cast = tuple(Character(name=name, look=LOOKS[k]) for name, k in zip(names, kinds, strict=True))
    sceneries = {place: _scenery(rng) for place in PLACES}
    made: list[ToyShot] = []
    scenes: list[tuple[ToyShot, ...]] = []
    for length in _scene_lengths(rng, shots):
        drawn = str(rng.choice(PLACES)), str(rng.choice(TIMES))
        place, time = where or drawn
        first = len(made)
        for _ in range(length):
            before = made[-1] if len(made) > first else None
            made.append(_shot(rng, place, time, cast, len(made), sceneries[place], before, looks))
        scenes.append(tuple(made[first:]))
    return ToyStory(seed=seed, scenes=tuple(scenes), cast=cast)


def introduced(name: str) -> int:
    """As which of a story's characters someone of this name is introduced: 0, 1 or 2."""
    return NAMES.index(name) // 4


def _scenery(rng: np.random.Generator) -> Scenery:
    landmark, flag, side = rng.choice(PROP_COLOURS), rng.choice(PROP_COLOURS), rng.choice(SIDES)
    return Scenery(landmark=str(landmark), side=str(side), flag=str(flag))


def _scene_lengths(rng: np.random.Generator, shots: int) -> list[int]:
    scenes = min(shots, int(rng.integers(2, 4)))
    cuts = rng.choice(np.arange(1, shots), size=scenes - 1, replace=False) if scenes > 1 else np.zeros(0)
    edges = [0, *sorted(int(cut) for cut in cuts), shots]
    return [b - a for a, b in itertools.pairwise(edges)]


def _shot(
    rng: np.random.Generator,
    place: str,
    time: str,
    people: tuple[Character, ...],
    number: int,
    scenery: Scenery,
    before: ToyShot | None,
    looks: bool,
) -> ToyShot:
    """A shot; `before` is the one it may go on from, as about a third do once all characters are introduced."""
    is_introduction = number < len(people)
    cut = before is None or is_introduction or bool(rng.random() < 0.67)
    if before is None or cut:
        order = rng.permutation(len(people))
        cast: tuple[Character, ...] = (people[number] if is_introduction else people[order[0]],)
        framing, action = str(rng.choice(FRAMINGS)), str(rng.choice(ACTIONS[:-1]))
        if len(people) > 1 and not is_introduction and rng.random() < 0.25:
            framing, action, cast = FRAMINGS[0], "meets", (people[order[0]], people[order[1]])
        state = starting_state(rng, action, framing)
    else:
        framing, cast, state = before.framing, before.cast, end_state(before.poses)
        action = str(rng.choice(possible_actions(state)))
    asked: dict[str, Any] = {
        "place": place,
        "time": time,
        "framing": framing,
        "action": action,
        "cast": cast,
        "scenery": scenery,
    }
    prompt = sentence(rng, **asked, looks=looks)
    return ToyShot(prompt=prompt, cut=cut, **asked, poses=act(action, framing, state))
