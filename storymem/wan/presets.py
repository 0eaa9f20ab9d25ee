"""``runtime.offload: auto``: which way of placing the weights a machine has room for, and why."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from storymem.wan.layout import Launch, Layout, divide
from storymem.wan.memory_estimate import MemoryEstimate, estimate_memory
from storymem.wan.runtime import resolve_device
from storymem.wan.settings import ModelSettings, Offload, RuntimeSettings, SamplerSettings

logger = logging.getLogger(__name__)

#: The memory that shots are taken to look back at where nothing says how large it is: the published capacity.
MEMORY_FRAMES = 10

#: What lies on an accelerator besides live tensors: driver and workspaces, and holes between tensors as a share.
CONTEXT_BYTES, HOLES = 1.5e9, 0.1

_GB = 1e9
#: Ways to place the weights, fastest first, and the preset that writes each out.
_WAYS: tuple[tuple[Offload, bool, str], ...] = (
    ("none", False, ""),
    ("model", False, "gpu-80gb"),
    ("group", False, "gpu-32gb"),
    ("group", True, "gpu-24gb"),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to run on; sizes in bytes, None where they cannot be known.

    Args:
        name: of the accelerator, or "the CPU".
        memory: free memory of the accelerator; None: the CPU, or one that shares main memory.
        host: free main memory.
        here: False for an accelerator that a plan is for and this machine lacks, with unknown memory.
    """

    name: str
    memory: int | None
    host: int | None
    here: bool = True

    def __str__(self) -> str:
        has = f"{self.name} with {self.memory / _GB:.1f} GB free" if self.memory is not None else self.name
        return has if self.host is None else f"{has}, {self.host / _GB:.0f} GB of main memory"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a film will run.

    Args:
        runtime: without "auto" in ``offload``.
        estimate: of its most demanding shot.
        fits: whether the machine has room for it.
        reason: one line for people.
    """

    runtime: RuntimeSettings
    estimate: MemoryEstimate
    fits: bool
    reason: str


def this_machine(device: torch.device) -> Machine:
    """The machine this process runs on, as far as ``device`` and main memory go."""
    host, _ = main_memory()
    if device.type == "cpu":
        return Machine(name="the CPU", memory=None, host=host)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "mps":
        return Machine(name=name, memory=None, host=host)
    free, _ = torch.accelerator.get_memory_info(device)
    return Machine(name=name, memory=free, host=host)


def main_memory() -> tuple[int, int]:
    """Main memory for this process in bytes: what is free, and all there is, swap included.

    Containers and clusters allow a process less than the machine has.
    """
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    free, total = machine.available, machine.total + swap.total
    for folder in _control_groups():
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            files = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        free = min(free, max(0, limit - used + (int(files[1]) if files else 0)))
        total = min(total, limit)
    return free, total


def _control_groups() -> list[Path]:
    """Folders of Linux's control groups (version 2) that this process is in, from its own to the root."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = _CONTROL_GROUPS / own.removeprefix("0::").lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(_CONTROL_GROUPS))]


_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def choose_runtime(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    sampler: SamplerSettings | None = None,
    memory_frames: int = MEMORY_FRAMES,
    frames: int | None = None,
    scorers: int = 0,
    machine: Machine | None = None,
    layout: Layout | None = None,
) -> Choice:
    """``runtime`` with its "auto" settled: the fastest way that fits; if none does, the smallest, and what would.

    A runtime that leaves nothing open comes back as it is, with its estimate. Precision is never lowered here, as that
    changes the picture. For an accelerator that is not here, the reason says what each way needs.

    Args:
        machine: None: this one.
        model, runtime, sampler, memory_frames, frames, scorers, layout: see
            :func:`storymem.wan.memory_estimate.estimate_memory`.
    """
    machine = machine or this_machine(resolve_device(runtime.device))

    def tried(settled: RuntimeSettings, **changes: int) -> Choice:
        shot: dict[str, Any] = {"memory_frames": memory_frames, "frames": frames, "scorers": scorers} | changes
        estimate = estimate_memory(model, settled, sampler=sampler, layout=layout, **shot)
        short = _short_of(estimate, machine)
        return Choice(runtime=settled, estimate=estimate, fits=not short, reason=short)

    if runtime.offload != "auto":
        ways = [tried(runtime)]
    elif runtime.spread or (machine.memory is None and machine.here):
        ways = [tried(replace(runtime, offload="none"))]
    else:
        ways = [
            tried(replace(runtime, offload=offload, vae_tiling=runtime.vae_tiling or tiling))
            for offload, tiling, _ in _WAYS
        ]
    if not machine.here:
        needs = "; ".join(f"{_placement(way.runtime)}, needs {_needs(way.estimate)}" for way in ways)
        return replace(ways[0], fits=True, reason=f"planned for {machine.name}, not for this machine: {needs}")
    if runtime.offload != "auto":
        return ways[0] if ways[0].fits else replace(ways[0], reason=f"{machine}: {ways[0].reason}")
    number = next((n for n, way in enumerate(ways) if way.fits), None)
    if number is not None:
        return replace(ways[number], reason=_why(machine, ways, number))
    last = ways[-1]
    options = [
        ("runtime.precision=fp8_storage", tried(replace(last.runtime, precision="fp8_storage"))),
        ("scorer/quality=laion-v1", tried(last.runtime, scorers=min(scorers, _LIGHT_SCORERS))),
        ("memory.recall.capacity=4", tried(last.runtime, memory_frames=min(memory_frames, 4))),
    ]
    return replace(last, reason=f"{machine}: {last.reason}; {_what_would(options, last, machine)}")


