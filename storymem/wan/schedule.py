"""The published sampler: UniPC on Wan's exact sigmas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
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
    above 0. The shift ``s -> shift * s / (1 + (shift - 1) * s)``, the integer timesteps and the last sigma 0 are
    the same in both. Build it with :func:`wan_scheduler`.
    """

    # Saved pipelines note where each part's class is found, and diffusers takes "wan" in a module's path for its
    # own `diffusers.pipelines.wan`; under the package's name the class is found again.
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


def wan_scheduler(shift: float = 4.0, **overrides: Any) -> WanUniPCScheduler:
    """The sampler of the published settings; ``shift`` 4.0 for memory-to-video, 12.0 for the first shot by T2V."""
    if shift <= 0:
        raise ValueError(f"the sampler's shift must be positive, not {shift}")
    settings: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "num_train_timesteps": 1000,
    }
    return WanUniPCScheduler(**(settings | overrides))
