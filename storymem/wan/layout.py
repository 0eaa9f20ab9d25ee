"""How several processes share the making of films. Loads no torch: what cannot be is refused before anything loads.

Processes stand in a grid, ``films`` x ``guidance`` x ``context``. Along ``films`` each team makes films of its own;
in a team, along ``guidance`` (1 or 2) they divide the two passes of classifier-free guidance, along ``context`` the
tokens of one pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from storymem.wan.settings import ContextParallel, ModelSettings, RuntimeSettings, SamplerSettings

T = TypeVar("T")

_TORCHRUN = "torchrun --nproc_per_node=N scripts/generate.py ..."


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that ``torchrun`` (or ``accelerate launch``) started and that make a film together.

    Args:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on its machine, which is that of its accelerator.
        local_world: how many were started on its machine.
        team: number of its team, from 0.
        teams: how many teams there are, each with films of its own.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    team: int = 0
    teams: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """What the launcher says; one process if there is none."""
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
        """This process in its team, as ``runtime`` divides the processes that the launcher started; see `in_teams`."""
        return cls.of_environment().in_teams(runtime.processes_per_film)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, writes and speaks for its team."""
        return self.rank == 0

    def in_teams(self, size: int | None) -> Launch:
        """The same process in its team of ``size``, neighbours together; None: all are one team.

        Raises:
            ValueError: if some processes would be left over.
        """
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
class Layout:
    """The grid.

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
        return {
            "guidance": self.guidance,
            "ring": self.context if self.method == "ring" else 1,
            "ulysses": self.context if self.method == "ulysses" else 1,
        }

    def __str__(self) -> str:
        processes = self.guidance * self.context
        if processes == 1:
            return "one process"
        parts = []
        if self.guidance > 1:
            parts.append("prompt and negative prompt at the same time")
        if self.context > 1:
            parts.append(f"tokens shared among {self.context} ({self.method})")
        return f"{processes} processes: {', '.join(parts)}"


def divide(runtime: RuntimeSettings, world: int) -> Layout:
    """The grid of ``world`` processes: two halves for guidance if that is asked for, the rest for context.

    Raises:
        ValueError: if some of the processes would have nothing to do, or there is one and several are asked for.
    """
    method, halves = runtime.context_parallel, runtime.guidance_parallel
    if world == 1:
        for name in ("context_parallel", "guidance_parallel", "shard_weights"):
            value = getattr(runtime, name)
            if value not in (False, "none"):
                raise ValueError(
                    f"runtime.{name}={str(value).lower()} shares a film among several processes and there is one: "
                    f"start it with {_TORCHRUN}, or use another runtime"
                )
        return Layout()
    if method == "none" and not halves:
        raise ValueError(
            f"{world} processes were started and nothing says how they share the film: write runtime=multi-gpu, or "
            "runtime.context_parallel=ulysses, or runtime.guidance_parallel=true"
        )
    if halves and world % 2:
        raise ValueError(
            f"runtime.guidance_parallel=true needs two equal halves, and {world} processes were started: start one "
            "more or less, or set it to false"
        )
    if method == "none" and world > 2:
        raise ValueError(
            f"runtime.guidance_parallel=true alone has work for 2 processes and {world} were started: add "
            "runtime.context_parallel=ulysses"
        )
    context = world // 2 if halves else world
    return Layout(guidance=2 if halves else 1, context=context, method="none" if context == 1 else method)


def find_layout(runtime: RuntimeSettings, launch: Launch, *, model: ModelSettings, sampler: SamplerSettings) -> Layout:
    """The grid for one film, with all that can be known of it before torch is loaded.

    Raises:
        ValueError: for processes that do not fit the settings, or settings that do not go together.
    """
    layout = divide(runtime, launch.world)
    if launch.world * launch.teams > 1:
        _check_device(runtime)
    if launch.world > 1:
        _check_together(runtime, layout)
        _check_model(layout, runtime=runtime, model=model)
    if layout.guidance > 1 and sampler.guidance == 1:
        raise ValueError(
            "runtime.guidance_parallel=true, but sampler.guidance=1 runs no second pass: set it to false and leave "
            "all processes to runtime.context_parallel"
        )
    return layout


def _check_device(runtime: RuntimeSettings) -> None:
    if ":" in runtime.device:
        kind = runtime.device.partition(":")[0]
        raise ValueError(
            f"runtime.device={runtime.device}: each of several processes takes the device of its own number; write "
            f"runtime.device={kind} or auto"
        )


def _check_together(runtime: RuntimeSettings, layout: Layout) -> None:
    """Refuse what several processes cannot do together with other settings of the runtime."""
    if runtime.offload not in ("none", "auto"):
        raise ValueError(
            f"runtime.offload={runtime.offload} does not go together with several processes; where the weights do not "
            "fit write runtime.offload=none runtime.shard_weights=true"
        )
    if runtime.cache == "first_block" and runtime.shard_weights:
        raise ValueError(
            "runtime.cache=first_block skips a step in one pass and not in the other, and processes that share weights "
            "must gather them at the same time: write runtime.cache=taylor or none"
        )
    if layout.method == "ring" and (runtime.attention == "native" or runtime.device == "cpu"):
        raise ValueError(
            "runtime.context_parallel=ring joins the parts of attention by their log-sum-exp, which torch's native "
            "attention does not return: write runtime.attention=cudnn, flash2 or sage, or "
            "runtime.context_parallel=ulysses"
        )
    if layout.context > 1 and runtime.attention == "flash3":
        raise ValueError(
            "runtime.attention=flash3 is not among the kernels that diffusers runs with runtime.context_parallel: "
            "write runtime.attention=auto, flash2, cudnn or sage"
        )
    if runtime.shard_weights:
        for name, plain in (("precision", "as_is"), ("compile", "none")):
            if getattr(runtime, name) != plain:
                raise ValueError(
                    f"runtime.{name}={getattr(runtime, name)} does not go together with runtime.shard_weights=true: "
                    f"write runtime.{name}={plain}, or leave the weights whole"
                )


def _check_model(layout: Layout, *, runtime: RuntimeSettings, model: ModelSettings) -> None:
    """Refuse what the network's shape does not allow."""
    heads = model.network.transformer["num_attention_heads"]
    if layout.method == "ulysses" and heads % layout.context:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(
            f"runtime.context_parallel=ulysses gives each of {layout.context} processes equally many of the model's "
            f"{heads} attention heads: start as many processes as divide them ({fitting}"
            f"{', each twice for guidance_parallel' if layout.guidance > 1 else ''}), or use ring"
        )
    if layout.context > 1 and model.memory_attention == "cached" and runtime.memory_cache == "recompute":
        raise ValueError(
            "runtime.memory_cache=recompute puts memory and video into one forward, whose tokens "
            "runtime.context_parallel cannot tell apart: write runtime.memory_cache=device or cpu"
        )
