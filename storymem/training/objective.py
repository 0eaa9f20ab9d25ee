"""Flow matching over memory and video slots (paper section 3.3): pure functions, and the loss of a batch.

Letters: x0 clean latents, e noise, s the noise level in 0..1, x = (1 - s) x0 + s e, and the velocity e - x0 that the
network predicts. Slots are latent frames: the M of the memory, then the T of the video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storymem.training.dataset import Batch
from storymem.training.settings import ObjectiveSettings, check_memory_weight
from storymem.wan.memory_attention import install_memory_attention, slot_tokens, token_timesteps
from storymem.wan.rope import install_memory_rope
from storymem.wan.schedule import shifted, unshifted
from storymem.wan.settings import MemoryMode

ExpertName = Literal["high_noise", "low_noise"]
TIMESTEPS = 1000


def noise_level(u: Tensor, *, expert: ExpertName, boundary: float, shift: float) -> Tensor:
    """s of the shifted uniform, restricted to what an expert is used for.

    Args:
        u: [B], uniform in 0..1.
        expert: the high-noise one sees s >= boundary, the low-noise one s < boundary.
        boundary: between the two.
        shift: see :func:`storymem.wan.schedule.shifted`.
    """
    edge = unshifted(boundary, shift)
    if expert == "high_noise":
        return shifted(edge + (1 - edge) * u, shift).clamp(min=boundary)
    below = torch.nextafter(torch.tensor(boundary), torch.tensor(0.0)).item()
    return shifted(edge * u, shift).clamp(max=below)


def noised(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x = (1 - s) x0 + s e, for x0 and e [B, C, N, h, w] and s [B, N], the noise level of each slot."""
    level = s[:, None, :, None, None].to(x0)
    return (1 - level) * x0 + level * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """e - x0, the derivative of x by s: what the network predicts."""
    return noise - x0


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error in float32, the mean of the channels: [B, C, N, h, w] twice -> [B, N, h, w]."""
    return (prediction.float() - target.float()).square().mean(dim=1)


def mask_weights(mask: Tensor, mask_weight: float) -> Tensor:
    """Weights [B, T, h, w] of places in the video: where the mask is 1, ``mask_weight`` times those where it is 0.

    Their mean is 1 in every sample, so that samples count alike however large their subjects are.
    """
    weights = 1 + (mask_weight - 1) * mask
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def slot_weights(memory_frames: int, slots: int, memory_weight: float) -> Tensor:
    """Weights [M + T] of the slots' losses, adding up to 1: a video slot counts 1, a memory slot ``memory_weight``."""
    weights = torch.ones(slots)
    weights[:memory_frames] = memory_weight
    return weights / weights.sum()


def bin_sums(losses: Tensor, s: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sum and number of ``losses`` [B] in each of ``bins`` equal bins of s [B] from 0 to 1: two times [bins]."""
    index = (s * bins).long().clamp(0, bins - 1)
    zeros = torch.zeros(bins, device=losses.device)
    return zeros.index_add(0, index, losses), zeros.index_add(0, index, torch.ones_like(losses))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of one batch.

    Args:
        total: the mean over samples, with a gradient.
        sums: name -> (sum, number) of what is logged, detached; numbers or [bins]. Sums of several batches and
            processes can be added.
    """

    total: Tensor
    sums: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class MemoryObjective:
    """The loss of an expert on a batch.

    In the ``joint`` memory mode memory slots are noise and denoised as well. In the ``cached`` one they are clean, at
    timestep 0, and have no loss: what is learnt about them comes through the video slots that look at them.

    Args:
        settings: noise levels and weights.
        boundary: between the experts' noise levels.
        rope_stride: S, the distance between memory slots on the temporal axis.
        memory_attention: the mode.
    """

    settings: ObjectiveSettings
    boundary: float
    rope_stride: int
    memory_attention: MemoryMode = "joint"

    def __post_init__(self) -> None:
        check_memory_weight(self.settings, self.memory_attention)

    def __call__(self, network: nn.Module, expert: ExpertName, batch: Batch) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""
        s = noise_level(batch.u, expert=expert, boundary=self.boundary, shift=self.settings.shift)
        slots, cached = batch.x0.shape[2], self.memory_attention == "cached"
        by_slot = s[:, None].repeat(1, slots)
        if cached:
            by_slot[:, : batch.memory_frames] = 0
        x = torch.cat([noised(batch.x0, batch.noise, by_slot), batch.condition], dim=1)
        prediction = (self._predict_cached if cached else self._predict)(network, x, by_slot * TIMESTEPS, batch)
        errors = squared_errors(prediction, velocity(batch.x0, batch.noise))
        weights = slot_weights(batch.memory_frames, slots, self.settings.memory_weight).to(errors.device)
        # A product of matrices would be rounded by autocast.
        losses = (self._weighted(errors, batch).mean(dim=(2, 3)) * weights).sum(dim=1)
        return Losses(total=losses.mean(), sums=self._sums(expert, losses.detach(), errors.detach(), s, batch))

    def _weighted(self, errors: Tensor, batch: Batch) -> Tensor:
        """The errors [B, M + T, h, w] with those of the video weighted by its mask."""
        if self.settings.mask_weight == 1:
            return errors
        memory, video = errors.split([batch.memory_frames, batch.mask.shape[1]], dim=1)
        return torch.cat([memory, video * mask_weights(batch.mask, self.settings.mask_weight)], dim=1)

    def _predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """The prediction [B, 16, M + T, h, w] for x [B, 36, M + T, h, w] at timesteps [B, M + T], all of one time."""
        rope = install_memory_rope(_transformer(network))
        rope.memory_frames, rope.stride = batch.memory_frames, self.rope_stride
        try:
            return _forward(network, x, timesteps[:, 0], batch)
        finally:
            rope.memory_frames = 0

    def _predict_cached(self, network: nn.Module, x: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """The same at timesteps that are 0 in memory slots."""
        transformer, memory_frames = _transformer(network), batch.memory_frames
        if memory_frames == 0:
            return _forward(network, x, timesteps[:, 0], batch)
        memory = install_memory_attention(transformer)
        with memory.whole(memory_frames, stride=self.rope_stride, tokens=memory_frames * slot_tokens(x, transformer)):
            return _forward(network, x, token_timesteps(timesteps, x, transformer), batch)

    def _sums(
        self, expert: ExpertName, losses: Tensor, errors: Tensor, s: Tensor, batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What is logged; of the video and of the subject the plain errors, whatever the weights are."""

        def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
            return values.sum(), torch.tensor(float(values.numel()), device=values.device)

        M = batch.memory_frames  # noqa: N806
        besides = {"loss_memory": mean_of(errors[:, :M])} if self.memory_attention == "joint" else {}
        if self.settings.mask_weight != 1:
            besides["loss_subject"] = ((errors[:, M:] * batch.mask).sum(), batch.mask.sum())
        return {
            "loss": mean_of(losses),
            f"loss_{expert}": mean_of(losses),
            "loss_video": mean_of(errors[:, M:]),
            **besides,
            "memory_frames": mean_of(torch.full_like(losses, M)),
            "loss_by_level": bin_sums(losses, s, self.settings.bins),
        }


def _transformer(network: nn.Module) -> Any:
    """The Wan transformer without ``DistributedDataParallel`` around it."""
    return getattr(network, "module", network)


def _forward(network: nn.Module, x: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
    dtype = _transformer(network).dtype
    (prediction,) = network(x.to(dtype), timestep, batch.text.to(dtype), return_dict=False)
    return prediction
