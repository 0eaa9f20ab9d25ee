"""Fitting drawn characters to a frame: pose and look of each, from left to right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from toyworld.attributes import BODY_COLOURS, EYES, HATS, HEIGHT, SHAPES, UNKNOWN, WIDTH, Look
from toyworld.characters import BODY, BODY_RGB, WHOLE, Pose, Window, body_distance, paint_character
from toyworld.draw import Array, tint
from toyworld.places import BASE, LIGHTS, ZOOM

HALF_WIDTH = {"round": 0.95, "square": 0.87, "tall": 0.59, "pointed": 0.95}  # of a body without its outline
COLOUR_NEAR = 0.16
SURE = 0.75
SECOND = 0.4  # a second body covers at least this share of the pixels of the first
NEEDED = 0.6  # and leaves at most this share of the error there would be without it
GOOD = 0.014  # an upright fit with a smaller mean error is taken without trying others
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the fit is made against: the frame, the place without characters, and how it is seen."""

    observed: Array  # [3, H, W]
    place: Array
    empty: Array  # the same without landmark and flag
    framing: str
    time: str
    camera: float


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A pose of one frame; x and lift in world units (see `Pose`)."""

    x: float
    lift: float
    size: float
    roll: float
    facing: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted character: the look with unsure parts unknown and in full, where it stands, the mean error around it."""

    look: Look
    best: Look
    at: Placement
    error: float


def fit_characters(scene: Scene) -> list[Fit]:
    """The characters in the frame from left to right."""
    fits: list[Fit] = []
    taken = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for colour, mask in _bodies(scene):
        if (mask & ~taken).sum() < 0.6 * mask.sum():
            continue  # a hat
        fit = _fit_body(scene, colour, mask)
        if fit is not None and len(fits) < 2 and (not fits or _is_needed(scene, fit)):
            fits.append(fit)
            taken |= covered(scene, [fit])
    return sorted(fits, key=lambda fit: fit.at.x)


def _is_needed(scene: Scene, fit: Fit) -> bool:
    """Whether the frame is explained much better with this character than without."""
    rows, columns = _around(scene, fit.at)
    bare = np.minimum(np.abs(scene.place - scene.observed)[:, rows, columns], 0.5).mean()
    return bool(fit.error < NEEDED * bare)


def _bodies(scene: Scene) -> list[tuple[str, Mask]]:
    """Blobs of a body colour that differ from the place and are big enough to be a body: colour and pixels."""
    behind = [np.abs(scene.observed - image).max(axis=0) for image in (scene.place, scene.empty)]
    foreground = np.minimum(*behind) > 0.07
    light = LIGHTS[scene.time].people
    palette = np.array([tint(BODY_RGB[c], light) for c in BODY_COLOURS], dtype=np.float32)
    # Bodies are shaded: compare with the best of a few brightnesses.
    shades = np.array([0.87, 0.98, 1.09], dtype=np.float32)
    shaded = np.minimum(palette[:, None, :] * shades[None, :, None], 1)
    distance = np.abs(scene.observed[None, None] - shaded[..., None, None]).max(axis=2).min(axis=1)
    nearest = distance.argmin(axis=0)
    near = foreground & (distance.min(axis=0) < COLOUR_NEAR)
    least = 0.3 * 1.6 * (BODY * ZOOM[scene.framing]) ** 2 * 0.36
    blobs = []
    for index, colour in enumerate(BODY_COLOURS):
        for columns in _segments((near & (nearest == index)).sum(axis=0) > 0):
            mask = near & (nearest == index)
            mask[:, : columns.start] = False
            mask[:, columns.stop :] = False
            if mask.sum() >= least:
                blobs.append((colour, mask))
    blobs.sort(key=lambda blob: -int(blob[1].sum()))
    return _without_overlaps([blob for blob in blobs if blob[1].sum() >= SECOND * blobs[0][1].sum()])


def _segments(used: npt.NDArray[np.bool_], gap: int = 2) -> list[slice]:
    """Runs of used columns, joined over short gaps."""
    runs: list[list[int]] = []
    for column in np.flatnonzero(used):
        if runs and column - runs[-1][1] <= gap:
            runs[-1][1] = int(column)
        else:
            runs.append([int(column), int(column)])
    return [slice(a, b + 1) for a, b in runs]


def _without_overlaps(blobs: list[tuple[str, Mask]]) -> list[tuple[str, Mask]]:
    """Of blobs over the same columns the largest stays."""
    kept: list[tuple[str, Mask]] = []
    for colour, mask in blobs:
        columns = mask.any(axis=0)
        if all((columns & other.any(axis=0)).sum() < 0.4 * columns.sum() for _, other in kept):
            kept.append((colour, mask))
    return kept[:3]


