"""Fitting drawn characters to a frame: pose and look of each, from left to right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from toyworld.attributes import BODY_COLOURS, EYES, HATS, HEIGHT, SHAPES, UNKNOWN, WIDTH, Look
from toyworld.characters import BODY_RGB, UNIT, WHOLE, Pose, Window, body_distance, paint_character
from toyworld.draw import Array, tint
from toyworld.motion import JUMP
from toyworld.places import BASE, LIGHTS

COLOUR_NEAR = 0.16
SURE = 0.8  # a part is read if the best drawing's error is at most this share of its best rival's, where they differ
SECOND = 0.4  # a second body covers at least this share of the pixels of the first
NEEDED = 0.7  # and leaves at most this share of the error there would be without it
SMALLEST = 0.5  # a body has at least this many square units, eyes and hat taken off
FACINGS = (-1.0, -0.5, 0.0, 0.5, 1.0)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the fit is made against: the frame, the place without characters, and how it is seen."""

    observed: Array  # [3, H, W]
    place: Array
    empty: Array  # the same without landmark and flag
    framing: str
    time: str


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A pose of one frame; x and lift in pixels (see `Pose`)."""

    x: float
    lift: float
    facing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted character: the look with unsure parts unknown and in full, where it stands, the mean error around it."""

    look: Look
    best: Look
    at: Placement
    error: float


def fit_characters(scene: Scene) -> list[Fit]:
    """The characters in the frame (one or two) from left to right."""
    fits: list[Fit] = []
    taken = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for colour, mask in _bodies(scene):
        if (mask & ~taken).sum() < 0.6 * mask.sum():
            continue  # a hat
        fit = _fit_body(scene, colour, mask)
        if len(fits) < 2 and (not fits or _is_needed(scene, fit)):
            fits.append(fit)
            taken |= covered(scene, [fit])
    return sorted(fits, key=lambda fit: fit.at.x)


def _is_needed(scene: Scene, fit: Fit) -> bool:
    """Whether the frame is explained much better with this character than without."""
    rows, columns = _around(scene, fit.at)
    bare = np.minimum(np.abs(scene.place - scene.observed)[:, rows, columns], 0.5).mean()
    return bool(fit.error < NEEDED * bare)


def _bodies(scene: Scene) -> list[tuple[str, Mask]]:
    """Blobs of a body colour that differ from the place and are big enough to be a body, largest first."""
    behind = [np.abs(scene.observed - image).max(axis=0) for image in (scene.place, scene.empty)]
    foreground = np.minimum(*behind) > 0.07
    palette = np.array([tint(BODY_RGB[c], LIGHTS[scene.time].people) for c in BODY_COLOURS], dtype=np.float32)
    # Bodies are shaded: compare with the best of a few brightnesses.
    shades = np.array([0.87, 0.98, 1.09], dtype=np.float32)
    shaded = np.minimum(palette[:, None, :] * shades[None, :, None], 1)
    distance = np.abs(scene.observed[None, None] - shaded[..., None, None]).max(axis=2).min(axis=1)
    nearest, near = distance.argmin(axis=0), foreground & (distance.min(axis=0) < COLOUR_NEAR)
    blobs = []
    for index, colour in enumerate(BODY_COLOURS):
        of_colour = near & (nearest == index)
        for columns in _segments(of_colour.any(axis=0)):
            mask = np.zeros_like(of_colour)
            mask[:, columns] = of_colour[:, columns]
            if mask.sum() >= SMALLEST * UNIT[scene.framing] ** 2:
                blobs.append((colour, mask))
    blobs.sort(key=lambda blob: -int(blob[1].sum()))
    blobs = [blob for blob in blobs if blob[1].sum() >= SECOND * blobs[0][1].sum()]
    kept: list[tuple[str, Mask]] = []
    for colour, mask in blobs:  # of blobs over the same columns the largest stays
        columns_of = mask.any(axis=0)
        if all((columns_of & other.any(axis=0)).sum() < 0.4 * columns_of.sum() for _, other in kept):
            kept.append((colour, mask))
    return kept[:3]


def _segments(used: Mask, gap: int = 2) -> list[slice]:
    """Runs of used columns, joined over short gaps."""
    columns = np.flatnonzero(used)
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > gap + 1) + 1) if len(columns) else []
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def _fit_body(scene: Scene, colour: str, mask: Mask) -> Fit:
    """The look and pose behind a blob of body colour: outline, then hat, then eyes, then small moves."""
    guesses = _outlines(scene, mask)
    where = _around(scene, guesses[0][1])
    ranked = []
    for (shape, at), hat in product(guesses, HATS):
        look = Look(shape=shape, colour=colour, hat=hat, eyes="big eyes")
        ranked.append((float(_errors(scene, look, [at], where)[0]), look, at))
    ranked.sort(key=lambda item: item[0])
    hopeful = [item for item in ranked[:3] if item[0] < 1.3 * ranked[0][0]]
    return _doubt(scene, min((_refine(scene, look, at, where) for _, look, at in hopeful), key=lambda fit: fit.error))


