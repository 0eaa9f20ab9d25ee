"""Small drawn videos for tests of data preparation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storymem.data.settings import Bucket, DataSettings
from storymem.media.video import write_video

HEIGHT, WIDTH, FRAMES, FPS = 32, 48, 9, 8
DATA = DataSettings(buckets=(Bucket(frames=FRAMES, height=HEIGHT, width=WIDTH),), fps=FPS)


def scene(seed: int, frames: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A pattern of large tiles that moves to the right: uint8 [frames, height, width, 3]."""
    tiles = np.random.default_rng(seed).integers(30, 226, (height // 16, width // 16, 3))
    image = tiles.repeat(16, 0).repeat(16, 1)
    return np.stack([np.roll(image, 2 * number, axis=1) for number in range(frames)]).astype(np.uint8)


def counted(frames: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Plain frames of which :func:`number_of` gives the number, modulo 40."""
    levels = 20 + 5 * (np.arange(frames) % 40)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """Which frame of :func:`counted` this is."""
    return round((float(frame.mean()) - 20) / 5)


def video(path: Path, frames: np.ndarray, *, fps: float = FPS, caption: str | None = None) -> Path:
    """Write frames, and a caption beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path
