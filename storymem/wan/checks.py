"""What a call of the memory-to-video pipeline may ask; all raise ``ValueError`` before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from storymem.wan.acceleration import check_shared_states
from storymem.wan.conditioning import MOTION_FRAMES
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
    """Raise for missing experts, and for a size, a length or given frames that cannot be."""
    ratio, experts = pipe.config.boundary_ratio, pipe.experts
    needed = {"transformer": ratio is None or ratio < 1, "transformer_2": ratio is not None and ratio > 0}
    if absent := [name for name, used in needed.items() if used and name not in experts]:
        raise ValueError(f"the pipeline has no {' and no '.join(absent)}: load both experts to make shots")
    for expert in experts.values():  # one may have been put there since the pipeline was made
        enable_layouts(expert)
    pipe.spec.latent_size(height, width)
    if num_frames < 1:
        raise ValueError(f"a shot has 4n + 1 frames, not {num_frames}")
    longest = min(expert.rope.max_seq_len for expert in pipe.experts.values())
    if pipe.spec.latent_frames(num_frames) > longest:
        raise ValueError(f"a shot has {pipe.spec.temporal_stride * (longest - 1) + 1} frames at most, not {num_frames}")
    if first_frame is not None and motion_frames is not None:
        raise ValueError("first_frame (MI2V) and motion_frames (MM2V) exclude each other: give one of them")
    given = {} if first_frame is None else {"first_frame": first_frame}
    if motion_frames is not None:
        if len(motion_frames) != MOTION_FRAMES:
            raise ValueError(f"motion_frames must be exactly {MOTION_FRAMES} pictures, not {len(motion_frames)}")
        given = {f"motion_frames[{number}]": frame for number, frame in enumerate(motion_frames)}
    if len(given) >= num_frames:
        raise ValueError(f"a shot of {num_frames} frames has no room after {len(given)} given frames")
    for name, picture in given.items():
        if not (pipe.spec.mask_channels or pipe.spec.clean_frames):
            raise ValueError(f"{name}: {pipe.spec.name} makes shots from text alone")
        _check_picture(name, picture, height, width)
    if output_type not in ("latent", "np", "pt", "pil"):
        raise ValueError(f"output_type must be latent, np, pt or pil, not {output_type!r}")


def check_memory(pipe: Any, memory: Memory | None, height: int, width: int, stride: int) -> None:
    """Raise for keyframes of another kind or size, or too many."""
    if memory is not None and not isinstance(memory, Sequence | Tensor):
        raise ValueError(f"memory must be a list of PIL images or of latents, not one {type(memory).__name__}")
    frames = [] if memory is None else list(memory)
    if frames and not pipe.spec.layouts:
        raise ValueError(f"{pipe.spec.name} makes shots from text alone: it knows no memory")
    expected = [pipe.spec.latent_channels, 1, *pipe.spec.latent_size(height, width)]
    for number, frame in enumerate(frames):
        if not isinstance(frame, Tensor):
            _check_picture(f"memory[{number}]", frame, height, width)
        elif list(frame.shape) != expected:
            raise ValueError(f"memory[{number}] must be latents of shape {expected}, not {list(frame.shape)}")
    if len({isinstance(frame, Tensor) for frame in frames}) > 1:
        raise ValueError("memory must be all pictures or all latents, not a mixture")
    for expert in pipe.experts.values():
        expert.rope.check_positions(memory_positions(len(frames), stride))


def check_sampling(pipe: Any, steps: int, *guidance: float | None) -> None:
    """Raise for steps or guidance beyond sense."""
    most = pipe.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps must be 1 to {most}, not {steps}")
    if not all(scale is None or math.isfinite(scale) for scale in guidance):
        raise ValueError(f"guidance_scale and guidance_scale_2 must be finite numbers, not {guidance}")
    first, second = guidance
    if first is not None and second is not None and first <= 1 < second:
        raise ValueError("guidance_scale_2 needs guidance_scale above 1: without it no negative prompt is run at all")


def check_guidance(pipe: Any, scale: float, negative_sees_memory: bool, memory: Memory | None) -> None:
    """Raise for passes of guidance that cannot differ as asked, or are not both run."""
    differ = not negative_sees_memory and memory is not None and len(memory) > 0
    check_shared_states(pipe.experts.values(), guided=scale > 1, passes_differ=differ)
    if scale <= 1 and pipe.guidance_halves is not None:
        raise ValueError("with guidance_parallel both passes of guidance must run: guidance_scale must be above 1")
    if negative_sees_memory:
        return
    refused = "negative_sees_memory=False"
    if scale <= 1:
        raise ValueError(f"{refused} needs guidance: guidance_scale must be above 1")
    if pipe.guidance_batch:
        raise ValueError(f"{refused}: guidance_batch runs both passes as one batch, of one memory")
    if pipe.config.memory_attention == "joint" and pipe.guidance_halves is not None:
        raise ValueError(f"{refused}: in joint it needs both passes in one process, not guidance_parallel")


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


def _check_picture(name: str, picture: Any, height: int, width: int) -> None:
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{name} must be a PIL image, not {type(picture).__name__}")
    if picture.size != (width, height):
        raise ValueError(
            f"{name} is {picture.size[0]}x{picture.size[1]} pixels; resize it to the shot's {width}x{height} first"
        )
