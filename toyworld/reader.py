"""Attributes from pixels: the renderer is fitted to a frame, and its inputs are what the frame shows.

First the place (place, time, framing), then its landmark and flag, then every character: body colour, shape
and pose, hat, eyes. A value is given only if, where the best drawing and its best rival differ, the best explains the
frame clearly better; otherwise it is "unknown".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from toyworld.attributes import (
    FRAMINGS,
    HEIGHT,
    LOOK_PARTS,
    PLACE_PARTS,
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
from toyworld.places import draw_place

DIFFERENT = 0.08  # backdrops are compared where they differ by this
CLEAR = 0.85  # the better one has at most this share of the error of the other
SURE = 0.75  # a colour is read if its rival explains at most this share of the pixels it explains
ENOUGH = 10  # pixels that must look like a landmark or flag of the colour read
CLOSE = 0.11  # the same for landmark and flag
LIFTED = 3.5  # pixels; walking lifts by 1.2
WALKED = 5.0  # pixels; a walk is of 11 or 16
CLIP = 0.1  # larger errors are characters in front


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """A place as drawn without characters, landmark and flag: what was fitted, and the image [3, H, W]."""

    place: str
    time: str
    framing: str
    image: Array


def planar(frame: npt.NDArray[np.uint8]) -> Array:
    """A frame uint8 [H, W, 3] as [3, H, W] in 0..1."""
    return frame.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


@lru_cache(maxsize=1)
def _gallery() -> tuple[list[tuple[str, str, str]], Array]:
    """Every place, time and framing, and their small images [N, 3, H/4, W/4]."""
    keys = list(product(PLACES, TIMES, FRAMINGS))
    return keys, np.stack([_small(draw_place(*key, None)) for key in keys])


def _small(images: Array) -> Array:
    h, w = images.shape[-2:]
    return images.reshape(*images.shape[:-2], h // 4, 4, w // 4, 4).mean(axis=(-3, -1))


def clearly(observed: Array, best: Array, rival: Array) -> bool:
    """Whether, where the two images differ, `best` explains the frame much better than `rival`."""
    where = np.abs(best - rival).max(axis=0) > DIFFERENT
    ours, theirs = (np.minimum(np.abs(observed - image), CLIP).mean(axis=0)[where].mean() for image in (best, rival))
    return bool(ours < CLEAR * theirs)


def _error(observed: Array, image: Array) -> float:
    return float(np.minimum(np.abs(observed - image), CLIP).mean())


def fit_backdrop(observed: Array) -> tuple[Backdrop, dict[str, str]]:
    """The backdrop nearest to the frame, and the place, time and framing as far as they are sure."""
    keys, gallery = _gallery()
    errors = np.minimum(np.abs(gallery - _small(observed)), CLIP).mean(axis=(1, 2, 3))
    order = np.argsort(errors)
    best = min((keys[i] for i in order[:4]), key=lambda key: _error(observed, draw_place(*key, None)))
    image = draw_place(*best, None)
    found = dict(zip(("place", "time", "framing"), best, strict=True))
    backdrop = Backdrop(**found, image=image)
    for position, name in enumerate(found):
        rival = next(keys[i] for i in order if keys[i][position] != best[position])
        if not clearly(observed, image, draw_place(*rival, None)):
            found[name] = UNKNOWN
    return backdrop, found


def fit_scenery(observed: Array, backdrop: Backdrop, free: Mask) -> tuple[Scenery, dict[str, str]]:
    """Landmark, side and flag: by how many free pixels look like each colour where it would show."""

    def draw(scenery: Scenery) -> Array:
        return draw_place(backdrop.place, backdrop.time, backdrop.framing, scenery)

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
        place = draw_place(backdrop.place, backdrop.time, backdrop.framing, scenery)
    scene = Scene(
        observed=observed,
        place=place,
        empty=backdrop.image,
        framing=backdrop.framing,
        time=backdrop.time,
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
    voted = Seen(**{name: vote(getattr(s, name) for s in seen) for name in PLACE_PARTS}, looks=looks)
    paths = [[fit.at for fit in fits] for _, fits in read if len(fits) == crowd]
    action = UNKNOWN if crowd not in (1, 2) or len(paths) < 3 else read_action(paths)
    return ShotSeen(seen=voted, action=action)


def vote(values: Iterable[str]) -> str:
    """The commonest value that is known, or unknown."""
    known = [value for value in values if value != UNKNOWN]
    return max(sorted(set(known)), key=known.count) if known else UNKNOWN


def read_action(path: Sequence[Sequence[Placement]]) -> str:
    """The action behind the poses of one or two characters over the frames in which all were found."""
    lift = max(at.lift for poses in path for at in poses)
    if len(path[0]) == 2:
        gaps = [right.x - left.x for left, right in path]
        if gaps[0] - gaps[-1] > 2 * WALKED:
            return "meets"
        return "jumps" if lift > LIFTED else "waits"
    (first, *_), (last, *_) = path[0], path[-1]
    if abs(last.x - first.x) > WALKED:
        return "walks right" if last.x > first.x else "walks left"
    if lift > LIFTED:
        return "jumps"
    return "turns" if first.facing * last.facing < 0 else "waits"


def _vote_look(looks: Sequence[Look]) -> Look:
    return replace(looks[0], **{name: vote(getattr(look, name) for look in looks) for name in LOOK_PARTS})


def _commonest(counts: Sequence[int]) -> int:
    return max(sorted(set(counts)), key=counts.count)
