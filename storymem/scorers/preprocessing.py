"""The published ways from a picture in 0..1 to the pixels a CLIP-like network sees, as operations on tensors.

All take float32 [N, 3, H, W] in 0..1 on any device and the network's input size (height, width), and return
float32 [N, 3, height, width] before mean and std. They differ in ways that move scores, so they are named and
chosen, never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
CLIP_STD: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Preprocessing = Callable[[Tensor, tuple[int, int]], Tensor]


def squash(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to exactly ``size`` without antialias, nothing cropped (the published selector)."""
    return F.interpolate(frames, size=size, mode="bilinear", align_corners=False)


def squash_in_bytes(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """`squash`, then rounded to 1/255 as an 8-bit image library does (InternVid's training)."""
    return to_bytes(squash(to_bytes(frames), size) / 255.0) / 255.0


def crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """VBench's transform for its aesthetic score: bicubic of the short side without antialias, the centre cut out.

    VBench gives it float tensors, so values overshoot 0..1 at edges and are not clamped. The long side is truncated to
    an integer and the crop's offset is rounded half to even, as torchvision does.
    """
    return _crop(frames, size) / 255.0


def crop_in_bytes(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """VBench's transform for ViCLIP: `crop` of 8-bit frames, clamped and rounded to 0..255 as torchvision does."""
    return _crop(frames, size).clamp(0, 255).round() / 255.0


def _crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """See `crop`; 0..255, float, neither clamped nor rounded."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    target = (int(size[0] * height / short), int(size[1] * width / short))
    pixels = to_bytes(frames)
    if target != (height, width):
        pixels = F.interpolate(pixels, size=target, mode="bicubic", align_corners=False)
    top, left = round((target[0] - size[0]) / 2), round((target[1] - size[1]) / 2)
    return pixels[..., top : top + size[0], left : left + size[1]]


def to_bytes(frames: Tensor) -> Tensor:
    """Pictures in 0..1 as whole numbers 0..255, still float: exact for what was uint8 before."""
    return (frames * 255.0).round()


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract ``mean`` and divide by ``std``, channel by channel."""
    shift, scale = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    return (frames - shift) / scale


CLIP_PREPROCESSINGS: dict[str, Preprocessing] = {
    "published_selector": squash,
    "published_aesthetic": crop,
}