#: CLIP for novelty and the light quality filter.
_LIGHT_SCORERS = int(2.3e9)


def settle(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    sampler: SamplerSettings | None = None,
    scorers: int = 0,
    experts: bool = True,
) -> RuntimeSettings:
    """``runtime`` without "auto", to load ``model`` with; the log says what was chosen and why.

    Args:
        experts: whether they are loaded; all else has room wherever they could work.
        model, runtime, sampler, scorers: see :func:`choose_runtime`.

    Raises:
        ValueError: if nothing fits, with what would.
    """
    if runtime.offload != "auto":
        return runtime
    if not experts:
        return replace(runtime, offload="none")
    layout = divide(runtime, Launch.of(runtime).world) if runtime.spread else None
    choice = choose_runtime(model, runtime, sampler=sampler, scorers=scorers, layout=layout)
    if not choice.fits:
        raise ValueError(f"runtime.offload=auto finds no room for {model.name} on {choice.reason}")
    logger.info("runtime: %s", choice.reason)
    return choice.runtime


def check_room(
    model: ModelSettings, runtime: RuntimeSettings, *, sampler: SamplerSettings | None = None, scorers: int = 0
) -> RuntimeSettings:
    """:func:`settle`, and what this machine lacks for a placement that was asked for is said; before anything loads.

    Args:
        model, runtime, sampler, scorers: see :func:`choose_runtime`.

    Raises:
        ValueError: if nothing fits, or main memory could never hold what the placement needs.
    """
    if runtime.offload == "auto":
        return settle(model, runtime, sampler=sampler, scorers=scorers)
    layout = divide(runtime, Launch.of(runtime).world) if runtime.spread else None
    choice = choose_runtime(model, runtime, sampler=sampler, scorers=scorers, layout=layout)
    if choice.fits:
        return runtime
    _, total = main_memory()
    on_cpu = resolve_device(runtime.device).type == "cpu"
    needed = max(choice.estimate.host, choice.estimate.peak.total if on_cpu else 0)
    if needed > total:
        raise ValueError(
            f"{model.name} with runtime.offload={runtime.offload} needs {needed / _GB:.1f} GB of main memory, and this "
            f"machine has {total / _GB:.1f} GB in all, swap included: use a smaller model.video or another machine"
        )
    logger.warning("runtime.offload=%s as asked, although on %s", runtime.offload, choice.reason)
    return runtime


def needed_bytes(estimate: MemoryEstimate) -> int:
    """What a card must have free for a shot of ``estimate``."""
    return int(estimate.peak.total * (1 + HOLES) + CONTEXT_BYTES)


def _short_of(estimate: MemoryEstimate, machine: Machine) -> str:
    """What a machine lacks for ``estimate``, in words; empty if nothing."""
    if machine.memory is None:
        # All stages take place in main memory, where scorers stay.
        needed = max(estimate.host, estimate.peak.total)
        if machine.host is not None and needed > machine.host:
            return f"{needed / _GB:.1f} GB of main memory are needed"
        return ""
    lacks = []
    if needed_bytes(estimate) > machine.memory:
        lacks.append(f"{needed_bytes(estimate) / _GB:.1f} GB on the card are needed (to {_DOING[estimate.peak.name]})")
    if machine.host is not None and estimate.host > machine.host:
        lacks.append(f"{estimate.host / _GB:.1f} GB of main memory are needed to hold the weights")
    return " and ".join(lacks)


_DOING = {
    "texts": "encode texts",
    "encode": "encode pictures",
    "denoise": "denoise",
    "decode": "decode",
    "score": "choose keyframes",
}


def _why(machine: Machine, ways: Sequence[Choice], number: int) -> str:
    says = f"{machine}: {_placement(ways[number].runtime)}"
    if number:
        faster = ways[number - 1]
        says += f", since for offload={faster.runtime.offload} {faster.reason}"
    return says


def _placement(runtime: RuntimeSettings) -> str:
    """How the weights are placed, and the preset that is of, if there is one."""
    presets = {(offload, tiling): preset for offload, tiling, preset in _WAYS if preset}
    preset = presets.get((runtime.offload, runtime.vae_tiling))
    placed = f"offload={runtime.offload}" + (" and vae_tiling" if runtime.vae_tiling else "")
    return f"{placed}, as runtime={preset}" if preset else placed


def _needs(estimate: MemoryEstimate) -> str:
    return f"{needed_bytes(estimate) / _GB:.0f} GB on the card and {estimate.host / _GB:.0f} GB of main memory"


def _what_would(options: Sequence[tuple[str, Choice]], last: Choice, machine: Machine) -> str:
    fitting = [name for name, option in options if option.fits]
    if fitting:
        return f"{' or '.join(fitting)} would fit"
    whole = max(last.estimate.host, last.estimate.peak.total)
    needs = f"{whole / _GB:.0f} GB of main memory" if machine.memory is None else _needs(last.estimate)
    return f"a machine with {needs} would do, or a smaller model.video"
