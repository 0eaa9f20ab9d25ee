"""How several processes share films. Loads no torch, so that errors are reported before anything is loaded.

Processes form a grid, ``teams`` x ``guidance`` x ``context``. Each team makes films of its own. In a team, ``guidance``
(1 or 2) divides the two passes of classifier-free guidance, and ``context`` divides the tokens of a pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from storymem.wan.combinations import check_combinations
from storymem.wan.settings import ContextParallel, ModelSettings, RuntimeSettings, SamplerSettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that ``torchrun`` (or ``accelerate launch``) started.

    Args:
        rank: its number in its team, from 0.
        world: processes in its team, which make a film together.
        local_rank: its number on its machine, which is that of its accelerator.
        local_world: processes on its machine.
        team: number of its team, from 0.
        teams: how many teams there are.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    team: int = 0
    teams: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """As the launcher set it; one process without a launcher."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(
            rank=rank,
            world=world,
            local_rank=int(environment.get("LOCAL_RANK", rank)),
            local_world=int(environment.get("LOCAL_WORLD_SIZE", world)),
        )

    @classmethod
    def of(cls, runtime: RuntimeSettings) -> Launch:
        """This process in its team, as ``runtime.processes_per_film`` divides the processes."""
        return cls.of_environment().in_teams(runtime.processes_per_film)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, writes and prints for its team."""
        return self.rank == 0

    def in_teams(self, size: int | None) -> Launch:
        """The same process in its team of ``size`` neighbours; None: all are one team; ValueError for a remainder."""
        if size is None or size == self.world:
            return self
        if self.world % size:
            raise ValueError(
                f"runtime.processes_per_film={size} and {self.world} processes were started, of which "
                f"{self.world % size} would have no film: start a multiple of {size}"
            )
        return replace(self, rank=self.rank % size, world=size, team=self.rank // size, teams=self.world // size)

    def share(self, films: Sequence[T]) -> Sequence[T]:
        """Those of ``films`` that this process's team makes."""
        return films[self.team :: self.teams]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the processes of a team share a film.

    Args:
        guidance: 2 if each half of the processes runs one of the two passes of guidance, else 1.
        context: among how many processes the tokens of a pass are shared.
        method: how; "none" if ``context`` is 1.
    """

    guidance: int = 1
    context: int = 1
    method: ContextParallel = "none"

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the device mesh by name; diffusers asks for "ring" and "ulysses"."""
        ring, ulysses = (self.context if self.method == name else 1 for name in ("ring", "ulysses"))
        return {"guidance": self.guidance, "ring": ring, "ulysses": ulysses}

    def __str__(self) -> str:
        parts = ["prompt and negative prompt at the same time"] if self.guidance > 1 else []
        parts += [f"tokens shared among {self.context} ({self.method})"] if self.context > 1 else []
        processes = self.guidance * self.context
        return f"{processes} processes: {', '.join(parts)}" if processes > 1 else "one process"


def divide(runtime: RuntimeSettings, processes: int) -> Grid:
    """The grid of a team: two halves for guidance if that is asked for, the rest for context."""
    halves = 2 if runtime.guidance_parallel and processes > 1 else 1
    context = processes // halves
    return Grid(guidance=halves, context=context, method="none" if context == 1 else runtime.context_parallel)


def find_grid(runtime: RuntimeSettings, launch: Launch, *, model: ModelSettings, sampler: SamplerSettings) -> Grid:
    """The grid for one film; ValueError for settings that contradict each other or the number of processes."""
    if launch.world * launch.teams > 1 and ":" in runtime.device:
        raise ValueError(
            f"runtime.device={runtime.device}: each of several processes takes the device of its own number; write "
            f"runtime.device={runtime.device.partition(':')[0]} or auto"
        )
    check_combinations(model, sampler, runtime, processes=launch.world)
    return divide(runtime, launch.world)
