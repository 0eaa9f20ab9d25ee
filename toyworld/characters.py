"""The characters of the toy world: round, square, tall or pointed, with feet, eyes and perhaps a hat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.attributes import HEIGHT, WIDTH, Look
from toyworld.draw import Array, Colour, box, coverage, disc, ellipse, mix, paint, rgb, tint, wedge
from toyworld.places import BASE, LIGHTS

Window = tuple[slice, slice]  # rows and columns of the image
WHOLE = (slice(0, HEIGHT), slice(0, WIDTH))

UNIT = {"medium": 14.0, "close": 18.5}  # pixels to half the height of a round body

BODY_RGB = {
    "red": rgb(226, 52, 48),
    "orange": rgb(246, 146, 36),
    "yellow": rgb(252, 224, 70),
    "green": rgb(58, 176, 82),
    "blue": rgb(46, 112, 230),
    "purple": rgb(142, 76, 208),
    "pink": rgb(252, 160, 204),
}

TOP = {"round": 0.93, "square": 0.72, "tall": 1.16, "pointed": 0.86}  # where a hat sits
# Of the names' three groups, so that a name tells which of the characters in memory is meant; None: dark.
SHOES: tuple[Colour | None, ...] = (None, rgb(250, 250, 246), rgb(30, 214, 214))
EYES_AT = {"round": 0.2, "square": 0.1, "tall": 0.5, "pointed": -0.22}
NARROW = {"round": 1.0, "square": 1.1, "tall": 0.72, "pointed": 0.78}  # how wide the face is


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where a character is and what its body does, one value a frame (float32 arrays [F]).

    x, lift: pixels to the right of the image's middle and above the ground; facing: -1 looks left, 1 looks right;
    stride: -1..1, how far the feet are apart.
    """

    x: Array
    lift: Array
    facing: Array
    stride: Array


def body_distance(shape: str, u: Array, v: Array) -> Array:
    """Signed distance to a body in units of half a round body's height; its soles are at v = -1."""
    if shape == "round":
        return disc(u, v, 1.0)
    if shape == "square":
        return box(u, v + 0.12, 1.06, 0.86, 0.14)
    if shape == "tall":
        return box(u, v - 0.12, 0.6, 1.12, 0.58)
    return wedge(u, v + 0.86, 1.0, 2.0) - 0.14


def _hat(shape: str, hat: str, u: Array, v: Array) -> list[tuple[Colour, Array]]:
    """The painted parts of a hat, from back to front: colour and signed distance."""
    v = v - TOP[shape]
    if hat == "party hat":
        cone = wedge(u, v + 0.14, 0.56, 1.0)
        return [(rgb(240, 74, 160), cone), (rgb(255, 246, 200), disc(u, v - 0.78, 0.2))]
    if hat == "top hat":
        brim, crown = box(u, v, 0.92, 0.13, 0.06), box(u, v - 0.4, 0.54, 0.44, 0.06)
        return [(rgb(84, 72, 128), np.minimum(brim, crown)), (rgb(230, 70, 70), box(u, v - 0.22, 0.54, 0.12))]
    if hat == "crown":
        band = box(u, v - 0.1, 0.66, 0.24)
        points = [wedge(u - dx, v - 0.28, 0.24, 0.46) for dx in (-0.43, 0.0, 0.43)]
        return [(rgb(255, 206, 40), np.minimum.reduce([band, *points])), (rgb(220, 60, 90), disc(u, v - 0.12, 0.15))]
    if hat == "beanie":
        dome = np.maximum(ellipse(u, v + 0.16, 0.8, 0.78), -v - 0.16)
        white = rgb(246, 246, 240)
        return [(rgb(40, 190, 190), dome), (white, box(u, v + 0.06, 0.86, 0.16, 0.1)), (white, disc(u, v - 0.64, 0.2))]
    return []


