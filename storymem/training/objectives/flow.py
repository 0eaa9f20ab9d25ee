"""Flow matching: pure functions.

Letters: x0 clean latents, e noise, s the noise level in 0..1, x = (1 - s) x0 + s e, and the velocity e - x0 that the
network predicts. Slots are latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from storymem.wan.schedule import shifted, unshifted
from storymem.wan.segments import Layout
from storymem.wan.spec import Expert

TIMESTEPS = 1000


def noise_level(u: Tensor, expert: Expert, *, boundary: float | None, shift: float) -> Tensor:
    """s of the shifted uniform, restricted to the range of an expert.

    Args:
        u: uniform in 0..1, of any shape.
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


def logit_normal_level(
    u: Tensor, expert: Expert, *, boundary: float | None, shift: float, mean: float = 0.0, deviation: float = 1.0
) -> Tensor:
    """s of the shifted logit-normal, restricted to the range of an expert: logit(s before the shift) is normal.

    Args:
        u: uniform in 0..1, of any shape.
        expert, boundary, shift: see :func:`noise_level`.
        mean: of the normal distribution.
        deviation: its standard deviation.
    """
    normal = torch.distributions.Normal(mean, deviation)
    lowest, highest = 0.0, 1.0
    if boundary is not None:
        edge = normal.cdf(torch.tensor(unshifted(boundary, shift)).logit()).item()
        lowest, highest = (edge, 1.0) if expert == "high_noise" else (0.0, edge)
    # In float64: near 1 the quantiles of float32 are coarse.
    quantile = (lowest + (highest - lowest) * u.double()).clamp(1e-9, 1 - 1e-9)
    s = shifted(normal.icdf(quantile).sigmoid(), shift).to(u.dtype)
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
