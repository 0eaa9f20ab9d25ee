"""What all scorers share: a frozen network, its device and dtype, and giving the memory back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device; ``"auto"`` is the first CUDA device if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name (``"float32"``, ``"bfloat16"``, ``"float16"``) or itself.

    Raises:
        ValueError: for any other name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; write one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


class Scorer(Generic[Network]):
    """A frozen network in eval mode that can be moved and freed.

    Args:
        network: the network; it is moved, not copied.
        device: where it runs; ``"auto"`` prefers CUDA.
        dtype: the type its weights and activations have; inputs and results are float32 all the same.
        batch_size: how many rows go through the network at once.
    """

    def __init__(
        self,
        network: Network,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self._network: Network | None = network.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype)
        self._move()

    @property
    def network(self) -> Network:
        """The network.

        Raises:
            RuntimeError: after `free`.
        """
        if self._network is None:
            raise RuntimeError(f"this {type(self).__name__} was freed; build it again to use it")
        return self._network

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """Move the weights, for example ``to("cpu")`` between shots; returns the scorer itself."""
        was = self.device
        self.device = self.device if device is None else resolve_device(device)
        self.dtype = self.dtype if dtype is None else resolve_dtype(dtype)
        self._move()
        if was != self.device:
            _return_memory(was)
        return self

    def free(self) -> None:
        """Drop the weights for good and give accelerator memory back; a second call does nothing."""
        self._network = None
        _return_memory(self.device)

    def _move(self) -> None:
        self.network.to(device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def _in_batches(self, rows: Tensor, run: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """``run`` over ``rows`` batch by batch on the device: float32 on the CPU; [0, width] without rows."""
        results = [run(batch.to(self.device)).float().cpu() for batch in rows.split(self.batch_size) if len(batch)]
        return torch.cat(results) if results else torch.empty(0, width)


def unit(features: Tensor) -> Tensor:
    """Rows of unit length, in float32."""
    return F.normalize(features.float(), dim=-1)


def _return_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
