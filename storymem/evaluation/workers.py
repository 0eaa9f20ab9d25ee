"""The processes among which stories are divided: of torchrun, accelerate launch or a submitit job; else this one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

_TIMEOUT = timedelta(days=30)  # the first process may wait long for the last


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among ``world`` of them. Use it as a context manager around what they do together.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        local_rank: of this process on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Workers:
        """As the launcher's variables (``RANK``, ``WORLD_SIZE`` ...) specify; one process without them."""
        if "SUBMITIT_EXECUTOR" in os.environ:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        rank, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank=int(rank), world=int(world), local_rank=int(local or 0)) if rank and world else cls()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of ``items`` that this process handles."""
        return items[self.rank :: self.world]

    def __enter__(self) -> Workers:
        import torch

        if self.world > 1:
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self.world > 1:
            torch.distributed.destroy_process_group()

    def use_accelerator(self) -> None:
        """Make this process's accelerator the current device."""
        import torch

        if self.world > 1 and torch.accelerator.is_available():
            torch.accelerator.set_device_index(self.local_rank % torch.accelerator.device_count())

    def from_first(self, value: T) -> T:
        """The value that the first process gives; returns when all processes are here."""
        import torch

        values = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Return when all processes are here; fail if one of them has ended."""
        import torch

        if self.world > 1:
            torch.distributed.barrier()
