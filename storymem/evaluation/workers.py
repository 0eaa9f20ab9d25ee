"""Who scores which story: the processes of torchrun, accelerate launch or a submitit job, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # how long the first process waits for the last


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among its like.

    Args:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on its machine, which is that of its accelerator.
        address: where the first of them can be met, ``host:port``.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Workers:
        """The processes that the launcher started; one if none did.

        ``RANK`` and ``WORLD_SIZE`` are torchrun's and accelerate's. Slurm's variables count only in a job of submitit,
        for they are there in a plain allocation too.
        """
        if "WORLD_SIZE" in environment and "RANK" in environment:
            return cls(
                rank=int(environment["RANK"]),
                world=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", 0)),
                address=f"{environment.get('MASTER_ADDR', 'localhost')}:{environment.get('MASTER_PORT', '29500')}",
            )
        if "SUBMITIT_EXECUTOR" in environment:
            from submitit import JobEnvironment

            job = JobEnvironment()
            port = 20000 + int("".join(filter(str.isdigit, job.job_id)) or 0) % 20000
            return cls(
                rank=job.global_rank,
                world=job.num_tasks,
                local_rank=job.local_rank,
                address=f"{job.hostnames[0]}:{port}",
            )
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process puts the results together."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does of ``items``."""
        return items[self.rank :: self.world]

    def take_accelerator(self) -> None:
        """Make this process's accelerator the one that networks are put on."""
        import torch

        if torch.accelerator.is_available() and self.world > 1:
            torch.accelerator.set_device_index(self.local_rank % torch.accelerator.device_count())

    def begin(self) -> None:
        """Meet the others."""
        import torch

        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"tcp://{self.address}",
                rank=self.rank,
                world_size=self.world,
                timeout=_PATIENCE,
            )

    def wait_for_all(self) -> None:
        """Return when all have come here; fails if one of them has ended before."""
        import torch

        if self.world > 1:
            torch.distributed.barrier()

    def all_hear(self, said: str | None) -> str | None:
        """What the first process says, in all of them; returns when all have come here."""
        import torch

        heard = [said]
        if self.world > 1:
            torch.distributed.broadcast_object_list(heard, src=0)
        return heard[0]

    def end(self) -> None:
        """Part from the others."""
        import torch

        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