def _fit_body(scene: Scene, colour: str, mask: Mask) -> Fit | None:
    """The look and pose behind a blob of body colour."""
    guesses = _shape_guesses(scene, mask, rolls=np.zeros(1))
    fit = _best_look(scene, colour, guesses)
    if fit is None or fit.error > GOOD:
        turned = _shape_guesses(scene, mask, rolls=np.arange(16) * (np.pi / 8))
        other = _best_look(scene, colour, turned)
        if other is not None and (fit is None or other.error < 0.85 * fit.error):
            fit = other
    return None if fit is None else _doubt(scene, fit)


def _grid() -> tuple[Array, Array]:
    x = (np.arange(WIDTH, dtype=np.float32) + 0.5).reshape(1, 1, -1)
    y = (np.arange(HEIGHT, dtype=np.float32) + 0.5).reshape(1, -1, 1)
    return x, y


def _shape_guesses(scene: Scene, mask: Mask, rolls: Floats) -> list[tuple[str, Placement]]:
    """Shapes and poses by how well their outline covers the blob, best first."""
    zoom, base = ZOOM[scene.framing], BASE[scene.framing]
    filled = _filled(mask)
    area = float(filled.sum())
    ranked: list[tuple[float, str, Placement]] = []
    for shape in SHAPES:
        estimate = float(np.clip(np.sqrt(area / body_area(shape)) / (BODY * zoom), 0.57, 1.02))
        sizes = {1.0, estimate, max(0.57, 0.93 * estimate), min(1.02, 1.07 * estimate)}
        guesses = []
        for size in sizes:
            unit = size * BODY * zoom
            for middle, centre in _centres(shape, mask, filled, unit, rolls):
                overlap = _overlaps(shape, filled, middle, centre, unit, rolls)
                x = (middle - WIDTH / 2) / zoom + scene.camera
                lift = np.maximum((base - unit - centre) / zoom, 0.0)
                guesses += [
                    (score, shape, Placement(x=x[i], lift=lift[i], size=size, roll=rolls[i], facing=0.0))
                    for i, score in enumerate(overlap.tolist())
                ]
        guesses.sort(key=lambda guess: -guess[0])
        best_size = guesses[0][2].size
        if len(rolls) == 1:
            ranked += guesses[:2]
        else:  # a turned circle looks the same at every roll: its hat and eyes must tell
            ranked += [g for g in guesses if g[2].size == best_size][: len(rolls) if shape == "round" else 5]
    ranked.sort(key=lambda guess: -guess[0])
    return [(shape, at) for _, shape, at in ranked]


@lru_cache(maxsize=8)
def body_area(shape: str) -> float:
    """The area of a body's inside in squared body units."""
    return float(_inside(shape).mean() * 9)


@lru_cache(maxsize=8)
def body_middle(shape: str) -> float:
    """How high the middle of a body's area lies above its centre of rotation, in body units."""
    heights = np.linspace(-1.5, 1.5, 300, dtype=np.float32)
    return float((_inside(shape).sum(axis=1) * heights).sum() / _inside(shape).sum())


def _inside(shape: str) -> Mask:
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 300, dtype=np.float32), np.linspace(-1.5, 1.5, 300, dtype=np.float32))
    return body_distance(shape, u, v) < -0.05


def _centres(shape: str, mask: Mask, filled: Mask, unit: float, rolls: Floats) -> list[tuple[Floats, Floats]]:
    """Where a body of this size may turn about (columns, rows, one for each roll): from the middle of the blob's
    area, and for upright bodies also from its ends, one of which may be cut off by the image's edge."""
    rows, columns = np.nonzero(filled)
    away = unit * body_middle(shape)
    middles = columns.mean() + 0.5 - away * np.sin(rolls)
    centres = [(middles, rows.mean() + 0.5 + away * np.cos(rolls))]
    if len(rolls) > 1:
        return centres
    columns = np.flatnonzero(mask.any(axis=0))
    left, right, bottom = columns[0], columns[-1] + 1, rows.max() + 1
    half = HALF_WIDTH[shape] * unit
    middle = right - half if left == 0 else left + half if right == WIDTH else 0.5 * (left + right)
    return [*centres, (np.array([middle]), np.array([bottom - 0.95 * unit]))]


def _overlaps(shape: str, filled: Mask, middle: Floats, centre: Floats, unit: float, rolls: Floats) -> Floats:
    """Intersection over union of the blob and the outline at each roll."""
    x, y = _grid()
    cos, sin = np.cos(rolls).reshape(-1, 1, 1), np.sin(rolls).reshape(-1, 1, 1)
    across, up = (x - middle.reshape(-1, 1, 1)) / unit, (centre.reshape(-1, 1, 1) - y) / unit
    inside = body_distance(shape, cos * across - sin * up, sin * across + cos * up) < -0.05
    return (inside & filled).sum(axis=(1, 2)) / np.maximum((inside | filled).sum(axis=(1, 2)), 1)


