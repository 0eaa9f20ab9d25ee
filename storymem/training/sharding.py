"""Whole tensors and tensors that are sharded over processes (FSDP2), behind the same three functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Share a network's parameters among the processes of ``mesh``, gathered block by block when they are needed.

    No mixed-precision policy: parameters are gathered in the dtype they are kept in, and autocast does the rest, so
    that a sharded network computes what a whole one computes.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every process must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, on which element-wise arithmetic can be done."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of ``parameter``, and sharded as it is if it has its shape."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole tensor into a parameter."""
    parameter.copy_(like(value.to(parameter.dtype), parameter))
