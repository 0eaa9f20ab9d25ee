"""What all scorers share: a frozen network, its device and dtype, and giving the memory back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.io import check_finite

Network = TypeVar("Network", bound=nn.Module)

#: Where weights are from: a published checkpoint, somebody's own training, or chance.
Origin = Literal["published", "own", "untrained"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device; ``"auto"`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: for a name that torch does not know.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}; write auto, cpu, cuda or cuda:0") from None


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name (``"float32"``, ``"bfloat16"``, ``"float16"``) or itself.

    Raises:
        ValueError: for any other name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; write one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def check_threshold(threshold: Any) -> float:
    """A threshold of quality as a float. Raises ``ValueError`` for what is no number: no frame would pass."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise ValueError(f"threshold={threshold!r}: write a number")
    return float(threshold)


class Scorer(Generic[Network]):
    """A frozen network in eval mode that can be moved and freed.

    Attributes:
        origin: where its weights are from; `from_pretrained` and `from_config` say so.

    Args:
        network: the network; it is moved, not copied.
        device: where it runs; ``"auto"``: the accelerator if there is one.
        dtype: the type its weights and activations have; inputs and results are float32 all the same.
        batch_size: how many rows go through the network at once.
    """

    origin: Origin = "own"

    def __init__(
        self,
        network: Network,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size!r}")
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
        """``run`` over ``rows`` batch by batch on the device: float32 on the CPU; [0, width] without rows.

        Raises:
            NotFiniteError: if a result is NaN or infinite.
        """
        results = [run(batch.to(self.device)).float().cpu() for batch in rows.split(self.batch_size) if len(batch)]
        if not results:
            return torch.empty(0, width)
        return self._finite(torch.cat(results), "embeddings")

    def _finite(self, results: Tensor, what: str) -> Tensor:
        """``results``, if they are numbers: an embedding or score that is none must not decide anything."""
        narrow = f"{self.dtype} may be too narrow for these weights: try dtype=float32"
        check_finite(results, f"{what} by {type(self).__name__}", "" if self.dtype == torch.float32 else narrow)
        return results


def unit(features: Tensor) -> Tensor:
    """Rows of unit length, in float32."""
    return F.normalize(features.float(), dim=-1)


def _return_memory(device: torch.device) -> None:
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
