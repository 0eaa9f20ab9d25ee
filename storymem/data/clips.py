"""Clips: stretches of one shot, of a size and rate that the video model knows, read from their video when needed.

A clip is a place in a video and not a file, so nothing is encoded a second time. Places are times in seconds after the
video's first frame, so that videos of varying frame rate are read right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storymem.data.settings import Bucket, CheckSettings, DataSettings, SplitSettings
from storymem.io import FileError
from storymem.media.images import fit_image
from storymem.media.video import VideoError, VideoInfo, frames_at, numbered_frames, probe

# Containers round times, at worst to milliseconds.
_ROUNDING = 2e-3
# A source may lack a few frames a second; below this share of the wanted rate, frames would be shown twice.
_LOWEST_RATE = 0.9


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot of a source video: where it lies, in seconds, and what the video is like."""

    video: str
    start: float
    end: float
    fps: float
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A stretch of a shot.

    Args:
        id: ``<video>@<start>``.
        video: path below the folder of videos, with ``/``.
        start: of the first frame, in seconds.
        fps: of the clip, whatever the video's.
        bucket: its length and size.
    """

    id: str
    video: str
    start: float
    fps: float
    bucket: Bucket

    @property
    def end(self) -> float:
        """Seconds at which its last frame is over."""
        return self.start + self.bucket.frames / self.fps

    def times(self, indices: Sequence[int] | None = None) -> list[float]:
        """Seconds at which its frames are shown; all of them by default."""
        wanted = range(self.bucket.frames) if indices is None else indices
        return [self.start + index / self.fps for index in wanted]


def video_times(path: Path) -> VideoInfo:
    """When a video's frames are shown, and how it was read. ``ValueError`` if it is broken or has a single frame."""
    with naming_fault():
        info = probe(path)
    if info.frames < 2:
        raise ValueError(f"too short: {info.frames} frames")
    return info


@contextmanager
def naming_fault() -> Iterator[None]:
    """What keeps a video from being read becomes a reason to leave it out, which begins with a word to count by."""
    try:
        yield
    except VideoError as error:
        raise ValueError(f"broken: {error.reason}") from error
    except (FileError, FileNotFoundError) as error:
        raise ValueError(f"broken: {error}") from error


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

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height / aspect))

    return min(fitting, key=distance, default=None)


def _frames_in(seconds: float, fps: float) -> int:
    return math.floor((seconds + _ROUNDING) * fps)


def read_clip(folder: Path, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a clip at its bucket's size: resized to cover it, what hangs over is cut evenly.

    Args:
        folder: of the videos.
        clip: which.
        indices: which of its frames, ascending; all by default.

    Returns:
        uint8 [len(indices), H, W, 3].

    Raises:
        ValueError: if the video is broken or ends before the last frame asked for.
    """
    path = folder / clip.video
    height, width = clip.bucket.height, clip.bucket.width
    with naming_fault():
        numbers = frames_at(path, clip.times(indices))
        fitted = {
            number: frame if frame.shape[:2] == (height, width) else fit_image(frame, height, width, "cover")
            for number, frame in numbered_frames(path, numbers)
        }
    return np.stack([fitted[number] for number in numbers])


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
