"""The samplers: UniPC on Wan's exact sigmas, as published, and Euler for step-distilled adapters."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor


def published_sigmas(steps: int) -> np.ndarray:
    """Noise levels before the shift, ``linspace(0.999, 0, steps + 1)[:-1]``, as Wan's own sampler takes them."""
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be 1 or more, not {steps}")
    return np.linspace(0.999, 0.0, steps + 1)[:-1]


def shifted(u: Tensor, shift: float) -> Tensor:
    """s = shift * u / (1 + (shift - 1) * u): uniform u in 0..1 to noise levels in 0..1, denser near 1 for shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(s: float, shift: float) -> float:
    """u with ``shifted(u) == s``."""
    return s / (shift - (shift - 1) * s)


class WanUniPCScheduler(UniPCMultistepScheduler):
    """``UniPCMultistepScheduler`` on the sigmas of Wan's own sampler.

    diffusers starts at sigma 1 and stops at 1/1000 before the shift; the original starts at 0.999 and stops a step
    above 0. The shift, the integer timesteps and the last sigma 0 are the same. Build it with :func:`wan_scheduler`.
    """

    # diffusers saves each class with its module, and takes "wan" in that for its own `diffusers.pipelines.wan`.
    __module__ = "storymem"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As in diffusers; without ``sigmas`` the published ones are used."""
        if sigmas is None:
            assert num_inference_steps is not None
            sigmas = list(published_sigmas(num_inference_steps))
        super().set_timesteps(device=device, sigmas=np.asarray(sigmas, dtype=np.float64), mu=mu)


class WanEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """``FlowMatchEulerDiscreteScheduler`` on evenly spaced noise levels from 1, as step-distilled adapters need it.

    Four steps at shift 5 are the timesteps 1000, 937.5, 833.3 and 625, at which Wan2.2-Lightning was trained. diffusers
    would shift the levels twice. Build it with :func:`wan_scheduler`.
    """

    __module__ = "storymem"  # as above

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in diffusers; without ``sigmas`` the levels before the shift are 1, 1 - 1/steps, ..., 1/steps."""
        if sigmas is None and timesteps is None:
            assert num_inference_steps is not None
            sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)


def wan_scheduler(shift: float = 4.0, kind: str = "unipc") -> WanUniPCScheduler | WanEulerScheduler:
    """A sampler; the published one is "unipc" at shift 4.0, and 12.0 for the first shot by text-to-video.

    Args:
        shift: of the noise levels.
        kind: "unipc" or "euler".
    """
    if not 0 < shift < float("inf"):
        raise ValueError(f"the sampler's shift must be positive, not {shift}")
    if kind == "euler":
        return WanEulerScheduler(shift=shift)
    return WanUniPCScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
