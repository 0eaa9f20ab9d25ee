"""Where the networks run: device, offloading, tiling; all of it diffusers' own.

With ``offload: model`` at most one network is on the device, and none between shots. With ``group`` the blocks of the
expert at work pass through it, and the VAE stays: so a text encoder or a quality filter never meets an expert there.
"""

from __future__ import annotations

import gc

import torch
from diffusers import DiffusionPipeline

from storymem.wan.parallel import parallelize
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
    if runtime.offload not in ("none", "auto") and device.type == "cpu":
        raise ValueError(
            f"runtime.offload={runtime.offload} moves weights between a CPU and an accelerator, and the device is "
            "the CPU; use runtime.offload=none"
        )
    if runtime.context_parallel != "none" and torch.accelerator.device_count() == 0:
        raise ValueError(
            f"runtime.context_parallel={runtime.context_parallel} is for accelerators and this machine has none; two "
            "processes on CPUs can use runtime.guidance_parallel=true"
        )
    if runtime.threads is not None and runtime.threads < 1:
        raise ValueError(f"runtime.threads must be 1 or more, not {runtime.threads}")
    return device


def place(pipe: DiffusionPipeline, runtime: RuntimeSettings, *, device: torch.device | None = None) -> None:
    """Put a pipeline's networks where ``runtime`` says; its ``offload`` must be settled.

    Args:
        device: None: what ``runtime.device`` means, after :func:`check_runtime`.
    """
    assert runtime.offload != "auto", "settle it first: storymem.wan.presets.choose_runtime"
    device = device or check_runtime(runtime)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.vae_tiling:
        pipe.vae.enable_tiling()
    if runtime.offload == "none":
        parallelize(pipe, runtime, device)
        pipe.to(device)
    elif runtime.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",  # the next block comes while one computes
            exclude_modules=["vae", "text_encoder"],  # small, or alone
        )


def release_memory() -> None:
    """Give memory of freed networks back to the accelerator."""
    gc.collect()  # hooks and their networks refer to each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