def _filled(mask: Mask) -> Mask:
    """The blob with its rows filled between their ends (eyes are holes in it)."""
    return np.logical_or.accumulate(mask, axis=1) & np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def draw(scene: Scene, look: Look, places: list[Placement], where: Window = WHOLE) -> Array:
    """A window of the place with one character in each of N placements: [3, N, h, w]."""
    canvas = np.repeat(scene.place[:, None, where[0], where[1]], len(places), axis=1)
    columns = {name: np.array([getattr(p, name) for p in places], dtype=np.float32) for name in vars(places[0])}
    pose = Pose(stride=np.zeros(len(places), dtype=np.float32), **columns)
    camera = np.full(len(places), scene.camera, dtype=np.float32)
    paint_character(canvas, scene.framing, scene.time, look, pose, camera, where)
    return canvas


def _around(scene: Scene, at: Placement) -> Window:
    """Rows and columns of the image around a character (without its shadow)."""
    zoom, base = ZOOM[scene.framing], BASE[scene.framing]
    unit = BODY * zoom * at.size
    middle = WIDTH / 2 + (at.x - scene.camera) * zoom
    centre = base - at.lift * zoom - unit
    reach = 2.0 if at.roll else 1.15
    rows = slice(int(max(centre - 2.1 * unit, 0)), int(min(centre + (2.1 if at.roll else 0.9) * unit + 1, HEIGHT)))
    return rows, slice(int(max(middle - reach * unit - 1, 0)), int(min(middle + reach * unit + 2, WIDTH)))


def _errors(scene: Scene, look: Look, places: list[Placement], where: Window) -> Array:
    """Mean absolute error inside a window for each of N placements."""
    difference = np.abs(draw(scene, look, places, where) - scene.observed[:, None, where[0], where[1]])
    return np.minimum(difference, 0.5).mean(axis=(0, 2, 3))


def _best_look(scene: Scene, colour: str, guesses: list[tuple[str, Placement]]) -> Fit | None:
    """The best of some shapes and poses with every hat, then every pair of eyes, then the pose refined."""
    if not guesses:
        return None
    where = _around(scene, replace(guesses[0][1], roll=1.0 if any(at.roll for _, at in guesses) else 0.0))
    ranked: list[tuple[float, Look, Placement]] = []
    for shape in dict.fromkeys(shape for shape, _ in guesses):
        places = [at for s, at in guesses if s == shape]
        for hat in HATS:
            look = Look(shape=shape, colour=colour, hat=hat, eyes="big eyes")
            errors = _errors(scene, look, places, where)
            best = int(errors.argmin())
            ranked.append((float(errors[best]), look, places[best]))
    ranked.sort(key=lambda item: item[0])
    hopeful = [item for item in ranked[:3] if item[0] < 1.3 * ranked[0][0]]
    finals = [_refine(scene, *_best_eyes(scene, look, at, where), where) for _, look, at in hopeful]
    return min(finals, key=lambda fit: fit.error)


def _best_eyes(scene: Scene, look: Look, at: Placement, where: Window) -> tuple[Look, Placement]:
    places = [replace(at, facing=f) for f in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    tries = []
    for eyes in EYES:
        errors = _errors(scene, replace(look, eyes=eyes), places, where)
        tries.append((float(errors.min()), eyes, places[int(errors.argmin())]))
    _, eyes, at = min(tries, key=lambda item: item[0])
    return replace(look, eyes=eyes), at


def _refine(scene: Scene, look: Look, at: Placement, where: Window) -> Fit:
    """Small moves of the pose while they help, then hat and eyes once more in the refined pose."""
    zoom = ZOOM[scene.framing]
    error = float("inf")
    for pixel in (1.5, 1.0, 0.5, 0.25):
        step = pixel / zoom
        moves = [at]
        moves += [
            replace(at, x=at.x + dx, lift=max(at.lift + dy, 0.0)) for dx in (-step, 0, step) for dy in (-step, 0, step)
        ]
        moves += [replace(at, size=at.size * s, lift=at.lift) for s in (1 - 0.04 * pixel, 1 + 0.04 * pixel)]
        moves += [replace(at, roll=at.roll + r) for r in (-0.12 * pixel, 0.12 * pixel)] if at.roll else []
        errors = _errors(scene, look, moves, where)
        at, error = moves[int(errors.argmin())], float(errors.min())
    look, at = _best_eyes(scene, look, at, where)
    hats = [(float(_errors(scene, replace(look, hat=hat), [at], where)[0]), hat) for hat in HATS]
    error, hat = min(hats)
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
        rivals = [o for o in options if o != getattr(fit.look, name)]
        drawn = [draw(scene, replace(fit.look, **{name: rival}), [fit.at], where)[:, 0] for rival in rivals]
        sure = all(_explains(observed, best, other) for other in drawn)
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
    ours = np.abs(observed - best).mean(axis=0)[where].mean()
    theirs = np.abs(observed - rival).mean(axis=0)[where].mean()
    return bool(ours < SURE * theirs)
