"""MagCache's ratios (arXiv 2506.09045): how the transformers' residual grows from step to step, measured once.

The ratios belong to a model, its adapter and its sampler. They are measured in one shot in which nothing is skipped,
and kept in a JSON file that says what they were measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from storymem.io import FileError, read_json, write_json
from storymem.wan.settings import ModelSettings, SamplerSettings

_LARGEST_RATIO = 1e6


@dataclass(kw_only=True)
class Magnitudes:
    """Ratios of one expert's residual norms, a list for each step, with as many entries as the step has passes.

    With r_t = (output of the last block) - (input of the first) at step t: the mean over tokens of |r_t| / |r_(t-1)|,
    and 1 for the first step.
    """

    ratios: list[list[float]] = field(default_factory=list)
    _latents: Tensor | None = None
    _input: Tensor | None = None
    _norm: Tensor | None = None  # of the residual [B, tokens], of the forward that is under way
    _before: list[Tensor] = field(default_factory=list)
    _now: list[Tensor] = field(default_factory=list)

    def first_block(self, hidden_states: Tensor) -> None:
        self._input = hidden_states

    def last_block(self, output: Tensor) -> None:
        assert self._input is not None
        self._norm = (output - self._input).float().norm(dim=-1)

    def leave(self, latents: Tensor) -> None:
        """A forward ends; a new step is told by other latents."""
        assert self._norm is not None
        if latents is not self._latents:
            self._latents, self._before, self._now = latents, self._now, []
            self.ratios.append([])
        before = self._before[len(self._now)] if self._before else self._norm
        self.ratios[-1].append((self._norm / (before + 1e-8)).mean().item())
        self._now.append(self._norm)


@contextmanager
def measured(experts: Mapping[str, Any]) -> Iterator[dict[str, Magnitudes]]:
    """Watch the experts during one shot; read the result after the block."""
    found = {name: Magnitudes() for name in experts}
    handles = []
    for name, expert in experts.items():
        of, first, last = found[name], expert.blocks[0], expert.blocks[-1]

        def begin(_: Any, args: Any, of: Magnitudes = of) -> None:
            of.first_block(args[0])

        def end(_: Any, args: Any, output: Tensor, of: Magnitudes = of) -> None:
            of.last_block(output)

        def leave(_: Any, args: Any, kwargs: Any, output: Any, of: Magnitudes = of) -> None:
            of.leave(kwargs["hidden_states"])

        handles += [
            first.register_forward_pre_hook(begin),
            last.register_forward_hook(end),
            expert.register_forward_hook(leave, with_kwargs=True),
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def write_ratios(
    path: Path, found: Mapping[str, Magnitudes], *, model: ModelSettings, sampler: SamplerSettings
) -> None:
    """Keep what :func:`measured` found, the mean of both passes of guidance, for ``runtime.cache_ratios``."""
    ratios = {name: [sum(step) / len(step) for step in of.ratios] for name, of in found.items()}
    content = {"measured_with": _provenance(model, sampler), "ratios": ratios}
    write_json(path, content)


def read_ratios(path: str | Path, *, model: ModelSettings, sampler: SamplerSettings) -> dict[str, list[float]]:
    """The ratios of each expert, ``transformer`` and ``transformer_2``.

    Raises:
        ValueError: if the file is absent or damaged, or was measured with another model or sampler.
    """
    path = Path(path).expanduser()
    again = f"measure again: python -m benchmarks.acceleration --model {model.name} --calibrate {path}"
    try:
        content = read_json(path)
    except (FileError, FileNotFoundError) as error:
        reason = "No such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"runtime.cache_ratios={path} cannot be read ({reason}); {again}") from None
    if not _holds_ratios(content):
        raise ValueError(f"runtime.cache_ratios={path} cannot be read (it holds no ratios); {again}")
    measured_with, ratios = content["measured_with"], content["ratios"]
    for key, value in _provenance(model, sampler).items():
        if measured_with.get(key) != value:
            raise ValueError(
                f"runtime.cache_ratios={path} was measured with {key} {measured_with.get(key)}, and this is {key} "
                f"{value}; {again}"
            )
    if len(ratios) == 2 and sum(map(len, ratios.values())) != sampler.steps:
        raise ValueError(
            f"runtime.cache_ratios={path} does not hold a ratio for each of {sampler.steps} steps; {again}"
        )
    return {name: [float(ratio) for ratio in steps] for name, steps in ratios.items()}


def _holds_ratios(content: Any) -> bool:
    """Whether JSON has the form of what :func:`write_ratios` writes."""
    if not isinstance(content, dict):
        return False
    if not all(isinstance(content.get(key), dict) for key in ("measured_with", "ratios")):
        return False
    lists = content["ratios"].values()
    return all(isinstance(steps, list) for steps in lists) and all(
        type(ratio) in (int, float) and 0 < ratio < _LARGEST_RATIO for steps in lists for ratio in steps
    )


def _provenance(model: ModelSettings, sampler: SamplerSettings) -> dict[str, Any]:
    return {
        "model": model.name,
        "scheduler": sampler.scheduler,
        "steps": sampler.steps,
        "shift": sampler.shift,
    }
