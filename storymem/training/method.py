"""The method: which expert a step trains, and the loss of a batch. What the loop is given, and Wan's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from storymem.training.dataset import Batch
from storymem.training.experts import Experts, read_adapters, write_adapters
from storymem.training.objective import ExpertName, Losses, MemoryObjective
from storymem.wan.lora import AdapterInfo


class MemoryTraining:
    """Memory adapters of one or both experts, trained by flow matching.

    With both, they take turns of ``alternate_every`` steps.

    Args:
        experts: the networks.
        objective: the loss.
        alternate_every: see :class:`storymem.training.settings.ParallelSettings`.
        dtype: in which the networks compute; bfloat16 means autocast.
        info: what saved adapters say about themselves.
    """

    def __init__(
        self,
        experts: Experts,
        objective: MemoryObjective,
        *,
        info: AdapterInfo,
        alternate_every: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.experts, self.objective, self.info = experts, objective, info
        self.parameters: Mapping[str, nn.Parameter] = experts.parameters
        self._alternate_every, self._dtype = alternate_every, dtype

    def turn(self, step: int) -> ExpertName:
        """The expert that ``step`` (from 0) trains."""
        names = list(self.experts.networks)
        return names[step // self._alternate_every % len(names)]

    def network(self, step: int) -> nn.Module:
        """The network that ``step`` trains, ready for it."""
        expert = self.turn(step)
        self.experts.activate(expert)
        network = self.experts.networks[expert]
        return network if network.training else network.train()

    def loss(self, step: int, batch: Batch) -> Losses:
        """The loss of the network whose turn it is."""
        return self._loss(self.turn(step), batch)

    @torch.no_grad()
    def evaluate(self, expert: ExpertName, batch: Batch) -> Losses:
        """The loss of one expert without dropout."""
        self.experts.activate(expert)
        self.experts.networks[expert].eval()
        return self._loss(expert, batch)

    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write parameters (whole tensors, by name) as an adapter that can be used as it is."""
        write_adapters(tensors, folder, info=self.info)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Read what :meth:`save` wrote."""
        return read_adapters(folder, list(self.experts.networks))

    def _loss(self, expert: ExpertName, batch: Batch) -> Losses:
        batch = batch.to(self.experts.device)
        autocast = torch.autocast(self.experts.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16)
        with autocast:
            return self.objective(self.experts.networks[expert], expert, batch)
