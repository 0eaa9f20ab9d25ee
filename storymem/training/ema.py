"""Exponential moving average of the parameters that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from storymem.training.sharding import like, local


class MovingAverage:
    """avg <- d * avg + (1 - d) * p after each step, with d = min(decay, (1 + n) / (10 + n)) in the n-th update.

    Args:
        parameters: by name; the average begins at their values.
        decay: d, once warmed up.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.updates = dict.fromkeys(parameters, 0)

    @torch.no_grad()
    def update(self, names: Iterable[str]) -> None:
        """Move the average of the named parameters, those that the step has changed."""
        for name in names:
            self.updates[name] += 1
            n = self.updates[name]
            decay = min(self.decay, (1 + n) / (10 + n))
            local(self.values[name]).lerp_(local(self.parameters[name].detach()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the parameters are their averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def load(self, values: Mapping[str, Tensor], updates: Mapping[str, int]) -> None:
        """Take up averages (whole tensors) and counts that were saved."""
        for name, parameter in self.parameters.items():
            self.values[name] = like(values[name].to(parameter.dtype), parameter).clone()
        self.updates = dict(updates)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = local(self.values[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
