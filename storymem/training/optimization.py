"""Optimizer, schedule and moving average of the trained parameters, whole or sharded over processes (FSDP2).

Their state is saved under the parameters' names and as whole tensors, so that any number of processes can resume it.
``torch.distributed.checkpoint.state_dict`` wants a state for every parameter, and an expert that has not had its turn
has none; diffusers' ``EMAModel`` has one count of updates for all, and copies shards to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from storymem.training.run_settings import OptimizerSettings


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, gathered from their shards; all processes must call this together."""
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in tensors.items()}


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of ``parameter``, and sharded as it is if it has its shape."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole tensor into a parameter."""
    parameter.copy_(sharded_like(value.to(parameter.dtype), parameter))


def learning_rate(settings: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> its learning rate, in a run of ``steps`` steps."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=settings.lr)
    schedule = get_scheduler(
        settings.schedule, optimizer=unused, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: settings.lr * factor(step)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state under ``<parameter>:<entry>``: tensors, whole and on the CPU, and other values.

    All processes must call this together.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = whole(value).detach().cpu().contiguous()
            else:
                numbers[f"{name}:{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Restore the result of :func:`optimizer_state`, also on another number of processes."""
    for key, value in {**tensors, **numbers}.items():
        name, _, entry = key.rpartition(":")
        on_device = isinstance(value, Tensor) and value.ndim > 0  # AdamW counts its steps on the CPU
        optimizer.state[parameters[name]][entry] = sharded_like(value, parameters[name]) if on_device else value


class MovingAverage:
    """avg <- d * avg + (1 - d) * p after each step, with d = min(decay, (1 + n) / (10 + n)) in the n-th update.

    The average begins at the values of the parameters (by name).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, dict(parameters)
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.updates = dict.fromkeys(parameters, 0)

    @torch.no_grad()
    def update(self, names: Iterable[str]) -> None:
        """Move the average of the named parameters, those that the step has changed."""
        for name in names:
            n = self.updates[name] = self.updates[name] + 1
            self.values[name].lerp_(self.parameters[name].detach(), 1 - min(self.decay, (1 + n) / (10 + n)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the parameters are their averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def load(self, values: Mapping[str, Tensor], updates: Mapping[str, int]) -> None:
        """Restore saved averages (whole tensors) and counts."""
        for name, parameter in self.parameters.items():
            self.values[name] = sharded_like(values[name].to(parameter.dtype), parameter).clone()
        self.updates = dict(updates)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            before = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(before)
