"""The torch device that a setting names."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device, setting: str = "runtime.device") -> torch.device:
    """A torch device that this machine has; ``"auto"`` is the accelerator if there is one, else the CPU.

    Args:
        device: as the user wrote it.
        setting: its name, for the message.

    Raises:
        ValueError: if this machine or this build of torch has no such device.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()  # the device "meta" exists and has no values
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{setting}={device} cannot be used here ({reason}); try auto or cpu") from None
    return torch.device("cpu") if chosen.type == "cpu" else chosen
