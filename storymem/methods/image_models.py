"""What makes images: pipelines of diffusers, or the video model itself."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, check_bounds
from storymem.io import check_finite
from storymem.wan.runtime import check_runtime
from storymem.wan.settings import RuntimeSettings
from storymem.wan.shots import WanShotGenerator
from storymem.wan.sources import check_weights, required_weights
from storymem.weights import Weights, locate


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageSettings:
    """How images are made; methods have keys of their own besides.

    Args:
        weights: of the image model, in diffusers' layout.
        steps: of sampling.
        guidance: classifier-free, or what the model was distilled for.
        height: of an image (of a panel) in pixels; it is cropped to the film's size.
        width: likewise.
    """

    weights: Weights
    steps: int
    guidance: float
    height: int
    width: int
    multiple: ClassVar[int] = 16  # of height and width

    def __post_init__(self) -> None:
        check_bounds(self, steps=(1, 1000), guidance=(1, 100), height=(32, 4096), width=(32, 4096))
        if self.height % self.multiple or self.width % self.multiple:
            sides = f"{self.height} and {self.width}"
            raise ValueError(f"height and width must be multiples of {self.multiple}, not {sides}")


class ImageModel(ABC):
    """A pipeline of diffusers, loaded on first use.

    Args:
        runtime: names the device; on an accelerator whole networks are moved there one at a time.
        weights: all that it loads, the pipeline in diffusers' layout first.
        pipe: a loaded pipeline.
    """

    dtype = torch.bfloat16  # on an accelerator; the CPU computes in 16 bits slowly or not at all

    def __init__(self, runtime: RuntimeSettings, *weights: Weights, pipe: Any = None) -> None:
        self.runtime, self.weights, self._pipe = runtime, list(weights), pipe

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """The pipeline in ``folder``."""

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        if self._pipe is None:
            device = check_runtime(self.runtime)
            self._pipe = self.load(locate(self.weights[0]), torch.float32 if device.type == "cpu" else self.dtype)
            self._pipe.set_progress_bar_config(disable=True)
            if device.type != "cpu":
                self._pipe.enable_model_cpu_offload(device=device)
        return self._pipe

    def check(self) -> None:
        """Raise ``MissingWeights`` if it cannot be loaded."""
        if self._pipe is None:
            for weights in self.weights:
                locate(weights)

    def free(self) -> None:
        """Free the networks."""
        self._pipe = None
        gc.collect()


class WanImages(WanShotGenerator):
    """The video model in place of an :class:`ImageModel`."""

    @property
    def weights(self) -> list[Weights]:
        """All that it loads."""
        return required_weights(self.model, text_to_video=False, continuity="none", sampler=self.sampler)

    def check(self) -> None:
        """Raise ``MissingWeights`` or ``FileError`` if it cannot be loaded."""
        check_weights(self.model, text_to_video=False, sampler=self.sampler)

    def free(self) -> None:
        """Free the networks."""
        self._free_experts()


def to_images(images: np.ndarray) -> list[np.ndarray]:
    """Images in 0..1, [N, H, W, 3], as uint8; ``NotFiniteError`` if any value is none."""
    check_finite(images, "an image", "check the weights of the image model, or its data type")
    return [(image.clip(0, 1) * 255).round().astype(np.uint8) for image in images]
