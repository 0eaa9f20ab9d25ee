"""How the networks run: device, precision, attention kernel, compiled blocks, step caches, placement.

Each is one call into diffusers or torch. :func:`check_machine` checks before anything is loaded that this
machine can run the settings; :func:`accelerate`, then :func:`place` apply them to a pipeline, so that what a cache
skips is below the hooks that stream weights.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig, apply_group_offloading
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import nn
from torch.nn import functional as F

from storymem.devices import resolve_device
from storymem.wan.eight_bits import store_in_8_bits
from storymem.wan.gguf import check_reader
from storymem.wan.parallel import can_share_tokens, parallelize
from storymem.wan.settings import Attention, ContextParallel, ModelSettings, RuntimeSettings

logger = logging.getLogger(__name__)

#: Our names for diffusers' attention backends.
_BACKENDS: dict[Attention, str] = {
    "flash3": "_flash_3",
    "flash2": "flash",
    "cudnn": "_native_cudnn",
    "sage": "sage",
    "native": "native",
}
_EXACT: tuple[Attention, ...] = ("flash3", "cudnn", "flash2", "native")  # fastest first
_TOLERANCE = 0.1  # of a small attention in 16 bits or, by Sage, in 8; a kernel that fails is off by about 1
_THRESHOLDS = {"first_block": 0.05, "taylor": 2.0}  # where ``runtime.cache_threshold`` is None
_COMPILER = "inductor"
#: A story has up to 11 sizes of memory, which one pass may not see, and a first shot without adapters; further shapes
#: run uncompiled, with a warning from torch.
_RECOMPILE_LIMIT = 32


# Devices


def check_runtime(runtime: RuntimeSettings) -> torch.device:
    """The device to use; a ``ValueError`` for settings that cannot work on it."""
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


def planned_device(runtime: RuntimeSettings) -> tuple[torch.device, bool]:
    """The device that ``runtime`` is for, and whether this machine has it; ``ValueError`` if no machine can have it."""
    try:
        return check_runtime(runtime), True
    except ValueError:
        if not re.fullmatch(r"auto|(cuda|mps|xpu)(:\d+)?", runtime.device):
            raise
        return torch.device("cuda" if runtime.device == "auto" else runtime.device), False


def make_current(device: torch.device) -> None:
    """Make a numbered device the one of streams and kernels that name none; torch's default is the first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and device.type == accelerator.type and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def release_memory() -> None:
    """Return the VRAM of freed networks to the accelerator, and their RAM to the system."""
    gc.collect()  # hooks and their networks refer to each other
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # of glibc
        trim(0)  # else the RAM of small tensors, such as those of adapters, stays with the process
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


# Checks before anything is loaded


def check_machine(model: ModelSettings, runtime: RuntimeSettings, *, here: bool = True) -> str:
    """What makes forwards fast with these settings, in words; a ``ValueError`` for what this machine cannot do.

    Args:
        here: whether this machine has the device; if not, only what holds on any machine is checked.
    """
    parts = [f"attention {runtime.attention} (not tried here)"]
    if here:
        device = resolve_device(runtime.device)
        if runtime.precision == "fp8_storage" and device.type == "mps":
            raise ValueError("runtime.precision=fp8_storage: mps devices have no 8-bit floats; use precision=as_is")
        for files in filter(None, (model.gguf, model.text_to_video_gguf)):
            check_reader(files)
        name, reason = choose_attention(model, runtime, device)
        parts = [f"attention {name} ({reason})"]
        if runtime.compile == "blocks":
            _check_compiler(device)
        shared = Path("/dev/shm")
        if runtime.spread and device.type == "cuda" and shared.is_dir() and shutil.disk_usage(shared).free < 1e9:
            logger.warning(
                "%s has less than 1 GB free, which NCCL may need: start a container with --shm-size=1g", shared
            )
    if runtime.compile == "blocks":
        parts.append("compiled blocks")
    if runtime.cache != "none":
        parts.append(f"cache {runtime.cache} at {_threshold(runtime):g}")
    return ", ".join(parts)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("runtime.compile=blocks needs triton on CUDA devices: pip install triton")
    elif device.type == "cpu":
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
            raise ValueError("runtime.compile=blocks needs a C++ compiler on the CPU: install g++ or set CXX")
    else:
        raise ValueError(f"runtime.compile=blocks is for CUDA devices and the CPU, not {device.type}")


