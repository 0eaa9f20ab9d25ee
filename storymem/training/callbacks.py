"""Callbacks of the training loop: rows of the log with lines in a terminal, and validation."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from storymem.training.method import ExpertTraining
from storymem.training.objectives.samples import Samples
from storymem.training.run_log import RunLog
from storymem.training.trainer import StepReport, Sums, Trainer, add_sums


class LogMetrics:
    """Means of every so many steps, over all processes, as rows of the log; the main process prints a line too.

    The first row of a resumed run is of the steps since then.

    Args:
        log: of the main process; None on the others.
        every: steps between rows.
    """

    def __init__(self, log: RunLog | None, *, every: int) -> None:
        self._log, self._every = log, every
        self._reports: list[StepReport] = []

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if not report.sums:  # of a step before the run was resumed
            return
        self._reports.append(report)
        if report.step % self._every and report.step != trainer.steps:
            return
        means = reduced_means([report.sums for report in self._reports], trainer.accelerator)
        reports, self._reports = self._reports, []
        if self._log is None:
            return
        count, elapsed = len(reports), sum(r.seconds for r in reports)  # without validation, films and checkpoints
        row = means | {
            "lr": report.lr,
            "grad_norm": sum(r.grad_norm for r in reports) / count,
            "samples_per_second": sum(r.samples for r in reports) / elapsed,
            "peak_gb": peak_gb(trainer.accelerator.device),
            "seconds_step": elapsed / count,
            "seconds_data": sum(r.seconds_data for r in reports) / count,
        }
        self._log.row(report.step, row)
        left = tqdm.format_interval((trainer.steps - report.step) * elapsed / count)
        print(
            f"step {report.step} of {trainer.steps}: loss {means['loss']:.4f}, {elapsed / count:.2f} s a step; about "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )


class Validation:
    """Loss of every trained expert on held-out groups: the same samples, noise and timesteps each time.

    The samples are shared among the processes; the result does not depend on how many there are. ``held_out`` are
    samples of which a step has one; the last step is always validated.
    """

    def __init__(
        self,
        method: ExpertTraining,
        held_out: Samples,
        *,
        samples: int,
        every: int,
        log: RunLog | None,
    ) -> None:
        self._method, self._held_out = method, held_out
        self._plans = [held_out.plan(step)[0] for step in range(samples)]
        self._every, self._log = every, log

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self._every and report.step != trainer.steps:
            return
        values = self.losses(trainer)
        if self._log is not None:
            self._log.row(report.step, values)

    def losses(self, trainer: Trainer) -> dict[str, Any]:
        """``valid_loss_high_noise``, ``valid_video_loss_high_noise`` ... -> value, with the averaged parameters if any.

        The second is that of the video's slots alone, whatever the weights are: runs that differ in them or in the
        memory mode can be compared by it. With masks there is ``valid_subject_loss_high_noise``, where they are white.
        """
        accelerator = trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        rounds = -(-len(self._plans) // world)  # of all processes: sharded networks gather their parameters together
        values: dict[str, Any] = {}
        with trainer.averaged():
            for expert in self._method.experts.networks:
                mine = []
                for number in range(rounds):
                    plan = self._plans[min(number * world + rank, len(self._plans) - 1)]
                    losses = self._method.evaluate(expert, trainer.together(partial(self._held_out.read, plan)))
                    total, count = losses.sums["loss_video"]
                    mine.append(torch.stack([losses.total, total / count, *losses.sums.get("loss_subject", ())]))
                # [world, rounds, 2 or 4], process by process; brought back into the order of the plans.
                gathered = accelerator.gather(torch.stack(mine)).view(world, rounds, -1).transpose(0, 1).flatten(0, 1)
                means = gathered[: len(self._plans)].cpu().double().mean(dim=0).tolist()
                values |= {f"valid_loss_{expert}": means[0], f"valid_video_loss_{expert}": means[1]}
                if len(means) > 2:
                    values[f"valid_subject_loss_{expert}"] = _mean(*means[2:])
        return values


def reduced_means(sums: Sequence[Sums], accelerator: Accelerator) -> dict[str, Any]:
    """Means over steps and processes of what a method logs: numbers, and lists of them; None where there is none.

    The names must be the same on all processes.
    """
    totals: Sums = {}
    for of_step in sums:
        add_sums(totals, of_step)
    flat = torch.cat([total.flatten() for total in totals.values()])
    parts = accelerator.reduce(flat, "sum").cpu().split([total.numel() for total in totals.values()])
    means: dict[str, Any] = {}
    for (name, total), part in zip(totals.items(), parts, strict=True):
        values = [_mean(*pair) for pair in part.view(2, -1).T.tolist()]
        means[name] = values if total.ndim > 1 else values[0]
    return means


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def peak_gb(device: torch.device) -> float:
    """Peak VRAM of this process in GB (10^9 bytes); its peak RAM if it runs on a CPU."""
    if device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9
