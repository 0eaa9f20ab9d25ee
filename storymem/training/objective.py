"""Flow matching over memory and video slots (paper section 3.3): pure functions, and the loss of a batch.

Letters: x0 clean latents, e noise, s the noise level in 0..1, x = (1 - s) x0 + s e, and the velocity e - x0 that the
network predicts. Slots are latent frames: the M of the memory, then the T of the video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from storymem.training.dataset import Batch
from storymem.training.settings import ObjectiveSettings
from storymem.wan.conditioning import model_input
from storymem.wan.schedule import shifted, unshifted
from storymem.wan.segments import Layout, memory_cached, memory_joint, with_given
from storymem.wan.settings import MemoryMode
from storymem.wan.spec import Expert

TIMESTEPS = 1000


def noise_level(u: Tensor, *, expert: Expert, boundary: float | None, shift: float) -> Tensor:
    """s of the shifted uniform, restricted to the range of an expert.

    Args:
        u: [B], uniform in 0..1.
        expert: the high-noise one sees s >= boundary, the low-noise one s < boundary.
        boundary: between the two; None: there is one expert, for all levels.
        shift: see :func:`storymem.wan.schedule.shifted`.
    """
    if boundary is None:
        return shifted(u, shift)
    edge = unshifted(boundary, shift)
    if expert == "high_noise":
        return shifted(edge + (1 - edge) * u, shift).clamp(min=boundary)
    below = torch.nextafter(torch.tensor(boundary), torch.tensor(0.0)).item()
    return shifted(edge * u, shift).clamp(max=below)


def noised(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x = (1 - s) x0 + s e, for x0 and e [B, C, N, h, w] and s [B, N], the noise level of each slot."""
    level = s[:, None, :, None, None].to(x0)
    return (1 - level) * x0 + level * noise


def mask_weights(mask: Tensor, mask_weight: float) -> Tensor:
    """Weights [B, T, h, w] of places in the video: where the mask is 1, ``mask_weight`` times those where it is 0.

    Their mean is 1 in every sample, so that all samples have the same weight, however large their subjects are.
    """
    weights = 1 + (mask_weight - 1) * mask
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def slot_weights(layout: Layout, memory_weight: float) -> Tensor:
    """Weights [N] of the frames' losses, adding up to 1: noisy ones 1, of memory ``memory_weight``; clean ones 0."""
    each = {"memory": memory_weight}
    weights = [each.get(part.name, 1.0) if part.timestep is None else 0.0 for part in layout.segments]
    frames = torch.tensor([part.frames for part in layout.segments])
    by_frame = torch.tensor(weights).repeat_interleave(frames)
    return by_frame / by_frame.sum()


def bin_sums(losses: Tensor, s: Tensor, bins: int) -> Tensor:
    """Sum and number of ``losses`` [B] in each of ``bins`` equal bins of s [B] from 0 to 1, [2, bins]."""
    index = (s * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(2, bins, device=losses.device)
    return sums.index_add(1, index, torch.stack([losses, torch.ones_like(losses)]))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one batch.

    Args:
        total: the mean over samples, with a gradient.
        sums: name -> sum and number of what is logged, detached, [2] or [2, bins]. Those of several batches and
            processes are added.
    """

    total: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MemoryObjective:
    """The loss of an expert on a batch.

    The layout states which frames are noisy: in ``joint`` memory is denoised as well; in ``cached`` it is clean, at
    timestep 0, and has no loss: gradients reach it through the video frames that read it.

    Args:
        settings: noise levels and weights.
        boundary: between the experts' noise levels; None: there is one expert.
        rope_stride: S, the distance between memory slots on the temporal axis.
        memory_attention: the mode.
    """

    settings: ObjectiveSettings
    boundary: float | None
    rope_stride: int
    memory_attention: MemoryMode = "joint"

    def __call__(self, network: nn.Module, expert: Expert, batch: Batch) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""
        s = noise_level(batch.u, expert=expert, boundary=self.boundary, shift=self.settings.shift)
        layout = self.layout(batch)
        noisy = torch.cat([torch.full((part.frames,), part.timestep is None) for part in layout.segments]).to(s.device)
        x = model_input(noised(batch.x0, batch.noise, s[:, None] * noisy), batch.condition)
        dtype: Any = getattr(network, "module", network).dtype
        (prediction,) = network(x.to(dtype), s * TIMESTEPS, batch.text.to(dtype), return_dict=False, layout=layout)
        errors = (prediction.float() - (batch.noise - batch.x0)).square().mean(dim=1)  # [B, M + T, h, w]
        weights = slot_weights(layout, self.settings.memory_weight).to(errors.device)
        # A product of matrices would be rounded by autocast.
        video = layout.span("video")
        losses = (self._weighted(errors, batch, video).mean(dim=(2, 3)) * weights).sum(dim=1)
        return Losses(total=losses.mean(), sums=self._sums(expert, losses.detach(), errors.detach(), s, batch, video))

    def layout(self, batch: Batch) -> Layout:
        """The layout of a batch: which frames are memory, given or noisy."""
        build = memory_cached if self.memory_attention == "cached" else memory_joint
        video = build(batch.memory_frames, batch.x0.shape[2] - batch.memory_frames, self.rope_stride)
        return video if batch.condition is not None else with_given(video, batch.given)

    def _weighted(self, errors: Tensor, batch: Batch, video: slice) -> Tensor:
        """The errors [B, M + T, h, w] with those of the noisy frames of the video weighted by its mask."""
        if self.settings.mask_weight == 1:
            return errors
        mask = batch.mask[:, video.start - video.stop :]
        weighted = errors[:, video] * mask_weights(mask, self.settings.mask_weight)
        return torch.cat([errors[:, : video.start], weighted], dim=1)

    def _sums(
        self, expert: Expert, losses: Tensor, errors: Tensor, s: Tensor, batch: Batch, video: slice
    ) -> dict[str, Tensor]:
        """What is logged; of the video and of the subject the unweighted errors."""

        def mean_of(values: Tensor) -> Tensor:
            return torch.stack([values.sum(), torch.tensor(float(values.numel()), device=values.device)])

        M = batch.memory_frames  # noqa: N806
        besides = {"loss_memory": mean_of(errors[:, :M])} if self.memory_attention == "joint" else {}
        if self.settings.mask_weight != 1:
            mask = batch.mask[:, video.start - video.stop :]
            besides["loss_subject"] = torch.stack([(errors[:, video] * mask).sum(), mask.sum()])
        return {
            "loss": mean_of(losses),
            f"loss_{expert}": mean_of(losses),
            "loss_video": mean_of(errors[:, video]),
            **besides,
            "memory_frames": mean_of(torch.full_like(losses, M)),
            "loss_by_level": bin_sums(losses, s, self.settings.bins),
        }
