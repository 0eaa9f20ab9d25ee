"""Optimizer and schedule from their settings, and the optimizer's state under the parameters' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


def learning_rate(settings: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """Step (from 0) -> its learning rate, in a run of ``steps`` steps."""
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=settings.lr)
    schedule = get_scheduler(
        settings.schedule, optimizer=nothing, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: settings.lr * factor(step)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer keeps of each parameter, under ``<parameter>:<entry>``: tensors and other values.

    Tensors are whole and on the CPU. Every process must ask at the same time.
    """
    entries = {
        f"{name}:{key}": whole(value).detach().cpu().contiguous() if isinstance(value, Tensor) else value
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in entries.items() if key not in tensors}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Take up what :func:`optimizer_state` returned, also on another number of processes."""
    for key, value in (tensors | numbers).items():  # type: ignore[operator]
        name, _, entry = key.rpartition(":")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU.
        on_device = isinstance(value, Tensor) and value.ndim > 0
        optimizer.state[parameter][entry] = like(value, parameter) if on_device else value
