"""Ways in which frames go wrong: blurred, noisy, torn, half faded; the quality head learns to detect them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Frame = npt.NDArray[np.uint8]
Image = npt.NDArray[np.floating[Any]]

DAMAGES = ("blurred", "noisy", "torn", "faded")


def damage(rng: np.random.Generator, frame: Frame, kind: str) -> Frame:
    """A damaged copy of a frame uint8 [H, W, 3], between clearly and badly."""
    image: Image = frame.astype(np.float32)
    if kind == "blurred":
        image = blur(image, float(rng.uniform(1.2, 3.0)))
    elif kind == "noisy":
        image = image + rng.normal(0, float(rng.uniform(18, 60)), image.shape)
    elif kind == "torn":
        image = tear(rng, image)
    elif kind == "faded":
        image = fade(rng, image)
    else:
        raise ValueError(f"unknown damage {kind!r}: choose one of {', '.join(DAMAGES)}")
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def blur(image: Image, sigma: float) -> Image:
    """Gaussian blur with mirrored edges; sigma in pixels."""
    return gaussian_filter(image, (sigma, sigma, 0), mode="mirror", truncate=3.0)


def tear(rng: np.random.Generator, image: Image) -> Image:
    """Bands of rows pushed sideways."""
    torn = image.copy()
    edges = np.sort(rng.choice(np.arange(6, len(image) - 6), size=int(rng.integers(2, 5)), replace=False))
    for top, bottom in itertools.pairwise(edges):
        shift = int(rng.integers(6, 30)) * int(rng.choice([-1, 1]))
        torn[top:bottom] = np.roll(image[top:bottom], shift, axis=1)
    return torn


def fade(rng: np.random.Generator, image: Image) -> Image:
    """One half of the image faded towards grey, as in a cross-fade that was cut short."""
    height, width = image.shape[:2]
    across = bool(rng.random() < 0.5)
    length = width if across else height
    ramp = np.clip((np.arange(length) - length * rng.uniform(0.3, 0.6)) / (0.15 * length) + 0.5, 0, 1)
    ramp = ramp[::-1] if rng.random() < 0.5 else ramp
    share = (ramp[None, :] if across else ramp[:, None])[..., None] * rng.uniform(0.6, 0.95)
    return image + (rng.uniform(100, 200) - image) * share.astype(np.float32)
