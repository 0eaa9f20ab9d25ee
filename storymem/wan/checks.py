"""Checks of the arguments of the memory-to-video pipeline: ``ValueError`` before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from storymem.wan.conditioning import MOTION_FRAMES
from storymem.wan.runtime import check_shared_states
from storymem.wan.segments import memory_positions
from storymem.wan.transformer import enable_layouts

Memory = Sequence[Image.Image] | Sequence[Tensor] | Tensor


def check_expert(pipe: Any, name: str, expert: Any) -> None:
    """Raise for a transformer that does not fit the others or the layout of memory."""
    config, layout, spec = expert.config, pipe.config.memory_attention, pipe.spec_of(expert)
    if config.image_dim is not None:
        raise ValueError(f"{name} reads image embeddings, as Wan2.1's does: use a Wan2.2 base model")
    if spec != pipe.spec:
        raise ValueError(
            f"{name} has {config.in_channels} input channels, as {spec.name} has; the other expert belongs to "
            f"{pipe.spec.name}, with {pipe.spec.in_channels}"
        )
    if spec.layouts and layout not in spec.layouts:
        raise ValueError(f"memory_attention={layout} is not for {spec.name}: use {' or '.join(spec.layouts)}")


def check_shot(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int,
    first_frame: Image.Image | None,
    motion_frames: Sequence[Image.Image] | None,
    output_type: str | None,
) -> None:
    """Raise for missing experts, and for a size, a length or given frames that are not valid."""
    ratio, experts, spec = pipe.config.boundary_ratio, pipe.experts, pipe.spec
    needed = {"transformer": ratio is None or ratio < 1, "transformer_2": ratio is not None and ratio > 0}
    if pipe.turns is None and (absent := [name for name, used in needed.items() if used and name not in experts]):
        raise ValueError(f"the pipeline has no {' and no '.join(absent)}: load both experts to generate shots")
    for expert in experts.values():  # one may have been replaced since the pipeline was made
        enable_layouts(expert)
    spec.latent_size(height, width)
    longest = min(expert.rope.max_seq_len for expert in experts.values())
    if num_frames < 1:
        raise ValueError(f"a shot has 4n + 1 frames, not {num_frames}")
    if spec.latent_frames(num_frames) > longest:
        raise ValueError(f"a shot has {spec.temporal_stride * (longest - 1) + 1} frames at most, not {num_frames}")
    if first_frame is not None and motion_frames is not None:
        raise ValueError("first_frame (MI2V) and motion_frames (MM2V) exclude each other: give one of them")
    given = {} if first_frame is None else {"first_frame": first_frame}
    if motion_frames is not None:
        if len(motion_frames) != MOTION_FRAMES:
            raise ValueError(f"motion_frames must be exactly {MOTION_FRAMES} images, not {len(motion_frames)}")
        given = {f"motion_frames[{number}]": frame for number, frame in enumerate(motion_frames)}
    if len(given) >= num_frames:
        raise ValueError(f"a shot of {num_frames} frames has no room after {len(given)} given frames")
    for name, image in given.items():
        if not (spec.mask_channels or spec.clean_frames):
            raise ValueError(f"{name}: {spec.name} generates shots from text alone")
        _check_image(name, image, height, width)
    if output_type not in ("latent", "np", "pt", "pil"):
        raise ValueError(f"output_type must be latent, np, pt or pil, not {output_type!r}")


def check_memory(pipe: Any, memory: Memory | None, height: int, width: int, stride: int) -> None:
    """Raise for keyframes of another kind or size, or too many."""
    if memory is not None and not isinstance(memory, Sequence | Tensor):
        raise ValueError(f"memory must be a list of PIL images or of latents, not one {type(memory).__name__}")
    frames = [] if memory is None else list(memory)
    if frames and not pipe.spec.layouts:
        raise ValueError(f"{pipe.spec.name} generates shots from text alone, without memory")
    expected = [pipe.spec.latent_channels, 1, *pipe.spec.latent_size(height, width)]
    for number, frame in enumerate(frames):
        if not isinstance(frame, Tensor):
            _check_image(f"memory[{number}]", frame, height, width)
        elif list(frame.shape) != expected:
            raise ValueError(f"memory[{number}] must be latents of shape {expected}, not {list(frame.shape)}")
    if len({isinstance(frame, Tensor) for frame in frames}) > 1:
        raise ValueError("memory must be all images or all latents, not a mixture")
    for expert in pipe.experts.values():
        expert.rope.check_positions(memory_positions(len(frames), stride))


def check_sampling(
    pipe: Any,
    steps: int,
    scale: float,
    scale_low: float | None,
    negative_sees_memory: bool,
    memory: Memory | None,
) -> None:
    """Raise for steps or guidance out of range, and for passes of guidance that are not run or cannot differ."""
    most = pipe.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps must be 1 to {most}, not {steps}")
    if not all(value is None or math.isfinite(value) for value in (scale, scale_low)):
        raise ValueError(f"guidance_scale and guidance_scale_2 must be finite numbers, not {(scale, scale_low)}")
    hidden = not negative_sees_memory
    if scale > 1:
        check_shared_states(pipe.experts.values(), passes_differ=hidden and memory is not None and len(memory) > 0)
    halves, unseen = pipe.guidance_halves is not None, "negative_sees_memory=False"
    rules = {
        "guidance_scale_2 needs guidance_scale above 1: without it no negative prompt is run": (
            scale <= 1 and (scale_low or 0) > 1
        ),
        "with guidance_parallel both passes of guidance must run: guidance_scale must be above 1": (
            scale <= 1 and halves
        ),
        f"{unseen} needs guidance: guidance_scale must be above 1": hidden and scale <= 1,
        f"{unseen}: in joint it needs both passes in one process, not guidance_parallel": (
            hidden and halves and pipe.config.memory_attention == "joint"
        ),
    }
    for message, broken in rules.items():
        if broken:
            raise ValueError(message)


def noise_shape(
    pipe: Any,
    batch: int,
    memory: Memory | None,
    frames: int,
    height: int,
    width: int,
    latents: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[int, ...]:
    """[B, z, N, h, w] of the denoised frames, which ``latents`` must have."""
    joint = pipe.config.memory_attention == "joint"
    slots = (len(memory) if joint and memory is not None else 0) + pipe.spec.latent_frames(frames)
    shape = (batch, pipe.spec.latent_channels, slots, *pipe.spec.latent_size(height, width))
    if isinstance(generator, list | tuple) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one for each video")
    if latents is not None and tuple(latents.shape) != shape:
        which = " (memory slots first)" if joint else ""
        raise ValueError(f"latents must be {list(shape)}{which}, not {list(latents.shape)}")
    return shape


def _check_image(name: str, image: Any, height: int, width: int) -> None:
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} must be a PIL image, not {type(image).__name__}")
    if image.size != (width, height):
        size = f"{image.size[0]}x{image.size[1]}"
        raise ValueError(f"{name} is {size} pixels; resize it to the shot's {width}x{height} first")