def _outlines(scene: Scene, mask: Mask) -> list[tuple[str, Placement]]:
    """Shapes and poses by how well their outline covers the blob (intersection over union), best first."""
    filled = np.logical_or.accumulate(mask, axis=1) & np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    unit, middle = UNIT[scene.framing], np.nonzero(mask)[1].mean() + 0.5 - WIDTH / 2
    xs, lifts = middle + np.arange(-4, 4.1, 1.0), np.arange(0, JUMP[scene.framing] + 1.1, 1.0)
    x = (np.arange(WIDTH) + 0.5 - WIDTH / 2 - xs.reshape(-1, 1, 1, 1)) / unit
    y = (BASE - 0.5 - np.arange(HEIGHT).reshape(-1, 1) - lifts.reshape(-1, 1, 1)) / unit - 1
    guesses = []
    for shape in SHAPES:
        inside = body_distance(shape, x, y) < -0.05
        scores = (inside & filled).sum(axis=(2, 3)) / (inside | filled).sum(axis=(2, 3))
        i, j = np.unravel_index(int(scores.argmax()), scores.shape)
        guesses.append((float(scores[i, j]), shape, Placement(x=float(xs[i]), lift=float(lifts[j]))))
    guesses.sort(key=lambda guess: -guess[0])
    return [(shape, at) for _, shape, at in guesses]


def draw(scene: Scene, look: Look, places: list[Placement], where: Window = WHOLE) -> Array:
    """A window of the place with one character in each of N placements: [3, N, h, w]."""
    canvas = np.repeat(scene.place[:, None, where[0], where[1]], len(places), axis=1)
    columns = {name: np.array([getattr(p, name) for p in places], dtype=np.float32) for name in vars(places[0])}
    pose = Pose(stride=np.zeros(len(places), dtype=np.float32), **columns)
    paint_character(canvas, scene.framing, scene.time, look, pose, crop=where)
    return canvas


def _around(scene: Scene, at: Placement) -> Window:
    """Rows and columns of the image around a character (without its shadow)."""
    unit, middle, ground = UNIT[scene.framing], WIDTH / 2 + at.x, BASE - at.lift
    return (
        slice(int(max(ground - 3.2 * unit, 0)), int(ground)),
        slice(int(max(middle - 1.25 * unit, 0)), int(min(middle + 1.25 * unit + 1, WIDTH))),
    )


def _errors(scene: Scene, look: Look, places: list[Placement], where: Window) -> Array:
    """Mean absolute error inside a window for each of N placements."""
    difference = np.abs(draw(scene, look, places, where) - scene.observed[:, None, where[0], where[1]])
    return np.minimum(difference, 0.5).mean(axis=(0, 2, 3))


def _best_eyes(scene: Scene, look: Look, at: Placement, where: Window) -> tuple[Look, Placement]:
    places = [replace(at, facing=f) for f in FACINGS]
    errors = np.stack([_errors(scene, replace(look, eyes=eyes), places, where) for eyes in EYES])
    i, j = np.unravel_index(int(errors.argmin()), errors.shape)
    return replace(look, eyes=EYES[i]), places[j]


def _refine(scene: Scene, look: Look, at: Placement, where: Window) -> Fit:
    """Small moves of the pose while they help, then hat and eyes once more in the refined pose."""
    look, at = _best_eyes(scene, look, at, where)
    for step in (1.5, 0.75, 0.5):
        moves = [at]
        moves += [
            replace(at, x=at.x + dx, lift=max(at.lift + dy, 0.0)) for dx in (-step, 0, step) for dy in (-step, 0, step)
        ]
        at = moves[int(_errors(scene, look, moves, where).argmin())]
    look, at = _best_eyes(scene, look, at, where)
    error, hat = min((float(_errors(scene, replace(look, hat=hat), [at], where)[0]), hat) for hat in HATS)
    look = replace(look, hat=hat)
    return Fit(look=look, best=look, at=at, error=error)


def _doubt(scene: Scene, fit: Fit) -> Fit:
    """The fit with every part unknown whose best rival explains the frame nearly as well."""
    values = {"shape": SHAPES, "colour": BODY_COLOURS, "hat": HATS, "eyes": EYES}
    where = _around(scene, fit.at)
    observed = scene.observed[:, where[0], where[1]]
    best = draw(scene, fit.look, [fit.at], where)[:, 0]
    known = {}
    for name, options in values.items():
        rivals = [replace(fit.look, **{name: option}) for option in options if option != getattr(fit.look, name)]
        sure = all(_explains(observed, best, draw(scene, rival, [fit.at], where)[:, 0]) for rival in rivals)
        known[name] = getattr(fit.look, name) if sure else UNKNOWN
    return replace(fit, look=Look(**known))


def covered(scene: Scene, fits: list[Fit]) -> Mask:
    """The pixels that the fitted characters cover."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for fit in fits:
        mask |= np.abs(draw(scene, fit.best, [fit.at])[:, 0] - scene.place).max(axis=0) > 0.03
    return mask


def _explains(observed: Array, best: Array, rival: Array) -> bool:
    where = np.abs(best - rival).max(axis=0) > 0.08
    if int(where.sum()) < 3:
        return False
    ours, theirs = (np.abs(observed - image).mean(axis=0)[where].mean() for image in (best, rival))
    return bool(ours < SURE * theirs)
