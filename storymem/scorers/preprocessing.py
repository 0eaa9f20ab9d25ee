"""The published ways from an image in 0..1 to the pixels that a CLIP-like network takes, before mean and std.

All take float32 [N, 3, H, W] in 0..1 on any device and the side of the network's square input, and return float32
[N, 3, side, side]. They differ in ways that move scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

CLIP_MEAN: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN
CLIP_STD: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def squash(frames: Tensor, side: int) -> Tensor:
    """Bilinear to the square without antialias, nothing cropped (the published selector)."""
    return tv.resize(frames, [side, side], InterpolationMode.BILINEAR, antialias=False)


def crop(frames: Tensor, side: int) -> Tensor:
    """Bicubic of the short side without antialias, then the centre (VBench's aesthetic score).

    VBench resizes float tensors here, so values overshoot 0..1 at edges and are not clamped.
    """
    return _crop(to_bytes(frames).float(), side) / 255.0


def crop_in_bytes(frames: Tensor, side: int) -> Tensor:
    """`crop` of 8-bit frames, which torchvision clamps and rounds (VBench's ViCLIP scores)."""
    return _crop(to_bytes(frames), side) / 255.0


def _crop(pixels: Tensor, side: int) -> Tensor:
    return tv.center_crop(tv.resize(pixels, [side], InterpolationMode.BICUBIC, antialias=False), [side, side])


def to_bytes(frames: Tensor) -> Tensor:
    """Images in 0..1 as uint8: exact for what was uint8 before."""
    return (frames * 255.0).round().to(torch.uint8)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract ``mean`` and divide by ``std``, channel by channel (torchvision's waits for the accelerator here)."""
    shift, scale = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    return (frames - shift) / scale
