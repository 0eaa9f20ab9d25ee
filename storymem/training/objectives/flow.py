"""Flow matching: pure functions, and what the losses of all objectives share.

Letters: x0 clean latents, e noise, s the noise level in 0..1, x = (1 - s) x0 + s e, and the velocity e - x0 that the
network predicts. Slots are latent frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from storymem.training.objectives.settings import ObjectiveSettings
from storymem.wan.schedule import shifted, unshifted
from storymem.wan.segments import DEFAULT_STRIDE, Layout
from storymem.wan.settings import MemoryMode, ModelSettings
from storymem.wan.spec import A14B, Expert, ModelSpec

TIMESTEPS = 1000

S = TypeVar("S", bound=ObjectiveSettings)


def noise_level(
    u: Tensor, expert: Expert, *, boundary: float | None, shift: float, normal: tuple[float, float] | None = None
) -> Tensor:
    """s of a shifted distribution, restricted to the range of an expert.

    Args:
        u: uniform in 0..1, of any shape.
        expert: the high-noise one sees s >= boundary, the low-noise one s < boundary.
        boundary: between the two; None: there is one expert, for all levels.
        shift: see :func:`storymem.wan.schedule.shifted`.
        normal: mean and standard deviation of logit(s) before the shift; None: s before the shift is uniform.
    """
    distribution = None if normal is None else torch.distributions.Normal(*normal)
    lowest, highest = 0.0, 1.0
    if boundary is not None:
        edge = unshifted(boundary, shift)
        if distribution is not None:
            edge = distribution.cdf(torch.tensor(edge).logit()).item()
        lowest, highest = (edge, 1.0) if expert == "high_noise" else (0.0, edge)
    if distribution is None:
        s = shifted(lowest + (highest - lowest) * u, shift)
    else:  # in float64: near 1 the quantiles of float32 are coarse
        quantile = (lowest + (highest - lowest) * u.double()).clamp(1e-9, 1 - 1e-9)
        s = shifted(distribution.icdf(quantile).sigmoid(), shift).to(u.dtype)
    if boundary is None:
        return s
    below = torch.nextafter(torch.tensor(boundary), torch.tensor(0.0)).item()
    return s.clamp(min=boundary) if expert == "high_noise" else s.clamp(max=below)


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


def noisy_frames(layout: Layout) -> Tensor:
    """Which frames are noisy, bool [N]; the others are clean."""
    return torch.cat([torch.full((part.frames,), part.timestep is None) for part in layout.segments])


def slot_weights(layout: Layout, memory_weight: float) -> Tensor:
    """Weights [N] of the frames' losses, adding up to 1: noisy ones 1, of memory ``memory_weight``; clean ones 0."""
    each = torch.cat([torch.full((p.frames,), memory_weight if p.name == "memory" else 1.0) for p in layout.segments])
    weights = each * noisy_frames(layout)
    return weights / weights.sum()


def bin_sums(losses: Tensor, s: Tensor, bins: int) -> Tensor:
    """Sum and number of ``losses`` [B] in each of ``bins`` equal bins of s [B] from 0 to 1, [2, bins]."""
    index = (s * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(2, bins, device=losses.device)
    return sums.index_add(1, index, torch.stack([losses, torch.ones_like(losses)]))


def mean_of(values: Tensor) -> Tensor:
    """Sum and number of ``values``, [2]."""
    return torch.stack([values.sum(), torch.tensor(float(values.numel()), device=values.device)])


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one batch.

    Args:
        total: the mean over samples, with a gradient.
        sums: name -> sum and number of what is logged, detached, [2] or [2, bins]. Those of several batches and
            processes are added. ``loss_video``, of the video's noisy frames without any weights, is always there.
    """

    total: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FlowLoss(ABC, Generic[S]):
    """The loss of an expert on a batch.

    Args:
        settings: noise levels and weights.
        boundary: between the experts' noise levels; None: there is one expert.
        rope_stride: S, the distance between memory frames on the temporal axis.
        memory_attention: "joint": memory is denoised with the video; "cached": it is clean, at timestep 0.
        spec: the base model.
    """

    settings: S
    boundary: float | None
    rope_stride: int = DEFAULT_STRIDE
    memory_attention: MemoryMode = "joint"
    spec: ModelSpec = A14B

    @abstractmethod
    def __call__(self, network: nn.Module, expert: Expert, batch: Any) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""

    def level(self, u: Tensor, expert: Expert) -> Tensor:
        """The noise level s of each u, see :func:`noise_level`."""
        settings = self.settings
        return noise_level(u, expert, boundary=self.boundary, shift=settings.shift, normal=settings.normal)

    def weighted(self, errors: Tensor, mask: Tensor) -> Tensor:
        """Errors [B, T, h, w] of a video, where its mask is white with more weight."""
        weight = self.settings.mask_weight
        return errors if weight == 1 else errors * mask_weights(mask, weight)

    def losses(
        self,
        expert: Expert,
        losses: Tensor,
        video: Tensor,
        mask: Tensor,
        by_level: tuple[Tensor, Tensor],
        **more: Tensor,
    ) -> Losses:
        """From the losses of the samples [B].

        Args:
            expert: that is trained.
            losses: with a gradient.
            video: errors [B, T, h, w] of the noisy frames of the video, which are logged without weights.
            mask: of these frames.
            by_level: losses, and the noise level of each.
            more: what else is logged.
        """
        found, video = losses.detach(), video.detach()
        sums = {"loss": mean_of(found), f"loss_{expert}": mean_of(found), "loss_video": mean_of(video)}
        if self.settings.mask_weight != 1:
            sums["loss_subject"] = torch.stack([(video * mask).sum(), mask.sum()])
        sums |= {name: mean_of(values.detach()) for name, values in more.items()}
        sums["loss_by_level"] = bin_sums(by_level[0].detach().flatten(), by_level[1].flatten(), self.settings.bins)
        return Losses(total=losses.mean(), sums=sums)


def loss_of(settings: ObjectiveSettings, model: ModelSettings) -> FlowLoss[Any]:
    """The loss of a network of ``model`` on batches of an objective's samples."""
    return resolve_name(settings.loss_class)(
        settings=settings,
        boundary=model.boundary,
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
        spec=model.spec,
    )


def predict(
    network: nn.Module, x: Tensor, timestep: Tensor, text: Tensor | Mapping[str, Tensor], layout: Layout
) -> Tensor:
    """The velocity [B, z, N, h, w] that a network predicts, in float32."""
    dtype: Any = getattr(network, "module", network).dtype
    texts = text.to(dtype) if isinstance(text, Tensor) else {name: each.to(dtype) for name, each in text.items()}
    (prediction,) = network(x.to(dtype), timestep, texts, return_dict=False, layout=layout)
    return prediction.float()