# Attention


def set_attention(expert: Any, backend: str) -> None:
    """Have a transformer use one of diffusers' attention backends; the process's default stays as it is."""
    notices = logging.getLogger("diffusers.models.modeling_utils")  # each call warns that backends are experimental
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        with attention_backend(backend):
            expert.set_attention_backend(backend)
    finally:
        notices.setLevel(level)


def choose_attention(model: ModelSettings, runtime: RuntimeSettings, device: torch.device) -> tuple[Attention, str]:
    """The kernel for ``runtime.attention`` on a device, tried on a small example, and the reason; or a ValueError."""
    wanted, sharing = runtime.attention, runtime.context_parallel
    head_dim, dtype = model.network.transformer["attention_head_dim"], getattr(torch, model.dtype)
    fault = functools.partial(_fault, device=device, dtype=dtype, head_dim=head_dim, sharing=sharing)
    if wanted == "auto" and device.type != "cuda":
        return "native", f"torch's own, because the device is {device.type}"
    if wanted == "auto":
        for name in _EXACT:
            if fault(name) is None:
                return name, "the fastest exact one that is installed and works here"
        raise ValueError(f"no exact attention kernel here can share tokens by runtime.context_parallel={sharing}")
    if (reason := fault(wanted)) is None:
        return wanted, "as set"
    others = ", ".join(["auto", *(name for name in _BACKENDS if name != wanted and fault(name) is None)])
    raise ValueError(f"runtime.attention={wanted} cannot be used here: {reason}. Use one of: {others}")


