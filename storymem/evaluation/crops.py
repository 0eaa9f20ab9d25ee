"""Boxes and what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.functional import resize

from storymem.scorers.scorer import as_images

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

_MARGIN = 0.1  # of a box's width and height, added on each side
_SAME_BOX = 0.8  # intersection over union from which two queries have found one thing
_SIDE = 224  # of crops, in pixels


def distinct_boxes(found: Tensor, size: tuple[int, ...]) -> list[Box]:
    """Boxes [K, 5] with scores -> whole pixels with a margin, inside an image of ``size`` (H, W), without doubles."""
    boxes = found[nms(found[:, :4], found[:, 4], _SAME_BOX)] if len(found) else found
    height, width = size
    results = []
    for left, top, right, bottom, _ in boxes.double().tolist():
        across, down = _MARGIN * (right - left), _MARGIN * (bottom - top)
        box = max(0, round(left - across)), max(0, round(top - down)), round(right + across), round(bottom + down)
        box = box[0], box[1], min(width, box[2]), min(height, box[3])
        if box[2] - box[0] > 1 and box[3] - box[1] > 1:
            results.append(box)
    return results


def crop_boxes(frame: np.ndarray, boxes: Sequence[Box]) -> Tensor:
    """Crops [K, 3, 224, 224] in 0..1 of a frame uint8 [H, W, 3]; K may be 0."""
    crops = [resize(as_images(frame[top:bottom, left:right]), [_SIDE, _SIDE]) for left, top, right, bottom in boxes]
    return torch.stack(crops).clamp(0, 1) if crops else torch.empty(0, 3, _SIDE, _SIDE)


def sharpness(crop: np.ndarray) -> float:
    """Variance of the second differences, x plus y, of the grey crop in 0..255; 0 below three pixels."""
    grey = crop.astype(np.float64) @ (0.299, 0.587, 0.114)
    if min(grey.shape) < 3:
        return 0.0
    across, down = np.diff(grey, 2, axis=1)[1:-1], np.diff(grey, 2, axis=0)[:, 1:-1]
    return float((across + down).var())


def erased(frame: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """The frame with each box filled in: each row runs evenly from the pixel left of the box to the one right of it."""
    filled = frame.copy()
    for left, top, right, bottom in boxes:
        inner = filled[top:bottom]
        ends = [inner[:, x] for x in (left - 1, right) if 0 <= x < frame.shape[1]] or [np.full_like(inner[:, 0], 127)]
        share = np.linspace(0, 1, right - left)[None, :, None]
        filled[top:bottom, left:right] = (ends[0][:, None] * (1 - share) + ends[-1][:, None] * share).round()
    return filled
