"""The people of the toy world: round, square, tall or pointed, with feet, eyes and perhaps a hat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.attributes import HEIGHT, WIDTH, Look
from toyworld.draw import Array, Colour, box, coverage, disc, ellipse, mix, paint, rgb, tint, wedge
from toyworld.places import BASE, LIGHTS, ZOOM

Window = tuple[slice, slice]  # rows and columns of the image
WHOLE = (slice(0, HEIGHT), slice(0, WIDTH))

BODY = 10.0  # half the height of a round body, in world units

BODY_RGB = {
    "red": rgb(226, 52, 48),
    "orange": rgb(246, 146, 36),
    "yellow": rgb(252, 224, 70),
    "green": rgb(58, 176, 82),
    "blue": rgb(46, 112, 230),
    "purple": rgb(142, 76, 208),
    "pink": rgb(252, 160, 204),
}

TOP = {"round": 0.97, "square": 0.84, "tall": 1.18, "pointed": 1.02}  # where a hat sits
EYES_AT = {"round": 0.2, "square": 0.16, "tall": 0.42, "pointed": -0.12}
HAT_WIDTH = {"round": 1.0, "square": 1.0, "tall": 0.92, "pointed": 0.82}


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where a character is and what its body does, one value a frame (float32 arrays [F]).

    x, lift: world units from the middle of the place and above the ground; size: 1 is full size; facing: -1 looks
    left, 1 looks right; roll: radians, clockwise; stride: -1..1, how far the feet are apart.
    """

    x: Array
    lift: Array
    size: Array
    facing: Array
    roll: Array
    stride: Array


def body_distance(shape: str, u: Array, v: Array) -> Array:
    """Signed distance to a body in units of half its height; its soles are at v = -1."""
    if shape == "round":
        return disc(u, v, 1.0)
    if shape == "square":
        return box(u, v + 0.06, 0.92, 0.92, 0.24)
    if shape == "tall":
        return box(u, v - 0.1, 0.64, 1.1, 0.6)
    return wedge(u, v + 0.82, 0.92, 1.92) - 0.18


def _hat(shape: str, hat: str, u: Array, v: Array) -> list[tuple[Colour, Array]]:
    """The painted parts of a hat, from back to front: colour and signed distance."""
    v = v - TOP[shape]
    w = HAT_WIDTH[shape]
    if hat == "party hat":
        cone = wedge(u, v + 0.12, 0.5 * w, 0.95)
        return [(rgb(240, 74, 160), cone), (rgb(255, 246, 200), disc(u, v - 0.8, 0.17))]
    if hat == "top hat":
        brim, crown = box(u, v, 0.78 * w, 0.1, 0.06), box(u, v - 0.36, 0.46 * w, 0.4, 0.06)
        return [(rgb(66, 58, 88), np.minimum(brim, crown)), (rgb(230, 70, 70), box(u, v - 0.18, 0.46 * w, 0.11))]
    if hat == "crown":
        band = box(u, v - 0.1, 0.6 * w, 0.2)
        points = [wedge(u - dx * w, v - 0.24, 0.22 * w, 0.42) for dx in (-0.4, 0.0, 0.4)]
        return [(rgb(255, 206, 40), np.minimum.reduce([band, *points])), (rgb(220, 60, 90), disc(u, v - 0.12, 0.11))]
    if hat == "beanie":
        dome = np.maximum(ellipse(u, v + 0.16, 0.78 * w, 0.66), -v - 0.16)
        return [
            (rgb(40, 190, 190), dome),
            (rgb(246, 246, 240), box(u, v + 0.08, 0.82 * w, 0.13, 0.1)),
            (rgb(246, 246, 240), disc(u, v - 0.54, 0.19)),
        ]
    return []


def _eyes(shape: str, eyes: str, u: Array, v: Array, facing: Array) -> list[tuple[Colour, Array]]:
    """The painted parts of the eyes: they slide towards where the character looks."""
    white, black = rgb(255, 255, 255), rgb(26, 22, 34)
    narrow = 0.75 if shape in ("tall", "pointed") else 1.0
    u = u - facing * np.float32(0.24 * narrow)
    v = v - EYES_AT[shape]
    look = facing * np.float32(0.1)
    if eyes == "dots":
        return [(black, disc(np.abs(u) - 0.26 * narrow, v, 0.15))]
    if eyes == "big eyes":
        pair = np.minimum(disc(u - 0.3 * narrow, v, 0.29), disc(u + 0.3 * narrow, v, 0.29))
        pupils = np.minimum(disc(u - 0.3 * narrow - look, v, 0.14), disc(u + 0.3 * narrow - look, v, 0.14))
        return [(white, pair), (black, pupils)]
    if eyes == "one eye":
        return [(white, disc(u, v, 0.42)), (black, disc(u - 1.4 * look, v, 0.2))]
    band = box(u, v + 0.02, 0.62 * narrow, 0.2, 0.16)
    glint = box(np.abs(u) - 0.3 * narrow, v - 0.05, 0.1, 0.04)
    return [(black, band), (rgb(120, 130, 160), glint)]


