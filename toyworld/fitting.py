"""The training loop of every toy stage: a schedule by the clock or by steps, checkpoints, EMA, logs.

A stage gives a loss for step n; data depend on n alone, so a resumed run sees what an uninterrupted one would have.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toyworld.muon import Muon


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a stage trains and how its learning rate runs: linear warm-up, then half a cosine down to nothing.

    Exactly one of `minutes` (of training, counted over all resumed runs) and `steps` is given.
    """

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    save_every: float = 120.0  # seconds
    log_every: int = 20

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give a stage either minutes or steps, not both and not neither")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 0..1."""
        done = step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 1.0))
        return min(1.0, done)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(cosine, 0.01)


class Ema:
    """A running average of a model's parameters, which is what is measured and saved."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in model.parameters()]

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the parameters as they are after `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], weight)

    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged and the live parameters; twice is no change."""
        for value, parameter in zip(self.values, model.parameters(), strict=True):
            held = parameter.detach().clone()
            parameter.data.copy_(value)
            value.copy_(held)


class Run:
    """A stage's folder: `checkpoint.pt` (replaced atomically), `log.jsonl`, pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, **record: Any) -> None:
        """Append one line to the log, and say it."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(self.folder.name, line, flush=True)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; an interrupted write leaves the old one."""
        part = self.folder / "checkpoint.part"
        torch.save(state, part)
        os.replace(part, self.folder / "checkpoint.pt")

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def averaged(run: Run, model: nn.Module) -> nn.Module:
    """The model with the averaged weights of a stage's newest checkpoint, whether the stage is done or not."""
    state = run.load()
    if state is None:
        raise ValueError(
            f"the stage {run.folder.name} has not been trained yet: there is no {run.folder}/checkpoint.pt"
        )
    model.load_state_dict(state["model"])
    for parameter, value in zip(model.parameters(), state["ema"], strict=True):
        parameter.data.copy_(value)
    return model


def fit(
    model: nn.Module,
    run: Run,
    schedule: Schedule,
    loss: Callable[[int, float], tuple[Tensor, dict[str, float]]],
    *,
    report: Callable[[int], None] | None = None,
    report_at: Iterable[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    clip: float = 1.0,
) -> None:
    """Train until the schedule is done; the model is left with its averaged weights.

    loss(step, progress) gives the loss and figures to log. report(step) is called with averaged weights in place
    whenever the progress passes one of `report_at`.
    """
    optimizer, ema = Muon(model), Ema(model, schedule.ema)
    step, seconds = _resume(run, model, optimizer, ema)
    marks = [m for m in report_at if m > schedule.progress(step, seconds)]
    saved = clock = time.monotonic()
    while (progress := schedule.progress(step, seconds)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, progress)
        value, figures = loss(step, progress)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if torch.isfinite(norm):  # one broken batch must not undo an hour
            optimizer.step()
            ema.update(model, step)
        step += 1
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        if step % schedule.log_every == 0:
            run.log(step=step, seconds=round(seconds), loss=float(value.detach()), norm=float(norm.detach()), **figures)
        if now - saved > schedule.save_every:
            _save(run, model, optimizer, ema, step, seconds)
            saved = now
        if report and marks and schedule.progress(step, seconds) >= marks[0]:
            marks = [m for m in marks if m > schedule.progress(step, seconds)]
            ema.swap(model)
            report(step)
            ema.swap(model)
            clock = time.monotonic()
    _save(run, model, optimizer, ema, step, seconds)
    ema.swap(model)


def _resume(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> tuple[int, float]:
    state = run.load()
    if state is None:
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for value, saved in zip(ema.values, state["ema"], strict=True):
        value.copy_(saved)
    return int(state["step"]), float(state["seconds"])


def _save(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int, seconds: float) -> None:
    run.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.values,
            "step": step,
            "seconds": seconds,
        }
    )
