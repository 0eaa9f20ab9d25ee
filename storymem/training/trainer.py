"""The training loop: batches, optimizer steps, checkpoints. What is trained, and by what loss, is the method's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storymem.io import FileError, NotFiniteError, check_finite, replacing
from storymem.stopping import NotedSignals, Stopped, noting_signals
from storymem.training.checkpoints import Checkpoint, Checkpoints
from storymem.training.method import ExpertTraining
from storymem.training.optimization import (
    MovingAverage,
    assign,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    whole,
    whole_tensors,
)
from storymem.training.run_settings import OptimizerSettings

_AVERAGE, _OPTIMIZER = "average", "optimizer.safetensors"
_ADVICE_ON_KERNELS = (
    ". The loss is finite, so a kernel of the backward pass in 16 bits may be at fault: on CUDA devices the same "
    "command with TORCH_CUDNN_SDPA_DEPRIORITIZED=1 in the environment resumes without cuDNN's attention; in another "
    "output, model.dtype=float32 uses no kernel of 16 bits"
)

T = TypeVar("T")
Sums = dict[str, Tensor]
"""Name -> sum and number of what is logged, [2] or [2, bins]."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Results of a step."""

    step: int  # how many steps are done, this one included
    sums: Sums = field(default_factory=dict)  # what the method logs, over this process's samples
    lr: float = 0.0
    grad_norm: float = 0.0  # before clipping, over all processes
    samples: int = 0  # over all processes
    seconds: float = 0.0  # of the whole step
    seconds_data: float = 0.0  # of it, waiting for data


class Callback(Protocol):
    """Called after every step: logging, validation, sampling.

    What takes long calls :meth:`Trainer.check_stop` now and then. If that stops the run, the callback is called again
    when the run resumes, with a report of the step alone.
    """

    def __call__(self, trainer: Trainer, report: StepReport) -> None: ...


