"""Soft-edged shapes on small images: signed distances in pixels, painted with an alpha ramp.

Everything is vectorised over frames: coordinates have shape [F or 1, H, W], images are planar [3, F, H, W] in 0..1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]  # float32 wherever it matters for speed
Colour = tuple[float, float, float]

EDGE = 1.5  # width in pixels over which an edge fades


def rgb(red: int, green: int, blue: int) -> Colour:
    """A colour from its 0..255 parts, as 0..1."""
    return red / 255, green / 255, blue / 255


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour `share` of the way from a to b."""
    return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def tint(colour: Colour, light: Colour) -> Colour:
    """The colour as it looks under a coloured light."""
    return tuple(min(1.0, c * k) for c, k in zip(colour, light, strict=True))  # type: ignore[return-value]


def coverage(distance: Array, edge: float = EDGE) -> Array:
    """Alpha 0..1 of a shape from its signed distance in pixels (negative inside)."""
    return np.clip(np.float32(0.5) - distance * np.float32(1 / edge), 0, 1)


def paint(canvas: Array, colour: Colour | Array, alpha: Array) -> None:
    """Lay a colour over the canvas in place; `colour` is one colour or an image [3, F or 1, h, w]."""
    if isinstance(colour, tuple):
        colour = np.asarray(colour, dtype=np.float32).reshape(3, 1, 1, 1)
    canvas += (colour - canvas) * alpha


def disc(x: Array, y: Array, radius: Array | float) -> Array:
    """Signed distance to a circle about the origin."""
    return np.sqrt(x * x + y * y) - radius


def ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Approximate signed distance to an ellipse about the origin (exact for circles)."""
    scaled = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    return (scaled - 1) * np.minimum(rx, ry)


def box(
    x: Array, y: Array, half_width: Array | float, half_height: Array | float, corner: Array | float = 0.0
) -> Array:
    """Signed distance to a rectangle about the origin with rounded corners."""
    dx = np.abs(x) - half_width + corner
    dy = np.abs(y) - half_height + corner
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def wedge(x: Array, y: Array, half_width: Array | float, height: Array | float) -> Array:
    """Signed distance (exact on the sides) to a triangle standing on y = 0 with its tip at (0, height)."""
    length = np.sqrt(np.square(height) + np.square(half_width))
    side = (np.abs(x) * height + (y - height) * half_width) / length
    return np.maximum(side, -y)


def to_frames(canvas: Array) -> npt.NDArray[np.uint8]:
    """Planar [3, F, H, W] in 0..1 to frames uint8 [F, H, W, 3]."""
    return np.ascontiguousarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 3, 0))