def _eyes(shape: str, eyes: str, u: Array, v: Array, facing: Array) -> list[tuple[Colour, Array]]:
    """The painted parts of the eyes: they slide towards where the character looks."""
    white, black, narrow = rgb(255, 255, 255), rgb(26, 22, 34), NARROW[shape]
    u = u - facing * np.float32(0.2 * narrow)
    v = v - EYES_AT[shape]
    look = facing * np.float32(0.1)
    if eyes == "dots":
        return [(black, disc(np.abs(u) - 0.34 * narrow, v, 0.2))]
    if eyes == "big eyes":
        apart, radius = 0.38 * narrow, 0.36 * min(1.0, 1.1 * narrow)
        pupils = np.minimum(disc(u - apart - look, v, 0.17), disc(u + apart - look, v, 0.17))
        return [(white, disc(np.abs(u) - apart, v, radius)), (black, pupils)]
    if eyes == "one eye":
        return [(white, disc(u, v, 0.5)), (black, disc(u - 1.4 * look, v, 0.24))]
    return [(black, box(u, v, 0.74 * narrow, 0.26, 0.18)), (rgb(150, 160, 190), box(u - 0.3, v - 0.06, 0.13, 0.05))]


def _window(framing: str, pose: Pose) -> Window:
    """Rows and columns that hold the character in every frame (shadow and hat included)."""
    unit = UNIT[framing]
    left, right = WIDTH / 2 + pose.x.min() - 1.7 * unit, WIDTH / 2 + pose.x.max() + 1.7 * unit
    top = BASE - 3.4 * unit - pose.lift.max()
    return (
        slice(max(int(top), 0), min(int(BASE + 0.5 * unit), HEIGHT)),
        slice(max(int(left), 0), min(int(right) + 1, WIDTH)),
    )


def _coordinates(rows: slice, columns: slice, pose: Pose) -> tuple[Array, Array]:
    """Pixels to the right of a character [F, 1, w] and above the ground [1, h, 1]."""
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - WIDTH / 2)
    y = np.float32(BASE - 0.5) - np.arange(rows.start, rows.stop, dtype=np.float32)
    return x.reshape(1, 1, -1) - pose.x.reshape(-1, 1, 1), y.reshape(1, -1, 1)


def paint_shadow(canvas: Array, framing: str, pose: Pose) -> None:
    """A soft dark ellipse on the ground, smaller as the character rises."""
    rows, columns = _window(framing, pose)
    x, y = _coordinates(rows, columns, pose)
    wide = np.float32(UNIT[framing]) * np.clip(1 - pose.lift / 30, 0.4, 1).reshape(-1, 1, 1)
    paint(canvas[:, :, rows, columns], (0.06, 0.05, 0.12), 0.35 * coverage(ellipse(x, y, wide, 0.22 * wide), 3.0))


def paint_character(
    canvas: Array,
    framing: str,
    time: str,
    look: Look,
    pose: Pose,
    *,
    shoes: Colour | None = None,
    crop: Window = WHOLE,
) -> None:
    """One character over the canvas [3, F, h, w], in place; the canvas is the part `crop` of the image."""
    rows, columns = _window(framing, pose)
    rows = slice(max(rows.start, crop[0].start), min(rows.stop, crop[0].stop))
    columns = slice(max(columns.start, crop[1].start), min(columns.stop, crop[1].stop))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    unit, light = np.float32(UNIT[framing]), LIGHTS[time].people
    x, y = _coordinates(rows, columns, pose)
    u, v = x / unit, (y - pose.lift.reshape(-1, 1, 1)) / unit - 1
    facing, step = pose.facing.reshape(-1, 1, 1), pose.stride.reshape(-1, 1, 1)
    top, left = crop[0].start, crop[1].start
    patch = canvas[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    colour = BODY_RGB[look.colour]
    dark = mix(colour, (0.08, 0.04, 0.12), 0.55)
    feet = np.minimum(*(ellipse(u - side * (0.46 + 0.16 * step), v + 0.86, 0.44, 0.26) for side in (-1, 1)))
    body = body_distance(look.shape, u, v)
    paint(patch, tint(dark, light), coverage(np.minimum(feet, body - 0.08) * unit))
    paint(patch, _shaded(tint(colour, light), v), coverage((body + 0.05) * unit))
    paint(patch, tint(dark, light), coverage(feet * unit))
    if shoes is not None:
        paint(patch, tint(shoes, light), coverage((feet + 0.06) * unit))
    for part, distance in _eyes(look.shape, look.eyes, u, v, facing) + _hat(look.shape, look.hat, u, v):
        paint(patch, tint(part, light), coverage(distance * unit))


def _shaded(colour: Colour, v: Array) -> Array:
    """A body colour a little lighter above and darker below."""
    shade = np.clip(np.float32(0.98) + np.float32(0.12) * v, 0, 1.1)
    return np.stack([np.clip(np.float32(part) * shade, 0, 1) for part in colour])