class Trainer:
    """Trains the parameters of a method; only they get gradients and optimizer state.

    Random numbers drawn inside networks (dropout) follow from ``seed``, step and process; so the step is the whole
    random state, and a resumed run computes exactly what an uninterrupted one would.

    Args:
        batches: start step -> this process's batches from there on, ``accumulation`` of them a step; closed in the end.
        checkpoints: written every ``checkpoint_every`` steps; None: none are written.
        callbacks: called in order after each step, before its checkpoint: so they have seen all that it contains.
    """

    def __init__(
        self,
        method: ExpertTraining,
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
        options: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "weight_decay": optimizer.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **options)
        self.average = None if optimizer.ema_decay is None else MovingAverage(self.parameters, optimizer.ema_decay)
        self.step = 0
        self.callbacks = list(callbacks)
        self._learning_rate = learning_rate(optimizer, steps)
        self._max_grad_norm = optimizer.max_grad_norm
        self._batches, self._accumulation, self._seed = batches, accumulation, seed
        self._checkpoints, self._checkpoint_every = checkpoints, checkpoint_every
        self._signals = NotedSignals()
        self._due: list[str] = []  # callbacks that have not been called after this step, by name
        self._saved: tuple[int, list[str]] = (0, [])  # step and due callbacks of the newest checkpoint
        accelerator.gradient_accumulation_steps = accumulation

    def run(self) -> None:
        """Train to the last step.

        Raises:
            NotFiniteError: for a clip, a loss or gradients with NaN or infinity; nothing of that step is saved.
            ValueError, OSError: for clips that cannot be read, once the last whole step is saved; and of callbacks.
            Stopped: after SIGINT, SIGTERM or SIGUSR1 to any of the processes, at all of them, once the last whole step
                is saved. Further signals change nothing.
        """
        with closing(self._batches(self.step)) as batches, noting_signals() as self._signals:
            try:
                self._call_back(StepReport(step=self.step))
                while self.step < self.steps:
                    report = self._train_step(batches)
                    self._due = [_name(callback) for callback in self.callbacks]
                    self._call_back(report)
                    if self.step % self._checkpoint_every == 0 or self.step == self.steps:
                        self._save_if_new()
            except Stopped:
                self._save_if_new()
                raise

    def check_stop(self) -> None:
        """Raise ``Stopped`` at all processes if any has received a signal; all must call this together."""
        self._agree(None)

    def together(self, read: Callable[[], T]) -> T:
        """The result of ``read``, if it succeeds at all processes, which must call this together; a signal ends it.

        Raises:
            ValueError, OSError: at all processes what ``read`` raised at one.
            Stopped: at all, if one has received a signal.
        """
        found: Any = None
        failed: Exception | None = None
        try:
            with self._signals.raising():
                found = read()
        except Stopped:
            pass  # noted, and so seen below
        except (ValueError, OSError) as error:
            failed = error
        self._agree(failed)
        return found

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the parameters are their moving averages, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    def whole_parameters(self) -> dict[str, Tensor]:
        """All parameters, gathered from all processes, on the CPU; all must call this together."""
        return whole_tensors(self.parameters)

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint; all processes must call this together.

        Raises:
            NotFiniteError: before anything is written, if it has NaN or infinity.
            FileError: if it cannot be written; older checkpoints stay.
        """
        parameters, average, updates = self.whole_parameters(), dict[str, Tensor](), None
        if self.average is not None:
            average, updates = whole_tensors(self.average.values), self.average.updates
        tensors, numbers = optimizer_state(self.optimizer, self.parameters)
        for saved in (parameters, average, tensors):
            self.check_finite(saved)
        state = {"optimizer": numbers, "average_updates": updates, "due": self._due}
        if self.accelerator.is_main_process:
            with checkpoints.writing(self.step, state) as folder:
                self.method.save(parameters, folder / self.method.saved_as)
                if average:
                    self.method.save(average, folder / _AVERAGE)
                with replacing(folder / _OPTIMIZER) as partial:
                    save_file(tensors, partial)
        self._saved = (self.step, list(self._due))
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, also on another number of processes."""
        for name, tensor in self.method.load(checkpoint.path / self.method.saved_as).items():
            assign(self.parameters[name], tensor)
        tensors = load_file(checkpoint.path / _OPTIMIZER)
        load_optimizer_state(self.optimizer, self.parameters, tensors, checkpoint.state["optimizer"])
        if self.average is not None:
            self.average.load(self.method.load(checkpoint.path / _AVERAGE), checkpoint.state["average_updates"])
        self.step, self._due = checkpoint.step, list(checkpoint.state["due"])
        self._saved = (self.step, list(self._due))

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``NotFiniteError`` before NaN or infinity of this or an earlier step is written anywhere."""
        for name, tensor in tensors.items():
            check_finite(tensor, f"after step {self.step}, {name}", "nothing of it was saved. " + self._advice())

    def _call_back(self, report: StepReport) -> None:
        for callback in self.callbacks:
            if _name(callback) not in self._due:
                continue
            try:
                callback(self, report)
            except (ValueError, OSError):
                if self.accelerator.num_processes == 1:  # others may not have failed, and would not save with us
                    self._save_if_new()
                raise
            self._due.remove(_name(callback))

    def _train_step(self, batches: Iterator[Any]) -> StepReport:
        began, waited = time.perf_counter(), 0.0
        network = self.method.network(self.step)
        # For dropout; odd multipliers keep seed, step and process apart.
        place = (self._seed * 1_000_003 + self.step) * 65_537 + self.accelerator.process_index
        torch.manual_seed(place % 2**63)
        sums: Sums = {}
        ids: list[str] = []
        loss = torch.zeros((), device=self.accelerator.device)
        self.accelerator.step = 0  # of the accumulated batches
        for _ in range(self._accumulation):
            asked = time.perf_counter()
            batch = self._next(batches)
            waited += time.perf_counter() - asked
            with self.accelerator.accumulate(network):
                losses = self.method.loss(self.step, batch)
                self.accelerator.backward(losses.total)  # divided by the number of batches
            loss += losses.total.detach() / self._accumulation
            ids += batch.ids
            add_sums(sums, losses.sums)
        norm = self._clip()
        self._check_loss(loss, norm, ids)
        lr = self._apply()
        return StepReport(
            step=self.step,
            sums=sums,
            lr=lr,
            grad_norm=norm.item(),
            samples=len(ids) * self.accelerator.num_processes,
            seconds=time.perf_counter() - began,
            seconds_data=waited,
        )

    def _next(self, batches: Iterator[Any]) -> Any:
        def read() -> Any:
            try:
                return next(batches)
            except NotFiniteError as error:
                raise NotFiniteError(f"step {self.step + 1}: {error}") from None

        try:
            return self.together(read)
        except (ValueError, OSError):
            self._save_if_new()
            raise

    def _save_if_new(self) -> None:
        """Save the last whole step unless it is saved; all processes must call this together."""
        if self._checkpoints is not None and (self.step, self._due) != self._saved:
            self.save(self._checkpoints)

    def _agree(self, failed: Exception | None) -> None:
        """Raise at all processes the error of one of them, or ``Stopped`` for its signal."""
        signal = self._signals.number
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[float(failed is not None), float(signal)]], device=self.accelerator.device)
            any_failed, signals = self.accelerator.gather(flags).view(-1, 2).amax(dim=0).tolist()
            signal = int(signals)
            if any_failed:
                messages = gather_object([None if failed is None else str(failed)])
                failed = failed or FileError(next(message for message in messages if message is not None))
        if failed is not None:
            raise failed
        if signal:
            raise Stopped(signal)

    def _clip(self) -> Tensor:
        """Clip the gradients and return their norm before it, over all processes."""
        most = math.inf if self._max_grad_norm is None else self._max_grad_norm
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), most))

    def _check_loss(self, loss: Tensor, norm: Tensor, ids: list[str]) -> None:
        """Raise ``NotFiniteError`` with the clips at all processes if one has NaN or infinity."""
        bad = not bool(loss.isfinite())
        flag = torch.tensor([float(bad or not bool(norm.isfinite()))], device=self.accelerator.device)
        if not self.accelerator.gather(flag).any():
            return
        reports = gather_object([(bad, loss.item(), ids)])
        causes = [report for report in reports if report[0]] or reports
        what = f"the loss is {causes[0][1]}" if causes[0][0] else f"the norm of the gradients is {norm.item()}"
        clips = ", ".join(id for _, _, of_process in causes for id in of_process)
        raise NotFiniteError(
            f"step {self.step + 1}: {what}; the clips of this batch are {clips}. Nothing of this step was saved. "
            + self._advice()
            + ("" if causes[0][0] else _ADVICE_ON_KERNELS)
        )

    def _advice(self) -> str:
        """What to do about NaN and infinity."""
        lower = f"optimizer.lr={self._learning_rate(self.step) / 4:.2g}"
        if self.step == 0:
            return f"No step was done yet: check the base model's weights and these clips, or start with {lower}"
        return (
            f"If the learning rate is too high, the same command with {lower} resumes from the last checkpoint; if "
            "that does not help, start again with it in another output. If a clip has extreme values, prepare the data "
            "without it"
        )

    def _apply(self) -> float:
        """The optimizer's step; returns its learning rate."""
        changed = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        lr = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(changed)
        return lr


def _name(callback: Callback) -> str:
    return type(callback).__name__


def add_sums(sums: Sums, more: Sums) -> None:
    """Add ``more`` to ``sums`` in place."""
    for name, total in more.items():
        sums[name] = sums[name] + total if name in sums else total
