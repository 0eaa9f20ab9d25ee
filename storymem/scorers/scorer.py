"""What all scorers share: the checks of their input, their settings, and a frozen network in batches on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.devices import resolve_device
from storymem.io import check_finite

Network = TypeVar("Network", bound=nn.Module)

Origin = Literal["published", "own", "untrained"]
"""Where weights are from: a published checkpoint, the user's own training, or random initialisation."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NoQuality:
    """No filter: every frame scores 0 against a threshold of 0, and so passes."""

    threshold = 0.0

    def score(self, frames: Tensor) -> Tensor:
        """Zeros [N]."""
        return torch.zeros(len(check_frames(frames)))

    def to(self, device: str | torch.device) -> Self:
        """There is nothing to move."""
        return self


class Placement(TypedDict, total=False):
    """Keyword arguments of every scorer; see `Scorer`."""

    device: str | torch.device
    dtype: str | torch.dtype
    batch_size: int


class Scorer(Generic[Network]):
    """A frozen network in eval mode.

    Attributes:
        origin: where its weights are from; set by `from_pretrained` and `from_config`.

    Args:
        network: the network; it is moved, not copied.
        device: where it runs; ``"auto"``: the accelerator if there is one.
        dtype: of its weights and activations; inputs and results are always float32.
        batch_size: how many rows go through the network at once.

    Raises:
        ValueError: for a device that this machine lacks, another dtype, or a batch size below 1.
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
        self.device, self.dtype, self.batch_size = check_placement(device, dtype, batch_size)
        self.network = network.eval().requires_grad_(False)
        self._cast()
        self.network.to(self.device)

    def marked(self, origin: Origin) -> Self:
        """The scorer itself, with the origin of its weights."""
        self.origin = origin
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move the weights, for example ``to("cpu")`` between shots; returns the scorer itself."""
        before, self.device = self.device, resolve_device(device, "device")
        self.network.to(self.device)
        if before.type != "cpu" and before != self.device:
            torch.accelerator.empty_cache()
        return self

    def _cast(self) -> None:
        self.network.to(self.dtype)

    @torch.no_grad()
    def _in_batches(self, rows: Tensor, run: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """``run`` over ``rows`` batch by batch on the device: float32 on the CPU; [0, width] without rows.

        Raises:
            NotFiniteError: if a result is NaN or infinite.
        """
        results = [run(batch.to(self.device)).float().cpu() for batch in rows.split(self.batch_size) if len(batch)]
        return self._finite(torch.cat(results), "embeddings") if results else torch.empty(0, width)

    def _finite(self, results: Tensor, what: str) -> Tensor:
        """``results``; ``NotFiniteError`` for NaN, which no threshold would treat as a fault."""
        narrow = f"{self.dtype} may be too narrow for these weights: try dtype=float32"
        check_finite(results, f"{what} by {type(self).__name__}", "" if self.dtype == torch.float32 else narrow)
        return results


def check_placement(
    device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", batch_size: int = 32
) -> tuple[torch.device, torch.dtype, int]:
    """Placement as a scorer uses it; ``ValueError`` as of `Scorer`."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be 1 or more")
    return resolve_device(device, "device"), resolve_dtype(dtype), batch_size


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``dtype`` itself, or the one named float32, bfloat16 or float16; ``ValueError`` for any other name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; write one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def check_threshold(threshold: Any) -> float:
    """A threshold of quality as a float; ``ValueError`` unless it is a finite number."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise ValueError(f"threshold={threshold!r}: write a number")
    return float(threshold)


def unit(features: Tensor) -> Tensor:
    """Rows of unit length, in float32."""
    return F.normalize(features.float(), dim=-1)


def as_images(frames: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] as scorers take it: float32 [..., 3, H, W] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


# A wrong range or order of axes would give a plausible score, so every input is checked.


def check_frames(frames: Tensor) -> Tensor:
    """Return ``frames`` as float32 [N, 3, H, W] in 0..1 on the device they came from; N may be 0.

    Raises:
        ValueError: for another number or order of axes, another type, or values outside 0..1.
    """
    return _check_images(frames, "frames", "[N, 3, H, W]")


def check_clips(clips: Tensor) -> Tensor:
    """Return ``clips`` as float32 [B, T, 3, H, W] in 0..1 on the device they came from; B may be 0, not T.

    Raises:
        ValueError: as `check_frames`, and for clips without frames.
    """
    return _check_images(clips, "clips", "[B, T, 3, H, W]")


def _check_images(images: Tensor, what: str, axes: str) -> Tensor:
    given = type(images).__name__
    if isinstance(images, Tensor):
        shape, is_float = list(images.shape), images.is_floating_point()
        low, high = (bound.item() for bound in torch.aminmax(images)) if images.numel() else (0.0, 1.0)
        fits = len(shape) == axes.count(",") + 1 and shape[-3] == 3 and 0 not in shape[1:]
        if is_float and fits and low >= 0 and high <= 1:
            return images.float()
        given = f"{images.dtype} {shape} from {low:g} to {high:g}"
    raise ValueError(
        f"{what} must be RGB images in 0..1 as a float tensor {axes}, not {given} (for uint8 numpy arrays "
        "[..., H, W, 3]: storymem.scorers.scorer.as_images)"
    )


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return ``texts`` as a list; may be empty.

    Raises:
        ValueError: for a bare string (its letters would be scored) and for anything that is not a string.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings; write [{texts!r}]")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}] is {type(text).__name__}, not a string")
    return list(texts)
