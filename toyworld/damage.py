"""Ways in which frames go wrong: blurred, noisy, torn, half faded; the quality head learns to tell them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Picture = npt.NDArray[np.floating[Any]]

DAMAGES = ("blurred", "noisy", "torn", "faded")


def damage(rng: np.random.Generator, frame: Frame, kind: str) -> Frame:
    """A damaged copy of a frame uint8 [H, W, 3], between clearly and badly."""
    picture: Picture = frame.astype(np.float32)
    if kind == "blurred":
        picture = blur(picture, float(rng.uniform(1.2, 3.0)))
    elif kind == "noisy":
        picture = picture + rng.normal(0, float(rng.uniform(18, 60)), picture.shape)
    elif kind == "torn":
        picture = tear(rng, picture)
    elif kind == "faded":
        picture = fade(rng, picture)
    else:
        raise ValueError(f"unknown damage {kind!r}: choose one of {', '.join(DAMAGES)}")
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def blur(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur with mirrored edges; sigma in pixels."""
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(reach, reach) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(picture, pad, mode="reflect")
        length = picture.shape[axis]
        picture = sum(tap * np.take(padded, range(i, i + length), axis=axis) for i, tap in enumerate(taps))
    return picture


def tear(rng: np.random.Generator, picture: Picture) -> Picture:
    """Bands of rows pushed sideways."""
    torn = picture.copy()
    edges = np.sort(rng.choice(np.arange(6, len(picture) - 6), size=int(rng.integers(2, 5)), replace=False))
    for top, bottom in itertools.pairwise(edges):
        shift = int(rng.integers(6, 30)) * int(rng.choice([-1, 1]))
        torn[top:bottom] = np.roll(picture[top:bottom], shift, axis=1)
    return torn


def fade(rng: np.random.Generator, picture: Picture) -> Picture:
    """One half of the picture faded towards grey, as in a cross-fade that was cut short."""
    height, width = picture.shape[:2]
    across = bool(rng.random() < 0.5)
    length = width if across else height
    ramp = np.clip((np.arange(length) - length * rng.uniform(0.3, 0.6)) / (0.15 * length) + 0.5, 0, 1)
    ramp = ramp[::-1] if rng.random() < 0.5 else ramp
    share = (ramp[None, :] if across else ramp[:, None])[..., None] * rng.uniform(0.6, 0.95)
    return picture + (rng.uniform(100, 200) - picture) * share.astype(np.float32)
