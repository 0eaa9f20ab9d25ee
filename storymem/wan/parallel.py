"""Forwards by several processes: tokens by diffusers' context parallelism, guidance by halves, weights by FSDP2.

Every process runs the pipeline's loop on the same latents; each exchange leaves the same tensors on all of them.
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

from storymem.wan.processes import Grid, Launch, divide
from storymem.wan.settings import ContextParallel, RuntimeSettings

_LENGTHS = "context_parallel_lengths"


def join(launch: Launch, device: torch.device) -> dist.Store:
    """Take this process's accelerator and join the others of its team; returns the store that they share."""
    backend = "cpu:gloo"
    take_accelerator(launch, device)
    if device.type != "cpu":
        # Sizes of uneven shares are exchanged between CPUs, so that the accelerator need not be waited for.
        backend += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    common, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"team{launch.team}", common)  # each team is a world of its own
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world, timeout=timedelta(minutes=30)
    )
    return store


def take_accelerator(launch: Launch, device: torch.device) -> None:
    """Make the accelerator with this process's number the current one; ValueError if there is none; not for a CPU."""
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
    """Leave the team; all of its processes must call this."""
    _film_mesh.cache_clear()
    dist.destroy_process_group()


def parallelize(pipe: Any, runtime: RuntimeSettings, device: torch.device) -> None:
    """Spread a pipeline's transformers over the processes that :func:`join` joined, as ``runtime`` specifies.

    Adapters must be loaded and the attention backend set before. Weights may be in RAM: shares go to ``device``.
    """
    if not runtime.spread:
        return
    grid = divide(runtime, dist.get_world_size())
    mesh = _film_mesh(grid, device.type)
    for expert in pipe.experts.values():
        if grid.context > 1:
            _share_tokens(expert, mesh, grid)
        if runtime.shard_weights:
            _shard(expert, mesh)
    if grid.guidance > 1:
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
def _film_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    sizes = grid.mesh
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _share_tokens(expert: Any, mesh: DeviceMesh, grid: Grid) -> None:
    """Split tokens before the first block, as ``transformer.make_plan`` states, and gather them after the last."""
    sizes = grid.mesh
    config = ContextParallelConfig(ring_degree=sizes["ring"], ulysses_degree=sizes["ulysses"], mesh=mesh)
    expert.enable_parallelism(config=config)
    HookRegistry.check_if_exists_or_initialize(expert).register_hook(_LengthsHook(config, grid), _LENGTHS)


class _LengthsHook(ModelHook):
    """Choose between even and uneven shares before each forward.

    Uneven ones cost an exchange of their sizes in every layer. Shares of any layout are even if those of one latent
    frame are, as at 480p and 720p for 2, 4 and 8 processes.
    """

    def __init__(self, config: ContextParallelConfig, grid: Grid) -> None:
        super().__init__()
        self.config, self.grid = config, grid

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Sets ``ulysses_anything`` or ``ring_anything`` for latents [B, C, N, h, w]."""
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        size, patch = latents.shape[-2:], module.config.patch_size[-2:]
        tokens = math.prod(length // side for length, side in zip(size, patch, strict=True))
        setattr(self.config, f"{self.grid.method}_anything", tokens % self.grid.context != 0)
        return args, kwargs


class GuidanceHalves:
    """The pass with the prompt runs on one half of the processes, that with the negative prompt on the other.

    Args:
        mesh: the two processes of a pair, that of the prompt first.
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
    """Each process keeps its share of the weights; they are gathered block by block."""
    everyone = mesh._flatten("weights")
    expert.requires_grad_(False)  # FSDP2 lets only weights that do not train differ in dtype
    for block in expert.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=everyone)
    fully_shard(expert, mesh=everyone)
