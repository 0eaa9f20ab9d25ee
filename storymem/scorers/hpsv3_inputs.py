"""What HPSv3 is shown: the published text around the prompt, and pictures of about 256 visual tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLImageProcessor

REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
# Tokens that mean something by their place or number: in a user's prompt they would break the input's format.
_RESERVED = (REWARD_TOKEN, IMAGE_TOKEN, "<|video_pad|>")

PIXELS = 256 * 28 * 28  # the size pictures are brought to, up to rounding
_SELECTOR_MIN_PIXELS = 48 * 28 * 28  # the published selector enlarges smaller frames only


def assemble_prompt(prompt: str, visual_tokens: int = 1) -> str:
    """The full text around ``prompt``, in the published template.

    Args:
        prompt: the user's; image and reward tokens written in it are removed.
        visual_tokens: how many image placeholders stand for the picture.
    """
    while any(token in prompt for token in _RESERVED):  # removing one may join the halves of another
        for token in _RESERVED:
            prompt = prompt.replace(token, "")
    template = _template()
    prefix = template["chat_prefix"].replace(IMAGE_TOKEN, IMAGE_TOKEN * visual_tokens)
    instruction = template["instruction"].replace(template["instruction_placeholder"], prompt)
    return prefix + instruction + template["suffix"] + template["chat_suffix"]


@cache
def _template() -> dict[str, str]:
    path = Path(__file__).parent / "data" / "hpsv3_prompt.json"
    return json.loads(path.read_text(encoding="utf-8"))


def resized_size(
    height: int, width: int, *, factor: int = 28, min_pixels: int = PIXELS, max_pixels: int = PIXELS
) -> tuple[int, int]:
    """Height and width as multiples of ``factor`` within the bounds on their product.

    Both sides are rounded to multiples; if their product is out of bounds, the original sides are scaled to
    the bound and rounded down (too large) or up (too small). Rounding up may exceed the bound, so the rule is
    not idempotent: 480x832 becomes 336x588, and that 364x616.

    Raises:
        ValueError: if one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"HPSv3 takes pictures up to an aspect ratio of 200; got {height}x{width}")
    rounded = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded[0], rounded[1]


def selector_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to which the published keyframe selector reduces frames before it scores them."""
    return resized_size(height, width, min_pixels=_SELECTOR_MIN_PIXELS)


def reduce_as_selector(pixels: Tensor) -> Tensor:
    """Frames reduced as the published keyframe selector does: bilinear with antialias.

    Args:
        pixels: uint8 [N, 3, H, W] on the CPU.

    Returns:
        uint8 [N, 3, h, w] of `selector_size`.
    """
    return F.interpolate(pixels, size=selector_size(*pixels.shape[-2:]), mode="bilinear", antialias=True)


class PixelPatcher:
    """Pictures to rows of patch pixels, as Qwen2-VL's vision tower takes them.

    Args:
        patch: side of a patch in pixels.
        merge: patches per side that the tower merges into one visual token.
        temporal_patch: how often the one picture is repeated in time.
        pixels: the number of pixels pictures are brought to, up to rounding.
    """

    def __init__(self, *, patch: int = 14, merge: int = 2, temporal_patch: int = 2, pixels: int = PIXELS) -> None:
        self.factor, self.merge, self.pixels = patch * merge, merge, pixels
        self._processor = Qwen2VLImageProcessor(
            do_resize=False, patch_size=patch, merge_size=merge, temporal_patch_size=temporal_patch
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture after resizing."""
        return resized_size(height, width, factor=self.factor, min_pixels=self.pixels, max_pixels=self.pixels)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Resize (Pillow's bicubic, antialiased), normalise and cut into patches.

        Args:
            pictures: uint8 [N, 3, H, W] on the CPU, N > 0.

        Returns:
            float32 [patches of all pictures, 3 * temporal_patch * patch * patch] and the patch grid [N, 3] of
            each.
        """
        height, width = self.size(*pictures.shape[-2:])
        resized = [
            np.array(Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling.BICUBIC))
            for picture in pictures.permute(0, 2, 3, 1).contiguous()
        ]
        patches = self._processor(
            images=list(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)), return_tensors="pt"
        )
        return patches["pixel_values"], patches["image_grid_thw"]


def visual_tokens(grid: Sequence[int], merge: int) -> int:
    """How many tokens stand for a picture of patch grid (time, height, width)."""
    time, height, width = grid
    return time * height * width // merge**2
