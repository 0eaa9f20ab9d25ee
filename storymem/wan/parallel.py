"""Forwards by several processes: tokens by diffusers' context parallelism, guidance by halves, weights by FSDP2.

The pipeline's loop does not know of it. Every process runs the same loop on the same latents; each exchange leaves the
same tensors on all of them, so that all take the same steps.
"""

from __future__ import annotations

import math
from datetime import timedelta
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from storymem.wan.layout import Launch, Layout, divide
from storymem.wan.settings import ContextParallel, RuntimeSettings

_LENGTHS = "context_parallel_lengths"


def join(launch: Launch, device: torch.device) -> dist.Store:
    """Take this process's accelerator and meet the others of its team; returns the store that they can reach.

    Raises:
        ValueError: if a machine has fewer accelerators than processes.
    """
    backend = "cpu:gloo"
    take_accelerator(launch, device)
    if device.type != "cpu":
        # Sizes of uneven shares are exchanged between CPUs, so that the accelerator need not be waited for.
        backend += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    everyones, _, _ = next(dist.rendezvous("env://"))
    # Teams never speak with each other: each is a world of its own.
    store = dist.PrefixStore(f"team{launch.team}", everyones)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world, timeout=timedelta(minutes=30)
    )
    return store


def take_accelerator(launch: Launch, device: torch.device) -> None:
    """Make the accelerator of this process's number the current one; nothing on a CPU.

    Raises:
        ValueError: if the machine has fewer accelerators than processes.
    """
    if device.type == "cpu":
        return
    found = torch.accelerator.device_count()
    if launch.local_world > found:
        raise ValueError(
            f"{launch.local_world} processes were started on a machine with {found} accelerators: start as many "
            f"as there are, --nproc_per_node={found}"
        )
    torch.accelerator.set_device_index(launch.local_rank)


def leave() -> None:
    """Part from the others; all must come here."""
    _film_mesh.cache_clear()
    dist.destroy_process_group()


def parallelize(pipe: Any, runtime: RuntimeSettings, device: torch.device) -> None:
    """Spread a pipeline's transformers over the processes as ``runtime`` says; nothing for a runtime of one process.

    Their adapters must be loaded and their attention backend chosen. Whole weights may still lie on the CPU: shares of
    them go to ``device``.

    Raises:
        ValueError: if this process has not met others; see :func:`storymem.film.ranks.among_ranks`.
    """
    if not runtime.spread:
        return
    layout = divide(runtime, dist.get_world_size() if dist.is_initialized() else 1)
    mesh = _film_mesh(layout, device.type)
    for expert in pipe.experts.values():
        if layout.context > 1:
            _share_tokens(expert, mesh, layout)
        if runtime.shard_weights:
            _shard(expert, mesh)
    if layout.guidance > 1:
        pipe.guidance_halves = GuidanceHalves(mesh["guidance"])


def can_share_tokens(backend: str, method: ContextParallel) -> bool:
    """Whether diffusers runs one of its attention backends with tokens shared by ``method``.

    A ring joins parts of attention by their log-sum-exp, which torch's own does not return.
    """
    if method == "none":
        return True
    supported = _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(backend))
    return supported and not (method == "ring" and backend == AttentionBackendName.NATIVE.value)


@cache
def _film_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    sizes = layout.mesh
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _share_tokens(expert: Any, mesh: DeviceMesh, layout: Layout) -> None:
    """Split tokens before the first block and gather them after the last; attention sees all of them.

    See :func:`storymem.wan.transformer.make_plan` for which token lies where.
    """
    sizes = layout.mesh
    config = ContextParallelConfig(ring_degree=sizes["ring"], ulysses_degree=sizes["ulysses"], mesh=mesh)
    expert.enable_parallelism(config=config)
    HookRegistry.check_if_exists_or_initialize(expert).register_hook(_LengthsHook(config, layout), _LENGTHS)


class _LengthsHook(ModelHook):
    """Choose between even and uneven shares before each forward.

    Uneven ones cost an exchange of their sizes in every layer. Shares are even for any number of slots, memory or
    video, if those of one slot are, which is so at 480p and 720p for 2, 4 and 8 processes.
    """

    def __init__(self, config: ContextParallelConfig, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Sets ``ulysses_anything`` or ``ring_anything`` for latents [B, C, N, h, w]."""
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        size, patch = latents.shape[-2:], module.config.patch_size[-2:]
        tokens = math.prod(length // side for length, side in zip(size, patch, strict=True))
        setattr(self.config, f"{self.layout.method}_anything", tokens % self.layout.context != 0)
        return args, kwargs


class GuidanceHalves:
    """The pass with the prompt runs on one half of the processes, that with the negative prompt on the other.

    Args:
        mesh: the two processes that belong together, first that of the prompt.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.own: Literal["cond", "uncond"] = "uncond" if mesh.get_local_rank() else "cond"

    def exchange(self, prediction: Tensor) -> list[Tensor]:
        """Predictions with the prompt and with the negative prompt, from this process's own."""
        both = [torch.empty_like(prediction) for _ in range(2)]
        dist.all_gather(both, prediction.contiguous(), group=self.group)
        return both


def _shard(expert: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its share of the weights, gathered block by block when they are needed."""
    everyone = mesh._flatten("weights")
    expert.requires_grad_(False)  # FSDP2 lets only weights that do not train differ in dtype
    for block in expert.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=everyone)
    fully_shard(expert, mesh=everyone)
