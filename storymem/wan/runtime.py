"""Where the networks run: device, offloading, tiling; all of it diffusers' own.

With ``offload: model`` at most one network is on the device, and none between shots. With ``group`` the blocks of the
expert at work pass through it, and the VAE stays: so a text encoder or a quality filter never meets an expert there.
"""

from __future__ import annotations

import gc
import logging
import re
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from storymem.devices import resolve_device
from storymem.wan.parallel import parallelize
from storymem.wan.settings import RuntimeSettings

logger = logging.getLogger(__name__)


def planned_device(runtime: RuntimeSettings) -> tuple[torch.device, bool]:
    """The device that ``runtime`` is for, and whether this machine has it: a plan may be for another machine.

    Raises:
        ValueError: for settings that suit no machine.
    """
    try:
        return check_runtime(runtime), True
    except ValueError:
        if not re.fullmatch(r"auto|(cuda|mps|xpu)(:\d+)?", runtime.device):
            raise
        return torch.device("cuda" if runtime.device == "auto" else runtime.device), False


def check_runtime(runtime: RuntimeSettings) -> torch.device:
    """The device to use, or a ValueError for settings that cannot work on this machine."""
    device = resolve_device(runtime.device)
    if runtime.offload not in ("none", "auto") and device.type == "cpu":
        raise ValueError(
            f"runtime.offload={runtime.offload} moves weights between a CPU and an accelerator, and the device is "
            "the CPU; use runtime.offload=none. With dry_run=true it is planned for a machine with an accelerator"
        )
    if runtime.context_parallel != "none" and torch.accelerator.device_count() == 0:
        raise ValueError(
            f"runtime.context_parallel={runtime.context_parallel} is for accelerators and this machine has none; two "
            "processes on CPUs can use runtime.guidance_parallel=true"
        )
    return device


def warn_of_small_shared_memory(runtime: RuntimeSettings, device: torch.device) -> None:
    """Say if processes that make a film together may run out of the shared memory that NCCL uses between them."""
    if not runtime.spread or device.type != "cuda" or not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < _SHARED_MEMORY_BYTES:
        logger.warning(
            "%s has %.0f MB free; NCCL, which the processes of a film use, may need up to 1 GB: start a container with "
            "--shm-size=1g",
            *(_SHARED_MEMORY, free / 1e6),
        )


_SHARED_MEMORY, _SHARED_MEMORY_BYTES = Path("/dev/shm"), 10**9


def place(pipe: DiffusionPipeline, runtime: RuntimeSettings, *, device: torch.device | None = None) -> None:
    """Put a pipeline's networks where ``runtime`` says; its ``offload`` must be settled.

    Args:
        device: None: what ``runtime.device`` means, after :func:`check_runtime`.
    """
    assert runtime.offload != "auto", "settle it first: storymem.wan.presets.choose_runtime"
    device = device or check_runtime(runtime)
    make_current(device)
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


def make_current(device: torch.device) -> None:
    """Have streams and kernels that name no device use this one, if it has a number: they would take the first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and device.type == accelerator.type and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def release_memory() -> None:
    """Give memory of freed networks back to the accelerator."""
    gc.collect()  # hooks and their networks refer to each other
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
