"""Image models of diffusers: where they run, and what they return."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from storymem.io import check_finite
from storymem.wan.runtime import check_runtime
from storymem.wan.settings import RuntimeSettings


def place_image_pipeline(pipe: Any, runtime: RuntimeSettings) -> Any:
    """The pipeline on the runtime's device; on an accelerator whole networks are moved there one at a time."""
    device = check_runtime(runtime)
    pipe.set_progress_bar_config(disable=True)
    if device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    return pipe


def image_dtype(runtime: RuntimeSettings, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` on an accelerator; float32 on the CPU, which computes in 16 bits slowly or not at all."""
    return torch.float32 if check_runtime(runtime).type == "cpu" else dtype


def image_device(pipe: Any) -> torch.device:
    """Where its networks run, which is not where offloaded weights are."""
    return pipe._execution_device


def to_images(images: np.ndarray) -> list[np.ndarray]:
    """Images in 0..1, [N, H, W, 3], as uint8; ``NotFiniteError`` if any value is none."""
    check_finite(images, "an image", "check the weights of the image model, or its data type")
    return [(image.clip(0, 1) * 255).round().astype(np.uint8) for image in images]
