"""The loss of what is denoised as one sequence: all its frames are noisy, whatever its layout is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storymem.training.objectives.flow import TIMESTEPS, FlowLoss, Losses, noised, predict
from storymem.training.objectives.samples import Batch
from storymem.training.objectives.settings import ObjectiveSettings
from storymem.wan.conditioning import model_input
from storymem.wan.segments import Layout
from storymem.wan.spec import Expert


@dataclass(frozen=True, kw_only=True)
class SequenceBatch(Batch):
    """Samples with one layout; ``mask`` is of all N frames.

    Args:
        u: [B, 1], or [B, segments] for a noise level of each segment.
        text: embeddings [B, L, D] of all that segments read.
        layout: of each sample.
    """

    text: Tensor
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class SequenceObjective(FlowLoss[ObjectiveSettings]):
    """The mean error over all frames."""

    def __call__(self, network: nn.Module, expert: Expert, batch: SequenceBatch) -> Losses:
        s = self.level(batch.u, expert)  # [B, 1 or segments]
        frames = torch.tensor([part.frames for part in batch.layout.segments], device=s.device)
        of_frame = s.expand(-1, len(frames)).repeat_interleave(frames, dim=1)
        x = model_input(noised(batch.x0, batch.noise, of_frame), batch.condition)
        timestep = (s[:, 0] if s.shape[1] == 1 else s) * TIMESTEPS
        prediction = predict(network, x, timestep, batch.text, batch.layout)
        errors = (prediction - (batch.noise - batch.x0)).square().mean(dim=1)  # [B, N, h, w]
        losses = self.weighted(errors, batch.mask).mean(dim=(1, 2, 3))
        by_level = errors.mean(dim=(2, 3)), of_frame
        number = torch.full_like(losses, errors.shape[1])
        return self.losses(expert, losses, errors, batch.mask, by_level, frames=number)
