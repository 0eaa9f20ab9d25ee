"""The toy world: stories of a few drawn shots whose prompts name characters and do not describe them.

`story(seed)` is deterministic: the same seed gives the same prompts, the same pixels and the same attributes. All
seeds from `HELD_OUT` on are kept out of training.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from toyworld.attributes import (
    ACTIONS,
    FRAMINGS,
    HEIGHT,
    LOOKS,
    NAMES,
    PANS,
    PLACES,
    PROP_COLOURS,
    SIDES,
    TIMES,
    UNKNOWN,
    WIDTH,
    Character,
    Scenery,
    Seen,
)
from toyworld.characters import Pose, paint_character, paint_shadow
from toyworld.draw import Array, to_frames
from toyworld.motion import State, act, camera_path, end_state, possible_actions, possible_pans, starting_state
from toyworld.places import paint_place, view
from toyworld.words import sentence

HELD_OUT = 1_000_000_000  # stories with these seeds and above are for measuring only

PAINTED = 6  # grey levels by which a character changes what is behind it
VISIBLE = 24  # a thing shows in a frame if another colour would change at least this many pixels


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
    pan: str
    cast: tuple[Character, ...]
    scenery: Scenery
    poses: tuple[Pose, ...]
    camera: Array

    @cached_property
    def frames(self) -> npt.NDArray[np.uint8]:
        """The drawn shot, uint8 [17, 64, 96, 3]."""
        return render(self)

    def seen(self, frame: int) -> Seen:
        """What one frame shows, exactly; a thing that lies outside the picture or behind a character is unknown."""
        order = sorted(range(len(self.cast)), key=lambda i: float(self.poses[i].x[frame]))
        landmark, flag = _shows(self, frame)
        return Seen(
            place=self.place,
            time=self.time,
            framing=self.framing,
            landmark=self.scenery.landmark if landmark else UNKNOWN,
            side=self.scenery.side if landmark or flag else UNKNOWN,
            flag=self.scenery.flag if flag else UNKNOWN,
            looks=tuple(self.cast[i].look for i in order),
        )


@dataclass(frozen=True, kw_only=True)
class ToyStory:
    """A story: its shots in order, scene by scene, and the people in it."""

    seed: int
    overview: str
    scenes: tuple[tuple[ToyShot, ...], ...]
    cast: tuple[Character, ...]

    @property
    def shots(self) -> tuple[ToyShot, ...]:
        """All shots in order."""
        return tuple(shot for scene in self.scenes for shot in scene)


def render(shot: ToyShot, frames: slice = slice(None)) -> npt.NDArray[np.uint8]:
    """Draw a shot, or some frames of it: uint8 [F, 64, 96, 3]."""
    return to_frames(_people(shot, frames, _place(shot, frames)))


def render_layers(shot: ToyShot, frames: slice) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The drawn frames, and the same without characters, each uint8 [F, 64, 96, 3]."""
    place = _place(shot, frames)
    return to_frames(_people(shot, frames, place.copy())), to_frames(place)


