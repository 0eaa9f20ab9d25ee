"""Optimizer and schedule from their settings, and the optimizer's state under the parameters' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from storymem.training.settings import OptimizerSettings, ParallelSettings
from storymem.training.sharding import like, whole


def check_optimizer(settings: OptimizerSettings, parallel: ParallelSettings, device: torch.device) -> None:
    """Raise ``ValueError`` for an optimizer that cannot run here."""
    if settings.name != "adamw_8bit":
        return
    if parallel.strategy == "fsdp":
        raise ValueError("optimizer.name=adamw_8bit does not know sharded parameters: use adamw with fsdp")
    if device.type == "cpu":
        raise ValueError("optimizer.name=adamw_8bit needs an accelerator: use adamw on the CPU")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            "optimizer.name=adamw_8bit needs bitsandbytes: pip install 'storymem[four-bit]', or use adamw"
        ) from None


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over ``parameters``, with its state in 32 or in 8 bits."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def build_schedule(
    settings: OptimizerSettings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over ``steps`` steps."""
    return get_scheduler(
        settings.schedule,
        optimizer=optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=steps,
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """What the optimizer keeps of each parameter, by its name, whole and on the CPU.

    Every process must ask at the same time.
    """
    return {
        name: {
            key: whole(value).detach().cpu() if isinstance(value, Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Any]],
) -> None:
    """Take up what :func:`optimizer_state` returned, also on another number of processes."""
    for name, entries in state.items():
        parameter = parameters[name]
        # AdamW counts its steps on the CPU.
        optimizer.state[parameter] = {
            key: like(value, parameter) if isinstance(value, Tensor) and value.ndim else value
            for key, value in entries.items()
        }
