"""The loop: batches in, steps of the optimizer, checkpoints; it knows no model and no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storymem.io import FileError, NotFiniteError, check_finite, replacing
from storymem.stopping import NotedSignals, Stopped, noting_signals
from storymem.training.checkpoints import Checkpoints, read_checkpoint
from storymem.training.ema import MovingAverage
from storymem.training.optimizers import build_optimizer, learning_rate, load_optimizer_state, optimizer_state
from storymem.training.settings import OptimizerSettings
from storymem.training.sharding import assign, whole

_ADAPTER, _AVERAGE, _OPTIMIZER = "adapter", "average", "optimizer.safetensors"

T = TypeVar("T")


class NonFiniteLoss(NotFiniteError):
    """A loss or gradient that is NaN or infinite; names the clips. No checkpoint holds what it would have done."""


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
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lr: float = 0.0
    grad_norm: float = 0.0
    samples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Callback(Protocol):
    """Something that is done beside training: logging, validation, sampling. Called after every step.

    What takes long calls :meth:`Trainer.check_stop` now and then. If that stops the run, the callback is called again
    when the run is taken up, with a report of the step alone.
    """

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
        self._learning_rate = learning_rate(optimizer, steps)
        self.average = None if optimizer.ema_decay is None else MovingAverage(self.parameters, optimizer.ema_decay)
        self.step = 0
        self._max_grad_norm = optimizer.max_grad_norm
        self._batches, self._accumulation, self._seed = batches, accumulation, seed
        self._checkpoints, self._checkpoint_every = checkpoints, checkpoint_every
        self.callbacks = list(callbacks)
        self._signals = NotedSignals()
        self._due: list[str] = []  # callbacks that have not been called after this step, by name
        self._saved: tuple[int, list[str]] = (0, [])  # step and callbacks of the newest checkpoint

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
                    due = self.step % self._checkpoint_every == 0 or self.step == self.steps
                    if due and self._checkpoints is not None:
                        self.save(self._checkpoints)
            except Stopped:
                self._keep()
                raise

    def check_stop(self) -> None:
        """Raise ``Stopped`` at all processes if any has received a signal; all must come here."""
        self._agree(None)

    def together(self, read: Callable[[], T]) -> T:
        """What ``read`` returns, if it does at all processes, which must all come here; it is left on a signal.

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
        """All parameters, gathered from all processes, on the CPU; every process must ask at the same time."""
        return {name: whole(parameter.detach()).cpu().clone() for name, parameter in self.parameters.items()}

    def _call_back(self, report: StepReport) -> None:
        for callback in self.callbacks:
            if _name(callback) not in self._due:
                continue
            try:
                callback(self, report)
            except (ValueError, OSError):
                if self.accelerator.num_processes == 1:  # several may not all come here
                    self._keep()
                raise
            self._due.remove(_name(callback))

    def _train_step(self, batches: Iterator[Any]) -> StepReport:
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
            batch = self._next(batches)
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
        self._check_finite(loss, norm, ids)  # waits for the device, so forward and backward end here
        lap("forward_backward")
        lr = self._apply()
        lap("optimizer")
        samples *= self.accelerator.num_processes
        return StepReport(step=self.step, sums=sums, lr=lr, grad_norm=norm.item(), samples=samples, seconds=seconds)

    def _next(self, batches: Iterator[Any]) -> Any:
        def read() -> Any:
            try:
                return next(batches)
            except NotFiniteError as error:
                raise NotFiniteError(f"step {self.step + 1}: {error}") from None

        try:
            return self.together(read)
        except (ValueError, OSError):
            self._keep()
            raise

    def _keep(self) -> None:
        """Save what the steps so far have learnt, if it is not; every process must come here."""
        if self._checkpoints is not None and (self.step, self._due) != self._saved:
            self.save(self._checkpoints)

    def _agree(self, failed: Exception | None) -> None:
        """Raise at all processes what one of them has to say: an error, or ``Stopped`` for a signal."""
        signal = self._signals.number
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[float(failed is not None), float(signal)]], device=self.accelerator.device)
            together = self.accelerator.gather(flags).view(-1, 2).amax(dim=0)
            signal = int(together[1])
            if together[0] and failed is None:
                told = gather_object([None])
                failed = FileError(next(message for message in told if message is not None))
            elif failed is not None:
                gather_object([str(failed)])
        if failed is not None:
            raise failed
        if signal:
            raise Stopped(signal)

    def _clip(self) -> Tensor:
        """Clip the gradients and return their norm before it, over all processes."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            with_gradient = [p for p in self.parameters.values() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(with_gradient, self._max_grad_norm, norm)
        return whole(norm)

    def _check_finite(self, loss: Tensor, norm: Tensor, ids: list[str]) -> None:
        """Raise ``NonFiniteLoss`` at all processes if one has lost its numbers."""
        bad = not bool(loss.isfinite())
        flag = torch.tensor([float(bad or not bool(norm.isfinite()))], device=self.accelerator.device)
        if not self.accelerator.gather(flag).any():
            return
        told = gather_object([(bad, loss.item() / self._accumulation, ids)])
        guilty = [entry for entry in told if entry[0]] or told
        what = f"the loss is {guilty[0][1]}" if guilty[0][0] else f"the norm of the gradients is {norm.item()}"
        clips = ", ".join(id for _, _, those in guilty for id in those)
        raise NonFiniteLoss(
            f"step {self.step + 1}: {what}; the clips of this batch are {clips}. Nothing of this step was saved. "
            + self._cure()
        )

    def _cure(self) -> str:
        """What to do about numbers that were lost."""
        lower = f"optimizer.lr={self._learning_rate(self.step) / 4:.2g}"
        if self.step == 0:
            return f"No step was done yet: look at the base model's weights and at these clips, or start with {lower}"
        return (
            f"If the learning rate is too high, the same command with {lower} goes on from the last checkpoint; if "
            "that does not help, begin again with it in another output. If a clip has values out of all proportion, "
            "prepare the data without it"
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

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of this moment; every process must come here.

        Raises:
            NotFiniteError: before anything is written, if a number of it is NaN or infinite.
            FileError: if it cannot be written; older checkpoints stay.
        """
        parameters = self.whole_parameters()
        with self.averaged():
            average = None if self.average is None else self.whole_parameters()
        tensors, numbers = optimizer_state(self.optimizer, self.parameters)
        for kept in (parameters, average or {}, tensors):
            self.check_finite(kept)
        state = {
            "optimizer": numbers,
            "average_updates": None if self.average is None else self.average.updates,
            "due": self._due,
        }
        if self.accelerator.is_main_process:
            with checkpoints.writing(self.step, state) as folder:
                self.method.save(parameters, folder / _ADAPTER)
                if average is not None:
                    self.method.save(average, folder / _AVERAGE)
                with replacing(folder / _OPTIMIZER) as partial:
                    save_file(tensors, partial)
        self._saved = (self.step, list(self._due))
        self.accelerator.wait_for_everyone()

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``NotFiniteError`` before numbers that were lost in this or an earlier step are written anywhere."""
        for name, tensor in tensors.items():
            check_finite(tensor, f"after step {self.step}, {name}", "nothing of it was saved. " + self._cure())

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, also on another number of processes."""
        checkpoint = read_checkpoint(folder)
        for name, tensor in self.method.load(folder / _ADAPTER).items():
            assign(self.parameters[name], tensor)
        load_optimizer_state(
            self.optimizer, self.parameters, load_file(folder / _OPTIMIZER), checkpoint.state["optimizer"]
        )
        if self.average is not None:
            self.average.load(self.method.load(folder / _AVERAGE), checkpoint.state["average_updates"])
        self.step, self._due = checkpoint.step, list(checkpoint.state["due"])
        self._saved = (self.step, list(self._due))


def _name(callback: Callback) -> str:
    return type(callback).__name__


def _add(sums: dict[str, tuple[Tensor, Tensor]], more: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (total, count) in more.items():
        before = sums.get(name)
        sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)


def _seed_dropout(seed: int, step: int, process: int) -> None:
    # Odd multipliers keep the three apart.
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + process) % 2**63)