def people_mask(drawn: npt.NDArray[np.uint8], empty: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where characters and their shadows are, bool [F, 64, 96], by what `render_layers` gives."""
    return np.abs(drawn.astype(np.int16) - empty).max(axis=-1) > PAINTED


def _place(shot: ToyShot, frames: slice) -> Array:
    """The place of a shot as a canvas [3, F, H, W]; drawn once where the camera stands still."""
    camera = shot.camera[frames]
    still = bool(np.all(camera == camera[0]))
    canvas = np.empty((3, 1 if still else len(camera), HEIGHT, WIDTH), dtype=np.float32)
    paint_place(canvas, view(shot.framing, camera[:1] if still else camera), shot.place, shot.time, shot.scenery)
    return np.repeat(canvas, len(camera), axis=1) if still else canvas


def _people(shot: ToyShot, frames: slice, canvas: Array) -> Array:
    """The canvas with the cast painted on, in place."""
    camera = shot.camera[frames]
    poses = [Pose(**{name: values[frames] for name, values in vars(pose).items()}) for pose in shot.poses]
    for pose in poses:
        paint_shadow(canvas, shot.framing, pose, camera)
    for character, pose in zip(shot.cast, poses, strict=True):
        paint_character(canvas, shot.framing, shot.time, character.look, pose, camera)
    return canvas


def _shows(shot: ToyShot, frame: int) -> tuple[bool, bool]:
    """Whether landmark and flag can be seen: whether another colour for it would change enough pixels."""
    at = slice(frame, frame + 1)
    drawn = render(shot, at).astype(np.int16)

    def changed(scenery: Scenery) -> bool:
        other = render(replace(shot, scenery=scenery), at).astype(np.int16)
        return int((np.abs(other - drawn).max(axis=-1) > 24).sum()) >= VISIBLE

    landmark = "red" if shot.scenery.landmark != "red" else "blue"
    flag = "red" if shot.scenery.flag != "red" else "blue"
    return changed(replace(shot.scenery, landmark=landmark)), changed(replace(shot.scenery, flag=flag))


def story(seed: int, *, shots: int = 8, looks: bool = False, where: tuple[str, str] | None = None) -> ToyStory:
    """A story of `shots` shots in two or three scenes with one to three characters.

    looks: let every prompt also describe characters and things (for measuring text following).
    where: place and time of all scenes, instead of those drawn.
    """
    rng = np.random.default_rng([seed, 20_251])
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    names = rng.choice(len(NAMES), size=count, replace=False)
    kinds = rng.choice(len(LOOKS), size=count, replace=False)
    cast = tuple(Character(name=NAMES[n], look=LOOKS[k]) for n, k in zip(names, kinds, strict=True))
    sceneries = {place: _scenery(rng) for place in PLACES}
    scenes: list[tuple[ToyShot, ...]] = []
    lengths = _scene_lengths(rng, shots)
    for length in lengths:
        drawn = str(rng.choice(PLACES)), str(rng.choice(TIMES))
        place, time = where or drawn
        scenes.append(_scene(rng, length, place, time, cast, sceneries[place], looks))
    places = list(dict.fromkeys(scene[0].place for scene in scenes))
    overview = f"{' and '.join(c.name for c in cast)}: a story in the {', the '.join(places)}."
    return ToyStory(seed=seed, overview=overview, scenes=tuple(scenes), cast=cast)


def _scenery(rng: np.random.Generator) -> Scenery:
    landmark, flag, side = rng.choice(PROP_COLOURS), rng.choice(PROP_COLOURS), rng.choice(SIDES)
    return Scenery(landmark=str(landmark), side=str(side), flag=str(flag))


def _scene_lengths(rng: np.random.Generator, shots: int) -> list[int]:
    scenes = min(shots, int(rng.integers(2, 4)))
    cuts = rng.choice(np.arange(1, shots), size=scenes - 1, replace=False) if scenes > 1 else np.zeros(0)
    edges = [0, *sorted(int(cut) for cut in cuts), shots]
    return [b - a for a, b in itertools.pairwise(edges)]


def _scene(
    rng: np.random.Generator,
    length: int,
    place: str,
    time: str,
    people: tuple[Character, ...],
    scenery: Scenery,
    looks: bool,
) -> tuple[ToyShot, ...]:
    """Shots in one place at one time; about a third of those after the first go on from the shot before."""
    shots: list[ToyShot] = []
    for _ in range(length):
        cut = not shots or bool(rng.random() < 0.67)
        if cut:
            framing, action, pan, cast = _draw_shot(rng, people)
            state = starting_state(rng, action, framing, pan)
        else:
            last = shots[-1]
            framing, cast, state = last.framing, last.cast, end_state(last.poses, last.camera)
            action = str(rng.choice(possible_actions(framing, state)))
            pans = possible_pans(state.camera)
            pan = str(rng.choice(pans)) if rng.random() < 0.3 else "still"
        prompt = sentence(
            rng,
            place=place,
            time=time,
            framing=framing,
            action=action,
            pan=pan,
            cast=cast,
            scenery=scenery,
            looks=looks,
        )
        shots.append(_shot(rng, prompt, cut, place, time, framing, action, pan, cast, scenery, state))
    return tuple(shots)


def _draw_shot(rng: np.random.Generator, people: tuple[Character, ...]) -> tuple[str, str, str, tuple[Character, ...]]:
    """Framing, action, pan and cast of a shot after a cut."""
    together = len(people) > 1 and rng.random() < 0.25
    order = rng.permutation(len(people))
    pan = str(rng.choice(PANS[1:])) if rng.random() < 0.3 else "still"
    if together:
        return str(rng.choice(FRAMINGS[:2])), "meets", pan, (people[order[0]], people[order[1]])
    return str(rng.choice(FRAMINGS)), str(rng.choice(ACTIONS[:-1])), pan, (people[order[0]],)


def _shot(
    rng: np.random.Generator,
    prompt: str,
    cut: bool,
    place: str,
    time: str,
    framing: str,
    action: str,
    pan: str,
    cast: tuple[Character, ...],
    scenery: Scenery,
    state: State,
) -> ToyShot:
    return ToyShot(
        prompt=prompt,
        cut=cut,
        place=place,
        time=time,
        framing=framing,
        action=action,
        pan=pan,
        cast=cast,
        scenery=scenery,
        poses=act(rng, action, framing, state),
        camera=camera_path(pan, state.camera),
    )
