"""The loop: batches in, steps of the optimizer, checkpoints; it knows no model and no method."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from storymem.training.checkpoints import Checkpoints
from storymem.training.ema import MovingAverage
from storymem.training.optimizers import (
    build_optimizer,
    build_schedule,
    load_optimizer_state,
    optimizer_state,
)
from storymem.training.settings import OptimizerSettings
from storymem.training.sharding import assign, whole

_ADAPTER, _AVERAGE, _STATE = "adapter", "average", "state.pt"


class NonFiniteLoss(ValueError):
    """A loss or gradient that is NaN or infinite; names the clips. No checkpoint holds what it would have done."""


class Stopped(SystemExit):
    """SIGTERM or SIGINT came; the run is saved. The exit status is 128 + the signal's number: 143 or 130."""


class LossesLike(Protocol):
    """What a method says of a batch: a loss to follow down, and (sum, number) pairs to log."""

    @property
    def total(self) -> Tensor: ...
    @property
    def sums(self) -> dict[str, tuple[Tensor, Tensor]]: ...


class BatchLike(Protocol):
    """A batch that can say what it is made of."""

    @property
    def ids(self) -> tuple[str, ...]: ...


class Method(Protocol):
    """What is trained; :class:`storymem.training.method.MemoryTraining` is one."""

    parameters: Mapping[str, nn.Parameter]

    def network(self, step: int) -> nn.Module: ...
    def loss(self, step: int, batch: Any) -> LossesLike: ...
    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> None: ...
    def load(self, folder: Path) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What came of a step.

    Args:
        step: how many steps are done, this one included.
        sums: what the method logs: name -> (sum, number) over this process's samples.
        lr: the learning rate it ran at.
        grad_norm: before clipping, over all processes.
        samples: over all processes.
        seconds: wall time by part: waiting for data, forward and backward, optimizer.
    """

    step: int
    sums: dict[str, tuple[Tensor, Tensor]]
    lr: float
    grad_norm: float
    samples: int
    seconds: dict[str, float]


class Callback(Protocol):
    """Something that is done beside training: logging, validation, sampling. Called after every step."""

    def __call__(self, trainer: Trainer, report: StepReport) -> None: ...


class Trainer:
    """Trains the parameters of a method.

    Random numbers drawn inside networks (dropout) follow from ``seed``, step and process; so the place in the run is
    the whole random state, and a run that is taken up goes on exactly as it would have gone.

    Args:
        method: what is trained; only its parameters get gradients and optimizer state.
        batches: start step -> this process's batches from there on, ``accumulation`` of them a step; closed in the end.
        accelerator: the processes.
        optimizer: AdamW, schedule, clipping, average.
        steps: how long the run is.
        accumulation: batches of a step.
        seed: of the run.
        checkpoints: where they go; None: none are written.
        checkpoint_every: steps between them.
        callbacks: called in order after each step, before its checkpoint: what a checkpoint knows of is told.
    """

    def __init__(
        self,
        method: Method,
        batches: Callable[[int], Generator[Any, None, None]],
        *,
        accelerator: Accelerator,
        optimizer: OptimizerSettings,
        steps: int,
        accumulation: int = 1,
        seed: int = 0,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 500,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.method, self.accelerator, self.steps = method, accelerator, steps
        self.parameters = dict(method.parameters)
        self.optimizer = build_optimizer(optimizer, self.parameters.values())
        self.schedule = build_schedule(optimizer, self.optimizer, steps)
        self.average = None if optimizer.ema_decay is None else MovingAverage(self.parameters, optimizer.ema_decay)
        self.step = 0
        self._max_grad_norm = optimizer.max_grad_norm
        self._batches, self._accumulation, self._seed = batches, accumulation, seed
        self._checkpoints, self._checkpoint_every = checkpoints, checkpoint_every
        self.callbacks = list(callbacks)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            NonFiniteLoss: see there.
            Stopped: after SIGTERM or SIGINT, once the step is finished and saved. A second signal ends the process at
                once.
        """
        if self.step >= self.steps:
            return
        with closing(self._batches(self.step)) as batches, _stop_signals() as received:
            while self.step < self.steps:
                report, stop = self._train_step(batches, received)
                for callback in self.callbacks:
                    callback(self, report)
                due = self.step % self._checkpoint_every == 0 or self.step == self.steps
                if self._checkpoints is not None and (due or stop):
                    self.save(self._checkpoints)
                if stop and self.step < self.steps:
                    raise Stopped(128 + stop)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the parameters are their moving averages, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    def whole_parameters(self) -> dict[str, Tensor]:
        """All parameters, gathered from all processes, on the CPU; every process must ask at the same time."""
        return {name: whole(parameter.detach()).cpu().clone() for name, parameter in self.parameters.items()}

    def _train_step(self, batches: Iterator[Any], received: list[int]) -> tuple[StepReport, int]:
        """One step, and the signal that any process has received, or 0."""
        clock, seconds = time.perf_counter(), {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}

        def lap(part: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[part] += now - clock
            clock = now

        network = self.method.network(self.step)
        _seed_dropout(self._seed, self.step, self.accelerator.process_index)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        ids: list[str] = []
        loss = torch.zeros((), device=self.accelerator.device)
        samples = 0
        lap("optimizer")
        for number in range(self._accumulation):
            batch = next(batches)
            lap("data")
            last = number == self._accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(network):
                losses = self.method.loss(self.step, batch)
                self.accelerator.backward(losses.total / self._accumulation)
            loss += losses.total.detach()
            ids, samples = [*ids, *batch.ids], samples + len(batch.ids)
            _add(sums, losses.sums)
            lap("forward_backward")
        norm = self._clip()
        stop = self._agree(loss, norm, ids, received)  # waits for the device, so forward and backward end here
        lap("forward_backward")
        lr = float(self.schedule.get_last_lr()[0])
        self._apply()
        lap("optimizer")
        samples *= self.accelerator.num_processes
        report = StepReport(step=self.step, sums=sums, lr=lr, grad_norm=norm.item(), samples=samples, seconds=seconds)
        return report, stop

    def _clip(self) -> Tensor:
        """Clip the gradients and return their norm before it, over all processes."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            with_gradient = [p for p in self.parameters.values() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(with_gradient, self._max_grad_norm, norm)
        return whole(norm)

    def _agree(self, loss: Tensor, norm: Tensor, ids: list[str], received: list[int]) -> int:
        """Stop all processes if one has lost its numbers; else the signal that any of them has received, or 0."""
        bad = not bool(loss.isfinite())
        flags = torch.tensor(
            [[float(bad or not bool(norm.isfinite())), float(received[0] if received else 0)]],
            device=self.accelerator.device,
        )
        together = self.accelerator.gather(flags).view(-1, 2).amax(dim=0)
        if together[0] == 0:
            return int(together[1])
        told = gather_object([(bad, loss.item() / self._accumulation, ids)])
        guilty = [entry for entry in told if entry[0]] or told
        what = f"the loss is {guilty[0][1]}" if guilty[0][0] else f"the norm of the gradients is {norm.item()}"
        clips = ", ".join(id for _, _, those in guilty for id in those)
        raise NonFiniteLoss(
            f"step {self.step + 1}: {what}; the clips of this batch are {clips}. Nothing of this step was saved; look "
            "at these clips, or go on from the last checkpoint with a lower optimizer.lr"
        )

    def _apply(self) -> None:
        changed = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(changed)

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of this moment; every process must come here."""
        parameters = self.whole_parameters()
        with self.averaged():
            average = None if self.average is None else self.whole_parameters()
        state = {
            "step": self.step,
            "optimizer": optimizer_state(self.optimizer, self.parameters),
            "schedule": self.schedule.state_dict(),
            "average_updates": None if self.average is None else self.average.updates,
        }
        if self.accelerator.is_main_process:
            with checkpoints.writing(self.step) as folder:
                self.method.save(parameters, folder / _ADAPTER)
                if average is not None:
                    self.method.save(average, folder / _AVERAGE)
                torch.save(state, folder / _STATE)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, also on another number of processes."""
        for name, tensor in self.method.load(folder / _ADAPTER).items():
            assign(self.parameters[name], tensor)
        state = torch.load(folder / _STATE, weights_only=True)
        load_optimizer_state(self.optimizer, self.parameters, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        if self.average is not None:
            self.average.load(self.method.load(folder / _AVERAGE), state["average_updates"])
        self.step = state["step"]


def _add(sums: dict[str, tuple[Tensor, Tensor]], more: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (total, count) in more.items():
        before = sums.get(name)
        sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def _seed_dropout(seed: int, step: int, process: int) -> None:
    # Odd multipliers keep the three apart.
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + process) % 2**63)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list in place of dying; the second of a kind does what it did before."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for caught in (signal.SIGTERM, signal.SIGINT):
        before[caught] = signal.signal(caught, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