def _window(framing: str, pose: Pose, camera: Array) -> Window:
    """Rows and columns that hold the character in every frame (shadow and hat included)."""
    zoom, base = ZOOM[framing], BASE[framing]
    middle = WIDTH / 2 + (pose.x - camera) * zoom
    reach = 2.1 * BODY * zoom * float(pose.size.max())
    left, right = int(np.floor(middle.min() - reach)), int(np.ceil(middle.max() + reach))
    top = int(np.floor(base - (3.3 * BODY * float(pose.size.max()) + float(pose.lift.max())) * zoom))
    bottom = int(np.ceil(base + 0.5 * BODY * zoom))
    return slice(max(top, 0), min(bottom, HEIGHT)), slice(max(left, 0), min(right, WIDTH))


def paint_shadow(canvas: Array, framing: str, pose: Pose, camera: Array) -> None:
    """A soft dark ellipse on the ground, smaller as the character rises."""
    zoom, base = ZOOM[framing], BASE[framing]
    rows, columns = _window(framing, pose, camera)
    x, y = _pixels(rows, columns)
    middle, lift, size = ((a.reshape(-1, 1, 1)) for a in (WIDTH / 2 + (pose.x - camera) * zoom, pose.lift, pose.size))
    wide = (BODY * zoom) * size * np.clip(1 - lift / 24, 0.4, 1)
    distance = ellipse(x - middle, y - base, wide.astype(np.float32), (0.26 * wide).astype(np.float32))
    paint(canvas[:, :, rows, columns], (0.06, 0.05, 0.12), 0.35 * coverage(distance, 3.0))


def _pixels(rows: slice, columns: slice) -> tuple[Array, Array]:
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5).reshape(1, 1, -1)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5).reshape(1, -1, 1)
    return x, y


def paint_character(
    canvas: Array, framing: str, time: str, look: Look, pose: Pose, camera: Array, crop: Window = WHOLE
) -> None:
    """One character over the canvas [3, F, h, w], in place; the canvas is the part `crop` of the image."""
    rows, columns = _window(framing, pose, camera)
    rows = slice(max(rows.start, crop[0].start), min(rows.stop, crop[0].stop))
    columns = slice(max(columns.start, crop[1].start), min(columns.stop, crop[1].stop))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    zoom, base, light = ZOOM[framing], BASE[framing], LIGHTS[time].people
    x, y = _pixels(rows, columns)
    unit = (pose.size * (BODY * zoom)).astype(np.float32).reshape(-1, 1, 1)  # pixels to one body unit
    middle = (WIDTH / 2 + (pose.x - camera) * zoom).astype(np.float32).reshape(-1, 1, 1)
    centre = (base - pose.lift * zoom).astype(np.float32).reshape(-1, 1, 1) - unit
    across, up = (x - middle) / unit, (centre - y) / unit
    cos, sin = (f(pose.roll).astype(np.float32).reshape(-1, 1, 1) for f in (np.cos, np.sin))
    u, v = cos * across - sin * up, sin * across + cos * up
    facing = pose.facing.astype(np.float32).reshape(-1, 1, 1)
    top, left = crop[0].start, crop[1].start
    patch = canvas[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    colour = BODY_RGB[look.colour]
    dark = mix(colour, (0.08, 0.04, 0.12), 0.55)
    step = pose.stride.astype(np.float32).reshape(-1, 1, 1)
    for side in (-1, 1):
        foot = ellipse(u - side * (0.42 + 0.2 * step), v + 0.96, 0.3, 0.16)
        paint(patch, tint(dark, light), coverage(foot * unit))
    body = body_distance(look.shape, u, v)
    paint(patch, tint(dark, light), coverage((body - 0.07) * unit))
    paint(patch, _shaded(tint(colour, light), v), coverage((body + 0.05) * unit))
    for part, distance in _eyes(look.shape, look.eyes, u, v, facing) + _hat(look.shape, look.hat, u, v):
        paint(patch, tint(part, light), coverage(distance * unit))


def _shaded(colour: Colour, v: Array) -> Array:
    """A body colour a little lighter above and darker below."""
    shade = np.clip(np.float32(0.98) + np.float32(0.12) * v, 0, 1.1)
    return np.stack([np.clip(np.float32(part) * shade, 0, 1) for part in colour])
