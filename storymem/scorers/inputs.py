"""The one check of what enters a scorer: a picture in a wrong range or axes order gets a plausible score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_frames(frames: Tensor) -> Tensor:
    """Return ``frames`` as float32 [N, 3, H, W] in 0..1 on the device they came from; N may be 0.

    Raises:
        ValueError: for another number or order of axes, another type, or values outside 0..1.
    """
    return _check_pictures(frames, what="frames", axes="[N, 3, H, W]", channels_first="permute(0, 3, 1, 2)")


def check_clips(clips: Tensor) -> Tensor:
    """Return ``clips`` as float32 [B, T, 3, H, W] in 0..1 on the device they came from; B may be 0, not T.

    Raises:
        ValueError: as `check_frames`, and for clips without frames.
    """
    clips = _check_pictures(clips, what="clips", axes="[B, T, 3, H, W]", channels_first="permute(0, 1, 4, 2, 3)")
    if clips.shape[1] == 0:
        raise ValueError(f"clips have no frames: shape {list(clips.shape)}; write at least one frame a clip")
    return clips


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return ``texts`` as a list of strings; may be empty.

    Raises:
        ValueError: for a bare string (its letters would be scored) and for anything that is not a string.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings; write [{texts!r}]")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}] is {type(text).__name__}, not a string")
    return list(texts)


def check_prompts(prompts: Sequence[str] | None, count: int) -> list[str]:
    """Return one prompt for each of ``count`` frames; ``None`` stands for empty prompts.

    Raises:
        ValueError: as `check_texts`, and if there are not as many prompts as frames.
    """
    if prompts is None:
        return [""] * count
    checked = check_texts(prompts)
    if len(checked) != count:
        raise ValueError(f"there are {len(checked)} prompts for {count} frames; write one prompt a frame")
    return checked


def _check_pictures(pictures: Tensor, *, what: str, axes: str, channels_first: str) -> Tensor:
    if not isinstance(pictures, Tensor):
        raise ValueError(
            f"{what} must be a torch tensor {axes}, float in 0..1; got {type(pictures).__name__}"
            " (for uint8 numpy frames [N, H, W, 3]: torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)"
        )
    shape = list(pictures.shape)
    if pictures.ndim != axes.count(",") + 1:
        raise ValueError(f"{what} must have the axes {axes}; got shape {shape}")
    if shape[-3] != 3:
        hint = f"; the channels seem to be last: write {what}.{channels_first}" if shape[-1] == 3 else ""
        raise ValueError(f"{what} must have the axes {axes} with 3 RGB channels; got shape {shape}{hint}")
    if not pictures.is_floating_point():
        raise ValueError(f"{what} must be floating point in 0..1; got {pictures.dtype}: write {what}.float() / 255")
    if shape[-1] == 0 or shape[-2] == 0:
        raise ValueError(f"{what} have no pixels: shape {shape}")
    if pictures.numel() > 0:
        _check_range(pictures, what)
    return pictures.float()


def _check_range(pictures: Tensor, what: str) -> None:
    low, high = (bound.item() for bound in torch.aminmax(pictures))
    if low >= 0.0 and high <= 1.0:
        return
    if high > 2.0:
        hint = f"they are probably 0..255: write {what} / 255"
    elif low < -0.5:
        hint = f"they are probably -1..1: write ({what} + 1) / 2"
    else:
        hint = f"write {what}.clamp(0, 1), after looking for NaN"
    raise ValueError(f"{what} must lie in 0..1; got values from {low:g} to {high:g}; {hint}")
