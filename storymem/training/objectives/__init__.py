"""What a run trains: one file per system.

An objective is a settings class in ``settings``, chosen by ``objective=NAME``. It decides which samples are drawn from
a training set (:class:`storymem.training.batches.Samples`), and the loss of a network on a batch of them
(:class:`Loss`). The loop, experts, checkpoints, validation and the log are the same for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from storymem.training.objectives.flow import Losses
    from storymem.wan.spec import Expert


class Loss(Protocol):
    """The loss of an expert on a batch."""

    def __call__(self, network: nn.Module, expert: Expert, batch: Any) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""
        ...
