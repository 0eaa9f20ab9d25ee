"""Where the networks run: device, offloading, tiling; all of it diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from storymem.wan.settings import RuntimeSettings


def resolve_device(device: str) -> torch.device:
    """The torch device that a ``runtime.device`` setting means.

    Raises:
        ValueError: if this machine or this build of torch has no such device.
    """
    if device == "auto":
        if torch.accelerator.is_available():
            return torch.device(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"runtime.device={device} cannot be used here ({reason}); try auto or cpu") from None
    return chosen


def check_runtime(runtime: RuntimeSettings) -> torch.device:
    """The device to use, or a ValueError for settings that cannot work on this machine."""
    device = resolve_device(runtime.device)
    if runtime.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"runtime.offload={runtime.offload} moves weights between a CPU and an accelerator, and the device is "
            "the CPU; use runtime.offload=none"
        )
    if runtime.threads is not None and runtime.threads < 1:
        raise ValueError(f"runtime.threads must be 1 or more, not {runtime.threads}")
    return device


def place(pipe: DiffusionPipeline, runtime: RuntimeSettings) -> None:
    """Put a pipeline's networks where ``runtime`` says."""
    device = check_runtime(runtime)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.vae_tiling:
        pipe.vae.enable_tiling()
    if runtime.offload == "none":
        pipe.to(device)
    elif runtime.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        arguments: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        pipe.enable_group_offload(onload_device=device, use_stream=device.type == "cuda", **arguments)


def release_memory() -> None:
    """Give memory of freed networks back to the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
