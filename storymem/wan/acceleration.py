"""Faster forwards by what diffusers and torch offer: attention kernels, compiled blocks, caches across steps.

Chosen by ``runtime.attention``, ``compile``, ``cache`` and ``guidance_batch``; checked before anything is loaded, and
put on a pipeline before its networks are placed, so that what a cache skips is below the hooks that stream weights.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, ModelHook, TaylorSeerCacheConfig
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch.nn import functional as F

from storymem.wan.parallel import can_share_tokens
from storymem.wan.runtime import resolve_device
from storymem.wan.settings import (
    Attention,
    ContextParallel,
    ModelSettings,
    RuntimeSettings,
    SamplerSettings,
    check_speed,
)

logger = logging.getLogger(__name__)

#: Our names for diffusers' backends.
BACKENDS: dict[Attention, str] = {
    "flash3": "_flash_3",
    "flash2": "flash",
    "cudnn": "_native_cudnn",
    "sage": "sage",
    "native": "native",
}
#: Exact kernels, fastest first; torch's own takes FlashAttention 2 where it can, and runs everywhere.
_FASTEST: tuple[Attention, ...] = ("flash3", "cudnn", "flash2", "native")
_TOLERANCE = 0.1  # of a small attention in 16 bits or, by Sage, in 8; a kernel that fails is off by about 1

#: A story has up to 11 sizes of memory, once with one and once with two passes in a batch, and a first shot without
#: adapters; what comes on top runs uncompiled, with a warning from torch.
RECOMPILE_LIMIT = 32

#: ``runtime.cache_threshold`` where it is None.
DEFAULT_THRESHOLDS = {"first_block": 0.05, "taylor": 2.0}


def check_acceleration(
    model: ModelSettings, sampler: SamplerSettings, runtime: RuntimeSettings, *, here: bool = True
) -> str:
    """What makes forwards fast with these settings, in words; loads nothing.

    Args:
        here: whether this machine has the device; if not, what only it can tell is left out.

    Raises:
        ValueError: for what this machine cannot do, or what does not go together.
    """
    check_speed(model, sampler, runtime)
    if here:
        device = resolve_device(runtime.device)
        attention = _attention(model, runtime, device)
        says = [f"attention {attention.name} ({attention.reason})"]
    else:
        says = [f"attention {runtime.attention} (not tried here)"]
    if runtime.compile == "blocks":
        if here:
            _check_compiler(device)
        says.append("compiled blocks")
    if runtime.cache != "none":
        says.append(f"cache {runtime.cache} at {_threshold(runtime):g}")
    if runtime.guidance_batch:
        says.append("guidance in one batch")
    return ", ".join(says)


def accelerate(pipe: Any, model: ModelSettings, runtime: RuntimeSettings) -> None:
    """Make the experts of a :class:`storymem.wan.pipeline.WanMemoryToVideoPipeline` as fast as ``runtime`` asks.

    Before they are placed.
    """
    experts = pipe.experts
    pipe.guidance_batch, pipe.memory_cache = runtime.guidance_batch, runtime.memory_cache
    attention = _attention(model, runtime, resolve_device(runtime.device))
    logger.info("attention: %s, %s", attention.name, attention.reason)
    if attention.name != "native" or runtime.attention == "native":
        for expert in experts.values():
            set_attention(expert, BACKENDS[attention.name])
    if runtime.compile == "blocks":
        for expert in experts.values():
            _compile(expert)
    if runtime.cache != "none":
        for expert in experts.values():
            expert.enable_cache(_cache_config(runtime))


# Attention


def set_attention(expert: Any, backend: str) -> None:
    """Have a transformer use one of diffusers' attention backends, and leave the process's default as it is."""
    with attention_backend(backend):
        expert.set_attention_backend(backend)


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """A kernel, by our name, and why it."""

    name: Attention
    reason: str


def choose_attention(
    attention: Attention,
    device: torch.device,
    *,
    dtype: torch.dtype,
    head_dim: int,
    sharing: ContextParallel = "none",
) -> AttentionChoice:
    """The attention kernel that a ``runtime.attention`` setting means on a device, tried out on a small example.

    Args:
        sharing: how tokens are shared among processes, which not every kernel can.

    Raises:
        ValueError: for a named kernel that does not work there, or if none can share tokens.
    """
    if attention == "auto":
        if device.type != "cuda":
            return AttentionChoice(name="native", reason=f"torch's own, since the device is {device.type}")
        name = next((name for name in _FASTEST if _fault(name, device, dtype, head_dim, sharing) is None), None)
        if name is None:
            raise ValueError(f"no exact attention kernel here can share tokens by runtime.context_parallel={sharing}")
        return AttentionChoice(name=name, reason="the fastest exact one that is installed and works here")
    fault = _fault(attention, device, dtype, head_dim, sharing)
    if fault is not None:
        others = [name for name in BACKENDS if name != attention]
        works = [name for name in others if _fault(name, device, dtype, head_dim, sharing) is None]
        raise ValueError(
            f"runtime.attention={attention} cannot be used here: {fault}. Use one of: {', '.join(['auto', *works])}"
        )
    return AttentionChoice(name=attention, reason="as asked")


@functools.cache
def _fault(
    attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int, sharing: ContextParallel
) -> str | None:
    """Why a kernel cannot be used, from diffusers' own checks and from running it; None if it can."""
    if attention != "native" and device.type != "cuda":
        return f"it runs on CUDA devices, and the device is {device.type}"
    if attention != "native" and dtype == torch.float32:
        return "it computes in 16 bits, and model.dtype is float32"
    if not can_share_tokens(BACKENDS[attention], sharing):
        return f"diffusers does not run it with context_parallel={sharing}"
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(3, 1, 128, 2, head_dim, generator=generator).to(device, dtype)
    query, key, value = example
    try:
        with attention_backend(BACKENDS[attention]):
            ours = dispatch_attention_fn(query, key, value)
    except (RuntimeError, ValueError, ImportError, AssertionError, TypeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    query, key, value = (x.float().transpose(1, 2) for x in example)
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    if not torch.allclose(ours.float(), expected, rtol=0, atol=_TOLERANCE):
        return "on this device it computes something else than attention"
    return None


def _attention(model: ModelSettings, runtime: RuntimeSettings, device: torch.device) -> AttentionChoice:
    head_dim = model.network.transformer["attention_head_dim"]
    dtype, sharing = getattr(torch, model.dtype), runtime.context_parallel
    return choose_attention(runtime.attention, device, dtype=dtype, head_dim=head_dim, sharing=sharing)


# Compilation


class _Counted:
    """One of torch's compilers, counting the graphs it compiles in this process."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        from torch._dynamo import lookup_backend

        self.graphs += 1
        return lookup_backend(self.backend)(graph, inputs, **options)


_counted = _Counted("inductor")


def compiled_graphs() -> int:
    """How many graphs were compiled for ``runtime.compile: blocks`` in this process so far."""
    return _counted.graphs


def _compile(expert: Any) -> None:
    """Compile the block that an expert repeats: one graph for each shape, shared by its blocks and by both experts.

    ``compile_repeated_blocks`` of diffusers would compile a block with the hooks on it: caches, streamed weights. Their
    decisions are Python's; here they stay outside, around a compiled forward.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for block in expert.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend=_counted)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("runtime.compile=blocks needs triton on CUDA devices: pip install triton")
    elif device.type == "cpu":
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
            raise ValueError("runtime.compile=blocks needs a C++ compiler on the CPU: install g++ or set CXX")
    else:
        raise ValueError(f"runtime.compile=blocks is for CUDA devices and the CPU, not {device.type}")


# Caches across steps


def check_shared_states(experts: Collection[Any], *, guided: bool, passes_differ: bool) -> None:
    """Refuse caches that hand what the pass with the prompt computed to the one with the negative prompt.

    PyramidAttentionBroadcast and FasterCache of diffusers keep one state in a layer, for pipelines that run both passes
    of guidance as one batch; Wan's pipelines run them one after the other. The other caches keep a state for each pass.

    Args:
        experts: transformers, with the hooks of such a cache or without.
        guided: whether both passes run.
        passes_differ: whether they see different memory.

    Raises:
        ValueError: if the passes differ in more than their texts.
    """
    names = {type(hook).__name__.removesuffix("Hook") for expert in experts for hook in _sharing_hooks(expert)}
    if not names or not guided:
        return
    what = f"{' and '.join(sorted(names))} of diffusers keeps one state for both passes of guidance"
    if passes_differ:
        raise ValueError(
            f"{what}, and with negative_sees_memory=False one of them sees no memory: write True, or disable the cache "
            "by disable_cache() of both transformers"
        )
    logger.warning("%s: that with the negative prompt is given what that with the prompt computed", what)


def _sharing_hooks(expert: Any) -> list[ModelHook]:
    """Hooks of diffusers that keep a state, but not one for each pass."""
    registries = [module._diffusers_hook for module in expert.modules() if hasattr(module, "_diffusers_hook")]
    hooks = [hook for registry in registries for hook in registry.hooks.values() if hook._is_stateful]
    return [hook for hook in hooks if not any(isinstance(value, StateManager) for value in vars(hook).values())]


def forget_steps(experts: Mapping[str, Any]) -> None:
    """Drop what step caches hold of a shot, so that nothing of it, whole or broken off, reaches the next."""
    for expert in experts.values():
        if expert.is_cache_enabled:
            expert._reset_stateful_cache()


def _threshold(runtime: RuntimeSettings) -> float:
    return DEFAULT_THRESHOLDS[runtime.cache] if runtime.cache_threshold is None else runtime.cache_threshold


def _cache_config(runtime: RuntimeSettings) -> Any:
    """diffusers' configuration of the cache."""
    threshold = _threshold(runtime)
    if runtime.cache == "first_block":
        return FirstBlockCacheConfig(threshold=threshold)
    # Its usual form keeps the outputs of all attentions, 80 times half a gigabyte at true size; the light form
    # extrapolates the output of the whole network.
    return TaylorSeerCacheConfig(
        cache_interval=int(threshold) + 1, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
