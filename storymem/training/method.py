"""The method: which expert a step trains, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storymem.io import replacing
from storymem.training.experts import Experts, by_expert
from storymem.training.objectives.flow import FlowLoss, Losses
from storymem.training.objectives.samples import Batch
from storymem.wan.lora import AdapterInfo, Layout, write_memory_lora
from storymem.wan.spec import Expert


class ExpertTraining:
    """One or both experts, or their adapters, trained by flow matching.

    With both, they take turns of ``alternate_every`` steps.

    Args:
        info: stored in the files of adapters; None: there are none, the experts train as a whole.
        dtype: in which the networks compute; bfloat16 means autocast.
    """

    def __init__(
        self,
        experts: Experts,
        objective: FlowLoss[Any],
        *,
        info: AdapterInfo | None,
        alternate_every: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.experts, self.objective, self.info = experts, objective, info
        self.parameters: Mapping[str, nn.Parameter] = experts.parameters
        self.saved_as = "experts" if info is None else "adapter"
        self._alternate_every, self._dtype = alternate_every, dtype

    def turn(self, step: int) -> Expert:
        """The expert that ``step`` (from 0) trains."""
        names = list(self.experts.networks)
        return names[step // self._alternate_every % len(names)]

    def network(self, step: int) -> nn.Module:
        """The network that ``step`` trains, on the accelerator and in training mode."""
        expert = self.turn(step)
        self.experts.activate(expert)
        return self.experts.networks[expert].train()

    def loss(self, step: int, batch: Batch) -> Losses:
        """The loss of the network whose turn it is."""
        return self._loss(self.turn(step), batch)

    @torch.no_grad()
    def evaluate(self, expert: Expert, batch: Batch) -> Losses:
        """The loss of one expert without dropout."""
        self.experts.activate(expert)
        self.experts.networks[expert].eval()
        return self._loss(expert, batch)

    def save(self, tensors: Mapping[str, Tensor], folder: Path, *, layout: Layout = "storymem") -> None:
        """Write parameters (whole tensors, by name), a file per expert; an adapter can be used as it is."""
        if self.info is not None:
            write_memory_lora(by_expert(tensors), folder, info=self.info, layout=layout)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for expert, state in by_expert(tensors).items():
            with replacing(folder / f"{expert}.safetensors") as partial:
                save_file(state, partial)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Read what :meth:`save` wrote, adapters in the layout ``storymem``."""
        files = {expert: load_file(folder / f"{expert}.safetensors") for expert in self.experts.networks}
        return {f"{expert}/{name}": tensor for expert, state in files.items() for name, tensor in state.items()}

    def _loss(self, expert: Expert, batch: Batch) -> Losses:
        batch = batch.to(self.experts.device)
        device = self.experts.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self.objective(self.experts.networks[expert], expert, batch)
