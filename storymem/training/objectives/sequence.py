"""The loss of what is denoised as one sequence: all its frames are noisy, whatever its layout is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from storymem.training.batches import Batch
from storymem.training.objectives.base import ObjectiveSettings
from storymem.training.objectives.flow import (
    TIMESTEPS,
    Losses,
    bin_sums,
    mask_weights,
    mean_of,
    noise_level,
    noised,
)
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
class SequenceObjective:
    """The mean error over all frames; see :class:`storymem.training.objectives.Loss`.

    Args:
        settings: weights and bins.
        levels: from u and the expert to noise levels.
    """

    settings: ObjectiveSettings
    levels: Callable[[Tensor, Expert], Tensor]

    def __call__(self, network: nn.Module, expert: Expert, batch: SequenceBatch) -> Losses:
        """The loss of ``network`` on a batch that lies on its device."""
        s = self.levels(batch.u, expert)  # [B, 1 or segments]
        frames = torch.tensor([part.frames for part in batch.layout.segments], device=s.device)
        of_frame = s.expand(-1, len(frames)).repeat_interleave(frames, dim=1)
        x = model_input(noised(batch.x0, batch.noise, of_frame), batch.condition)
        dtype: Any = getattr(network, "module", network).dtype
        timestep = (s[:, 0] if s.shape[1] == 1 else s) * TIMESTEPS
        (prediction,) = network(x.to(dtype), timestep, batch.text.to(dtype), return_dict=False, layout=batch.layout)
        errors = (prediction.float() - (batch.noise - batch.x0)).square().mean(dim=1)  # [B, N, h, w]
        losses = (errors * mask_weights(batch.mask, self.settings.mask_weight)).mean(dim=(1, 2, 3))
        sums = self._sums(expert, losses.detach(), errors.detach(), of_frame, batch)
        return Losses(total=losses.mean(), sums=sums)

    def _sums(
        self, expert: Expert, losses: Tensor, errors: Tensor, s: Tensor, batch: SequenceBatch
    ) -> dict[str, Tensor]:
        """What is logged; of the video, its frames and the subject the unweighted errors."""
        subject = {"loss_subject": torch.stack([(errors * batch.mask).sum(), batch.mask.sum()])}
        return {
            "loss": mean_of(losses),
            f"loss_{expert}": mean_of(losses),
            "loss_video": mean_of(errors),
            **(subject if self.settings.mask_weight != 1 else {}),
            "frames": mean_of(torch.full_like(losses, errors.shape[1])),
            "loss_by_level": bin_sums(errors.mean(dim=(2, 3)).flatten(), s.flatten(), self.settings.bins),
        }


def one_level(settings: ObjectiveSettings, boundary: float | None) -> SequenceObjective:
    """The loss of sequences with one noise level, of the shifted uniform."""
    return SequenceObjective(settings=settings, levels=partial(noise_level, boundary=boundary, shift=settings.shift))
