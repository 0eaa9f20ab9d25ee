"""The processes among which stories are divided: of torchrun, accelerate launch or a submitit job; else this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from storymem.wan.processes import Launch

T = TypeVar("T")

_TIMEOUT = timedelta(days=30)  # the first process may wait long for the last


def workers() -> Launch:
    """This process among those that the launcher's variables (``RANK``, ``WORLD_SIZE`` ...) specify, each a team."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return Launch.of_environment().in_teams(1)


@contextmanager
def working_together(launch: Launch) -> Iterator[None]:
    """What the processes do together, in the block; each has an accelerator of its own."""
    import torch

    if launch.teams == 1:
        yield
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(launch.local_rank % torch.accelerator.device_count())
    torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def from_first(value: T) -> T:
    """The value that the first process gives; returns when all processes are here, fails if one of them has ended."""
    from torch import distributed

    values = [value]
    if distributed.is_initialized():
        distributed.barrier()
        distributed.broadcast_object_list(values, src=0)
    return values[0]