@functools.cache
def _fault(
    attention: Attention, *, device: torch.device, dtype: torch.dtype, head_dim: int, sharing: ContextParallel
) -> str | None:
    """Why a kernel cannot be used, from diffusers' own checks and from running it; None if it can."""
    if attention != "native" and device.type != "cuda":
        return f"it runs on CUDA devices, and the device is {device.type}"
    if attention != "native" and dtype == torch.float32:
        return "it computes in 16 bits, and model.dtype is float32"
    if not can_share_tokens(_BACKENDS[attention], sharing):
        return f"diffusers does not run it with context_parallel={sharing}"
    example = torch.randn(3, 1, 128, 2, head_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        with attention_backend(_BACKENDS[attention]):
            ours = dispatch_attention_fn(*example)
    except (RuntimeError, ValueError, ImportError, AssertionError, TypeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    query, key, value = (x.float().transpose(1, 2) for x in example)
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    if not torch.allclose(ours.float(), expected, rtol=0, atol=_TOLERANCE):
        return "on this device it computes something else than attention"
    return None


# Precision, attention, compilation and step caches, on the experts of a pipeline


def accelerate(pipe: Any, model: ModelSettings, runtime: RuntimeSettings) -> None:
    """Apply ``runtime`` to the experts of a pipeline whose adapters are loaded, before they are placed."""
    pipe.memory_cache = runtime.memory_cache
    name, reason = choose_attention(model, runtime, resolve_device(runtime.device))
    logger.info("attention: %s, %s", name, reason)
    for expert in pipe.experts.values():
        if runtime.precision == "fp8_storage":
            store_in_8_bits(expert)  # nothing is left to do for weights from files
        if name != "native" or runtime.attention == "native":
            set_attention(expert, _BACKENDS[name])
        if runtime.compile == "blocks":
            _compile(expert)
        if runtime.cache != "none":
            expert.enable_cache(_cache_config(runtime))


def compiled_graphs() -> int:
    """Graphs that torch compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _compile(expert: Any) -> None:
    """Compile the block that an expert repeats: one graph for each shape, shared by its blocks and by both experts.

    ``compile_repeated_blocks`` of diffusers would compile a block with the hooks on it: caches, streamed weights. Their
    decisions are Python's; here they stay outside, around a compiled forward.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    for block in expert.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend=_COMPILER)


def _threshold(runtime: RuntimeSettings) -> float:
    return _THRESHOLDS[runtime.cache] if runtime.cache_threshold is None else runtime.cache_threshold


def _cache_config(runtime: RuntimeSettings) -> Any:
    threshold = _threshold(runtime)
    if runtime.cache == "first_block":
        return FirstBlockCacheConfig(threshold=threshold)
    # Its usual form keeps the outputs of all attentions, 80 times half a gigabyte at true size; the light form
    # extrapolates the output of the whole network.
    return TaylorSeerCacheConfig(
        cache_interval=int(threshold) + 1, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )


def clear_step_caches(experts: Mapping[str, Any]) -> None:
    """Drop what step caches hold, so that nothing of a shot, finished or interrupted, reaches the next."""
    for expert in experts.values():
        if expert.is_cache_enabled:
            expert._reset_stateful_cache()


def check_shared_states(experts: Collection[Any], *, passes_differ: bool) -> None:
    """Refuse (ValueError) caches of diffusers that cannot serve two passes of guidance with different memory.

    PyramidAttentionBroadcast and FasterCache keep one state in a layer, for pipelines that run both passes as one
    batch; Wan's pipelines run them one after the other. The other caches keep a state for each pass.
    """
    modules = [module for expert in experts for module in expert.modules() if hasattr(module, "_diffusers_hook")]
    hooks = [hook for module in modules for hook in module._diffusers_hook.hooks.values() if hook._is_stateful]
    names = {
        type(hook).__name__.removesuffix("Hook")
        for hook in hooks
        if not any(isinstance(value, StateManager) for value in vars(hook).values())
    }
    if not names:
        return
    what = f"{' and '.join(sorted(names))} of diffusers keeps one state for both passes of guidance"
    if passes_differ:
        raise ValueError(
            f"{what}, and with negative_sees_memory=False one of them sees no memory: write True, or disable the cache "
            "by disable_cache() of both transformers"
        )
    logger.warning("%s: the pass with the negative prompt is given what the other computed", what)


# Placement


def place(pipe: DiffusionPipeline, runtime: RuntimeSettings, *, device: torch.device | None = None) -> None:
    """Place a pipeline's networks as ``runtime`` specifies; its ``offload`` must not be "auto".

    With "model" at most one network is on the device, and none between shots. With "group" the blocks of the expert at
    work and the layers of the text encoder pass through it, and the VAE stays.

    Args:
        device: None: that of ``runtime.device``.
    """
    assert runtime.offload != "auto", "storymem.wan.placement settles it"
    device = device or check_runtime(runtime)
    make_current(device)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.vae_tiling and pipe.vae is not None:
        pipe.vae.enable_tiling()
    if runtime.offload == "none":
        parallelize(pipe, runtime, device)
        pipe.to(device)
    elif runtime.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        streaming: dict[str, Any] = {
            "onload_device": device,
            "use_stream": device.type == "cuda",  # the next block is copied while one computes
            "low_cpu_mem_usage": True,  # blocks are pinned one at a time: all at once would be a second copy in RAM
        }
        # Not enable_group_offload of the pipeline: what that excludes is copied to the device as a whole, and the text
        # encoder has no room there.
        for name, network in pipe.components.items():
            if name == "vae" and network is not None:
                network.to(device)
            elif isinstance(network, ModelMixin):
                network.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **streaming)
            elif isinstance(network, nn.Module):
                apply_group_offloading(network, offload_type="leaf_level", **streaming)
