"""``runtime.offload: auto``: the fastest placement of the weights that fits a machine, and the reason."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from storymem.devices import resolve_device
from storymem.wan.estimate import GB, MEMORY_FRAMES, Estimate, estimate_shot
from storymem.wan.processes import Grid, Launch, divide
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings

logger = logging.getLogger(__name__)

_CONTEXT_BYTES, _GAPS = 1.5e9, 0.1  # driver and workspaces; gaps between tensors, as a share
_LIGHT_FILTER = int(1.7e9)  # CLIP ViT-L/14 with the LAION head


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to run on; bytes that are free.

    Args:
        name: of the accelerator, or "the CPU".
        vram: None: the CPU, or an accelerator that shares RAM.
        ram: None: not known.
        here: False for an accelerator that a plan is for and this machine lacks.
    """

    name: str
    vram: int | None
    ram: int | None
    here: bool = True

    def __str__(self) -> str:
        sizes = {"VRAM": self.vram, "RAM": self.ram}
        known = [f"{size / GB:.1f} GB of {kind}" for kind, size in sizes.items() if size is not None]
        return f"{self.name} with {' and '.join(known)} free" if known else self.name


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a film will run: settings without "auto", whether the machine has room for them, and a line for the user."""

    runtime: RuntimeSettings
    estimate: Estimate
    fits: bool
    reason: str


#: Ways to place the weights, fastest first: the preset that does the same, and its settings.
_WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {"offload": "none"}),
    ("gpu-80gb", {"offload": "model"}),
    ("gpu-32gb", {"offload": "group"}),
    ("", {"offload": "group", "vae_tiling": True}),
    ("", {"offload": "model", "experts": "in_turn"}),
    ("", {"offload": "group", "experts": "in_turn"}),
    ("gpu-24gb", {"offload": "group", "vae_tiling": True, "experts": "in_turn"}),
)
_DOING = {"texts": "encode texts", "encode": "encode images", "score": "choose keyframes"}


def this_machine(device: torch.device) -> Machine:
    """The machine of this process, seen from ``device``."""
    ram, _ = free_and_total_ram()
    if device.type in ("cpu", "mps"):
        return Machine(name="the CPU" if device.type == "cpu" else str(device), vram=None, ram=ram)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Machine(name=name, vram=torch.accelerator.get_memory_info(device)[0], ram=ram)


def free_and_total_ram() -> tuple[int, int]:
    """RAM for this process in bytes: free, and all there is, swap included.

    Containers and clusters allow a process less than the machine has, by Linux's control groups (version 2).
    """
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total + psutil.swap_memory().total
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


def _control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Folders of the control groups of this process, from its own to the root."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = root / own.removeprefix("0::").lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def choose_runtime(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    sampler: SamplerSettings | None = None,
    scorers: Sequence[int] = (0, 0),
    grid: Grid | None = None,
    machine: Machine | None = None,
) -> Choice:
    """``runtime`` with ``offload: auto`` settled: the fastest way that fits; if none does, the smallest.

    Precision is never lowered, as that changes the film. For a machine that is not here, the reason names what each way
    needs. Arguments as of :func:`estimate_shot`; ``machine`` None: this one.
    """
    machine = machine or this_machine(resolve_device(runtime.device))

    def tried(settled: RuntimeSettings, memory: int = MEMORY_FRAMES, scorers: Sequence[int] = scorers) -> Choice:
        estimate = estimate_shot(model, settled, sampler=sampler, grid=grid, memory_frames=memory, scorers=scorers)
        lacking = _lacking(estimate, machine)
        return Choice(runtime=settled, estimate=estimate, fits=not lacking, reason=lacking)

    ways = [tried(way) for way in _ways(model, runtime, machine)]
    if not machine.here:
        needs = "; ".join(f"{_named(way.runtime)} needs {_needs(way.estimate)}" for way in ways)
        return replace(ways[0], fits=True, reason=f"planned for {machine.name}, not for this machine: {needs}")
    if runtime.offload != "auto":
        return ways[0] if ways[0].fits else replace(ways[0], reason=f"{machine}: {ways[0].reason}")
    for faster, way in zip([None, *ways], ways, strict=False):
        if way.fits:
            why = f", because for {_named(faster.runtime)} {faster.reason}" if faster else ""
            return replace(way, reason=f"{machine}: {_named(way.runtime)}{why}")
    last = ways[-1]
    options = {
        "runtime.precision=fp8_storage": tried(replace(last.runtime, precision="fp8_storage")),
        "scorer/quality=laion-v1": tried(last.runtime, scorers=(scorers[0], min(scorers[1], _LIGHT_FILTER))),
        "memory.recall.capacity=4": tried(last.runtime, memory=4),
    }
    fitting = " or ".join(name for name, option in options.items() if option.fits)
    ram = f"{_rounded_up(_needed_ram(last.estimate, machine))} of RAM"
    needs = ram if machine.vram is None else _needs(last.estimate)
    advice = f"{fitting} would fit" if fitting else f"use a machine with {needs}, or a smaller model.video"
    return replace(last, reason=f"{machine}: {last.reason}; {advice}")


def _ways(model: ModelSettings, runtime: RuntimeSettings, machine: Machine) -> list[RuntimeSettings]:
    """``runtime`` in every way in which it can place the weights, fastest first."""
    if runtime.offload != "auto":
        return [runtime]
    ways = [changes for _, changes in _WAYS]
    if runtime.spread:
        ways = ways[:1]
    elif machine.vram is None and machine.here:  # there is nothing to move weights to
        ways = [{"offload": "none"}, {"offload": "none", "experts": "in_turn"}]
    if len(model.spec.experts) < 2 or (model.adapter is not None and model.adapter.query):
        ways = [changes for changes in ways if "experts" not in changes]
    return [replace(runtime, **changes) for changes in ways]


def settle(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    sampler: SamplerSettings | None = None,
    scorers: Sequence[int] = (0, 0),
) -> RuntimeSettings:
    """``runtime`` without "auto"; logs the choice or warns of an explicit one that is tight, or a ValueError."""
    grid = divide(runtime, Launch.of(runtime).world) if runtime.spread else None
    choice = choose_runtime(model, runtime, sampler=sampler, scorers=scorers, grid=grid)
    if runtime.offload == "auto":
        if not choice.fits:
            raise ValueError(f"runtime.offload=auto finds no room for {model.name} on {choice.reason}")
        logger.info("runtime: %s", choice.reason)
    elif not choice.fits:
        _, total = free_and_total_ram()
        on_cpu = resolve_device(runtime.device).type == "cpu"
        needed = choice.estimate.shared_ram if on_cpu else choice.estimate.ram
        if needed > total:
            raise ValueError(
                f"{model.name} with runtime.offload={runtime.offload} needs {needed / GB:.1f} GB of RAM, and this "
                f"machine has {total / GB:.1f} GB in all, swap included: use a smaller model.video or another machine"
            )
        logger.warning("runtime.offload=%s may run out of memory on %s", runtime.offload, choice.reason)
    return choice.runtime


def needed_vram(estimate: Estimate) -> int:
    """Bytes of VRAM that must be free for a shot."""
    return int(estimate.peak.total * (1 + _GAPS) + _CONTEXT_BYTES)


def _lacking(estimate: Estimate, machine: Machine) -> str:
    """What a machine lacks, in words; empty if nothing."""
    lacking = []
    if machine.vram is not None and (vram := needed_vram(estimate)) > machine.vram:
        doing = _DOING.get(estimate.peak.name, estimate.peak.name)
        lacking.append(f"{vram / GB:.1f} GB of VRAM are needed (to {doing})")
    if machine.ram is not None and (ram := _needed_ram(estimate, machine)) > machine.ram:
        lacking.append(f"{ram / GB:.1f} GB of RAM are needed")
    return " and ".join(lacking)


def _needed_ram(estimate: Estimate, machine: Machine) -> int:
    """Without VRAM all stages take place in RAM."""
    return estimate.shared_ram if machine.vram is None else estimate.ram


def _named(runtime: RuntimeSettings) -> str:
    """How the weights are placed, and the preset that does the same."""
    plain = RuntimeSettings()
    names = [name for name in ("vae_tiling", "experts") if getattr(runtime, name) != getattr(plain, name)]
    way = {name: getattr(runtime, name) for name in ("offload", *names)}
    preset = next((name for name, changes in _WAYS if changes == way), "") if runtime.precision == "as_is" else ""
    text = " and ".join(name if value is True else f"{name}={value}" for name, value in way.items())
    return f"{text} (runtime={preset})" if preset else text


def _needs(estimate: Estimate) -> str:
    return f"{_rounded_up(needed_vram(estimate))} of VRAM and {_rounded_up(estimate.ram)} of RAM"


def _rounded_up(size: int) -> str:
    return f"{math.ceil(size / GB)} GB"
