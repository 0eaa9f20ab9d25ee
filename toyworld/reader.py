"""Attributes from pixels: the renderer is fitted to a frame, and its inputs are what the frame shows.

First the place (place, time, framing, camera), then its landmark and flag, then every character: body colour, shape
and pose, hat, eyes. A value is given only if, where the best drawing and its best rival differ, the best explains the
frame clearly better; otherwise it is "unknown".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from toyworld.attributes import (
    FRAMINGS,
    HEIGHT,
    PLACES,
    PROP_COLOURS,
    SIDES,
    TIMES,
    UNKNOWN,
    WIDTH,
    Look,
    Scenery,
    Seen,
)
from toyworld.draw import Array
from toyworld.fit_character import Fit, Mask, Placement, Scene, covered, fit_characters
from toyworld.motion import PAN, half_width
from toyworld.places import paint_place, view

NEAR = (0.04, 0.07)  # how near, in 0..1, a pixel of the place must be to be explained, in clean and grainy frames
SURE = 0.75  # a colour is read if its rival explains at most this share of the pixels it explains
ENOUGH = 10  # pixels that must look like a landmark or flag of the colour read
CLOSE = 0.11  # the same for landmark and flag
ROLLED = 0.6  # radians from upright
LIFTED = 3.0  # world units; walking lifts by 1.4
CLIP = 0.1  # larger errors are characters in front


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """A place as drawn without people: what was fitted, and the image [3, H, W]."""

    place: str
    time: str
    framing: str
    camera: float
    image: Array


def planar(frame: npt.NDArray[np.uint8]) -> Array:
    """A frame uint8 [H, W, 3] as [3, H, W] in 0..1."""
    return frame.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


@lru_cache(maxsize=4096)
def _empty(place: str, time: str, framing: str, camera: float, scenery: Scenery | None = None) -> Array:
    canvas = np.empty((3, 1, HEIGHT, WIDTH), dtype=np.float32)
    paint_place(canvas, view(framing, np.array([camera], dtype=np.float32)), place, time, scenery)
    return canvas[:, 0]


@lru_cache(maxsize=1)
def _gallery() -> tuple[list[tuple[str, str, str, float]], Array]:
    """Every place, time, framing and a few camera positions, and their small images [N, 3, H/4, W/4]."""
    cameras = np.linspace(-PAN, PAN, 5, dtype=np.float32)
    keys, small = [], []
    for place in PLACES:
        for time in TIMES:
            for framing in FRAMINGS:
                canvas = np.empty((3, len(cameras), HEIGHT, WIDTH), dtype=np.float32)
                paint_place(canvas, view(framing, cameras), place, time, None)
                keys += [(place, time, framing, float(camera)) for camera in cameras]
                small.append(_small(canvas).transpose(1, 0, 2, 3))
    return keys, np.concatenate(small)


def _small(images: Array) -> Array:
    h, w = images.shape[-2:]
    return images.reshape(*images.shape[:-2], h // 4, 4, w // 4, 4).mean(axis=(-3, -1))


def clearly(observed: Array, best: Array, rival: Array) -> bool:
    """Whether, where the two images differ, `best` explains a fair part of the frame and far more than `rival`."""
    gap = np.abs(observed - best).max(axis=0)
    near = float(np.clip(1.5 * np.median(gap), *NEAR))
    where = np.abs(best - rival).max(axis=0) > 2 * near
    ours = (gap < near)[where].sum()
    theirs = (np.abs(observed - rival).max(axis=0) < near)[where].sum()
    return bool(ours > 0.25 * where.sum() and ours > 2 * theirs)


def _error(observed: Array, image: Array) -> float:
    return float(np.minimum(np.abs(observed - image), CLIP).mean())


def fit_backdrop(observed: Array) -> tuple[Backdrop, dict[str, str]]:
    """The backdrop nearest to the frame, and the place, time and framing as far as they are sure."""
    keys, gallery = _gallery()
    errors = np.minimum(np.abs(gallery - _small(observed)), CLIP).mean(axis=(1, 2, 3))
    order = np.argsort(errors)
    finalists = [keys[i] for i in order[:4]]
    place, time, framing, _ = min(finalists, key=lambda key: _error(observed, _empty(*key)))
    rows = [key[3] for key in keys if key[:3] == (place, time, framing)]
    camera = min(rows, key=lambda c: _error(observed, _empty(place, time, framing, c)))
    camera = _fit_camera(observed, place, time, framing, camera)
    best = _empty(place, time, framing, camera)
    found = {"place": place, "time": time, "framing": framing}
    for name, position in (("place", 0), ("time", 1), ("framing", 2)):
        rival = next(keys[i] for i in order if keys[i][position] != found[name])
        if not clearly(observed, best, _empty(*rival)):
            found[name] = UNKNOWN
    return Backdrop(place=place, time=time, framing=framing, camera=camera, image=best), found


def _fit_camera(observed: Array, place: str, time: str, framing: str, camera: float) -> float:
    for step in (1.0, 0.5):
        tries = [camera + k * step for k in (-1, 0, 1) if abs(camera + k * step) <= PAN]
        camera = min(tries, key=lambda c: _error(observed, _empty(place, time, framing, c)))
    return camera


def fit_scenery(observed: Array, backdrop: Backdrop, free: Mask) -> tuple[Scenery, dict[str, str]]:
    """Landmark, side and flag: by how many free pixels look like each colour where it would show."""

    def draw(scenery: Scenery) -> Array:
        return _empty(backdrop.place, backdrop.time, backdrop.framing, backdrop.camera, scenery)

    counts: dict[tuple[str, str], list[int]] = {}
    beyond = np.abs(observed - backdrop.image).max(axis=0)
    for side in SIDES:
        drawings = [draw(Scenery(landmark=c, side=side, flag=c)) for c in PROP_COLOURS]
        only_flag = draw(Scenery(landmark=PROP_COLOURS[0], side=side, flag=PROP_COLOURS[-1]))
        flag = np.abs(drawings[0] - only_flag).max(axis=0) > 0.1
        landmark = ~flag & (np.abs(drawings[0] - drawings[-1]).max(axis=0) > 0.1)
        gaps = [np.abs(observed - drawing).max(axis=0) for drawing in drawings]
        explained = [(gap < CLOSE) & (gap < 0.7 * beyond) & free for gap in gaps]
        counts["landmark", side] = [int((e & landmark).sum()) for e in explained]
        counts["flag", side] = [int((e & flag).sum()) for e in explained]
    score = {side: max(counts["landmark", side]) + max(counts["flag", side]) for side in SIDES}
    side = max(SIDES, key=lambda s: score[s])
    found = {"side": side if score[side] - min(score.values()) >= ENOUGH else UNKNOWN}
    colours = {}
    for part in ("landmark", "flag"):
        ranked = sorted(zip(counts[part, side], PROP_COLOURS, strict=True), reverse=True)
        colours[part] = ranked[0][1]
        known = ranked[0][0] >= ENOUGH and ranked[1][0] < SURE * ranked[0][0] and found["side"] != UNKNOWN
        found[part] = ranked[0][1] if known else UNKNOWN
    return Scenery(side=side, **colours), found


def read_attributes(frame: npt.NDArray[np.uint8]) -> Seen:
    """What a frame uint8 [64, 96, 3] shows; what cannot be read is "unknown".

    Looks run from left to right; a frame without recognisable characters has none.
    """
    return read_frame(frame)[0]


def read_frame(frame: npt.NDArray[np.uint8]) -> tuple[Seen, list[Fit]]:
    """The same, and the poses of the characters in it."""
    if frame.shape != (HEIGHT, WIDTH, 3) or frame.dtype != np.uint8:
        raise ValueError(
            f"read_attributes takes one frame, uint8 [{HEIGHT}, {WIDTH}, 3]; got {frame.dtype} {list(frame.shape)}"
        )
    observed = planar(frame)
    backdrop, found = fit_backdrop(observed)
    scenery, things = fit_scenery(observed, backdrop, np.ones((HEIGHT, WIDTH), dtype=bool))
    place = backdrop.image
    if things["side"] != UNKNOWN:
        place = _empty(backdrop.place, backdrop.time, backdrop.framing, backdrop.camera, scenery)
    scene = Scene(
        observed=observed,
        place=place,
        empty=backdrop.image,
        framing=backdrop.framing,
        time=backdrop.time,
        camera=backdrop.camera,
    )
    fits = fit_characters(scene)
    # A hat in front of the flag must not be mistaken for it: read again beside the characters.
    _, things = fit_scenery(observed, backdrop, ~covered(scene, fits))
    return Seen(**found, **things, looks=tuple(fit.look for fit in fits)), fits


@dataclass(frozen=True, kw_only=True)
class ShotSeen:
    """What a shot shows and what happens in it; unknown where most frames cannot be read."""

    seen: Seen
    action: str


def read_shot(frames: npt.NDArray[np.uint8], every: int = 2) -> ShotSeen:
    """Read every `every`-th frame of a shot uint8 [F, 64, 96, 3]; looks run from left to right."""
    read = [read_frame(frame) for frame in frames[::every]]
    seen = [attributes for attributes, _ in read]
    crowd = _commonest([len(s.looks) for s in seen])
    full = [s.looks for s in seen if len(s.looks) == crowd]
    looks = tuple(_vote_look([look[i] for look in full]) for i in range(crowd))
    names = ("place", "time", "framing", "landmark", "side", "flag")
    voted = Seen(**{name: vote(getattr(s, name) for s in seen) for name in names}, looks=looks)
    paths = [[fit.at for fit in fits] for _, fits in read if len(fits) == crowd]
    framing = voted.framing if voted.framing != UNKNOWN else FRAMINGS[1]
    action = UNKNOWN if crowd not in (1, 2) or len(paths) < 3 else read_action(paths, framing)
    return ShotSeen(seen=voted, action=action)


def vote(values: Iterable[str]) -> str:
    """The commonest value that is known, or unknown."""
    known = [value for value in values if value != UNKNOWN]
    return max(sorted(set(known)), key=known.count) if known else UNKNOWN


def read_action(path: Sequence[Sequence[Placement]], framing: str) -> str:
    """The action behind the poses of one or two characters over the frames in which all were found."""
    lift = max(at.lift for poses in path for at in poses)
    if len(path[0]) == 2:
        gaps = [right.x - left.x for left, right in path]
        if gaps[0] - gaps[-1] > 6:
            return "meets"
        return "jumps" if lift > LIFTED else "waits"
    (first, *_), (last, *_) = path[0], path[-1]
    away = last.x - first.x
    if abs(away) > 0.35 * half_width(framing):
        return "walks right" if away > 0 else "walks left"
    if sum(np.cos(poses[0].roll) < np.cos(ROLLED) for poses in path) >= 2:
        return "spins"
    if first.size < 0.8 and last.size - first.size > 0.15:
        return "grows"
    if lift > LIFTED:
        return "jumps"
    return "turns" if first.facing * last.facing < 0 else "waits"


def _vote_look(looks: Sequence[Look]) -> Look:
    return replace(looks[0], **{name: vote(getattr(look, name) for look in looks) for name in vars(looks[0])})


def _commonest(counts: Sequence[int]) -> int:
    return max(sorted(set(counts)), key=counts.count)
