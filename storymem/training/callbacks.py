"""What is done beside training: rows of the log, validation, lines in a terminal."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from storymem.training.dataset import Latents, MemoryDataset, SamplePlanner
from storymem.training.method import MemoryTraining
from storymem.training.run_log import RunLog
from storymem.training.trainer import StepReport, Trainer

Sums = Mapping[str, tuple[Tensor, Tensor]]


class LogMetrics:
    """Means of every so many steps, over all processes, as rows of the log; and a line for who is watching.

    The first row of a run that is taken up is of the steps since then.

    Args:
        log: of the main process; None on the others.
        every: steps between rows.
        watch: whether to print lines.
    """

    def __init__(self, log: RunLog | None, *, every: int, watch: bool = False) -> None:
        self._log, self._every, self._watch = log, every, watch
        self._reports: list[StepReport] = []
        self._last: float | None = None

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if not report.sums:  # of a step before the run was taken up
            return
        self._last = self._last or time.perf_counter() - sum(report.seconds.values())
        self._reports.append(report)
        if report.step % self._every and report.step != trainer.steps:
            return
        means = reduced_means([report.sums for report in self._reports], trainer.accelerator)
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        reports, self._reports = self._reports, []
        if self._log is None:
            return
        spent = sum(sum(r.seconds.values()) for r in reports)
        seconds = {f"seconds_{part}": sum(r.seconds[part] for r in reports) / len(reports) for part in report.seconds}
        row = means | {
            "lr": report.lr,
            "grad_norm": sum(r.grad_norm for r in reports) / len(reports),
            "samples_per_second": sum(r.samples for r in reports) / elapsed,
            "memory_gb": memory_gb(trainer.accelerator.device),
            **seconds,
            "seconds_other": max(0.0, elapsed - spent) / len(reports),
        }
        self._log.row(report.step, row)
        if self._watch:
            left = tqdm.format_interval((trainer.steps - report.step) * elapsed / len(reports))
            print(
                f"step {report.step} of {trainer.steps}: loss {means['loss']:.4f}, "
                f"{elapsed / len(reports):.2f} s a step; about {left} left",
                file=sys.stderr,
                flush=True,
            )


class Validation:
    """Loss of every trained expert on held-out groups: the same samples, noise and timesteps each time.

    The samples are shared among the processes; the result does not depend on how many there are.

    Args:
        method: what is trained.
        latents: where the samples come from.
        planner: of held-out samples, one a step.
        samples: how many.
        every: steps between validations; the last step is always validated.
        log: of the main process.
    """

    def __init__(
        self,
        method: MemoryTraining,
        latents: Latents,
        planner: SamplePlanner,
        *,
        samples: int,
        every: int,
        log: RunLog | None,
    ) -> None:
        assert planner.samples == 1
        self._method, self._dataset = method, MemoryDataset(latents)
        self._plans = [planner.plan(step)[0] for step in range(samples)]
        self._every, self._log = every, log

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self._every and report.step != trainer.steps:
            return
        values = self.losses(trainer)
        if self._log is not None:
            self._log.row(report.step, values)

    def losses(self, trainer: Trainer) -> dict[str, Any]:
        """``valid_loss_high_noise``, ``valid_video_loss_high_noise`` ... -> value, with the averaged parameters if any.

        The second is that of the video's slots alone, whatever the weights say: runs that differ in them or in the
        memory mode can be compared by it. With masks there is ``valid_subject_loss_high_noise``, where they are white.
        """
        accelerator = trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        # Sharded networks gather their parameters together, so every process runs as many samples.
        rounds = -(-len(self._plans) // world)
        values: dict[str, Any] = {}
        with trainer.averaged():
            for expert in self._method.experts.networks:
                mine = []
                for number in range(rounds):
                    plan = self._plans[min(number * world + rank, len(self._plans) - 1)]
                    losses = self._method.evaluate(expert, trainer.together(partial(self._dataset.__getitem__, plan)))
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
    totals: dict[str, Tensor] = {}
    for of_step in sums:
        for name, pair in of_step.items():
            both = torch.stack([part.float().reshape(-1) for part in pair])
            totals[name] = both if name not in totals else totals[name] + both
    flat = torch.cat([both.flatten() for both in totals.values()])
    parts = accelerator.reduce(flat, "sum").cpu().split([both.numel() for both in totals.values()])
    means: dict[str, Any] = {}
    for (name, both), part in zip(totals.items(), parts, strict=True):
        values = [_mean(total, count) for total, count in part.view(2, -1).T.tolist()]
        means[name] = values if both.shape[1] > 1 else values[0]
    return means


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def memory_gb(device: torch.device) -> float:
    """The most memory in GB (10^9 bytes) that this process has held on its accelerator, or of the CPU's."""
    if device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9
