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

import av
import numpy as np
from av.container import InputContainer

from storymem.images import fit_image
from storymem.training.data_settings import Bucket, CheckSettings, DataSettings, SplitSettings

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"}

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


def find_videos(folder: Path) -> list[str]:
    """All videos in ``folder`` and below, as paths below it with ``/``, sorted.

    Raises:
        ValueError: if there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: videos= names the folder that holds the clips")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    )
    if not found:
        raise ValueError(f"there is no video in {folder}; known are: {', '.join(sorted(VIDEO_SUFFIXES))}")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """A video for reading; everything that FFmpeg refuses becomes a ``ValueError``."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("holds no video")
            container.streams.video[0].thread_type = "AUTO"
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"broken: {error.strerror}") from error


def decoded_frames(path: Path) -> Iterator[av.VideoFrame]:
    """All frames of a video in order. ``ValueError`` if it is broken."""
    with _opened(path) as container:
        yield from container.decode(video=0)


@dataclass(frozen=True, kw_only=True)
class VideoTimes:
    """Times of a video's frames in seconds after the first, and its rate and size; without decoding."""

    times: list[float]
    fps: float
    height: int
    width: int


def video_times(path: Path) -> VideoTimes:
    """Read a video's packets, one per frame. ``ValueError`` if it is broken or empty."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        stamps = sorted(
            packet.pts
            for packet in container.demux(video=0)
            if packet.size > 0 and packet.pts is not None and not packet.is_discard
        )
        assert stream.time_base is not None
        first = stream.start_time or 0
        times = [(stamp - first) * float(stream.time_base) for stamp in stamps]
        if len(times) < 2 or times[-1] <= 0:
            raise ValueError(f"too short: {len(times)} frames")
        fps = (len(times) - 1) / times[-1]
        return VideoTimes(times=times, fps=fps, height=stream.height, width=stream.width)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a video. ``ValueError`` if it is broken."""
    with _opened(path) as container:
        return container.streams.video[0].height, container.streams.video[0].width


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
    pictures = read_at(folder / clip.video, clip.times(indices))
    height, width = clip.bucket.height, clip.bucket.width
    fitted: dict[int, np.ndarray] = {}  # a frame shown twice is resized once
    for picture in pictures:
        if id(picture) not in fitted:
            same = picture.shape[:2] == (height, width)
            fitted[id(picture)] = picture if same else fit_image(picture, height, width, "cover")
    return np.stack([fitted[id(picture)] for picture in pictures])


def read_at(path: Path, times: Sequence[float]) -> list[np.ndarray]:
    """The frames that a player shows at ``times`` (seconds after the first frame, ascending), uint8 [H, W, 3] each.

    Raises:
        ValueError: as :func:`read_clip`.
    """
    found = _read_at(path, times, seek=times[0] > 1.0)
    # An index that leads to a place behind the first frame wanted: read from the beginning.
    return found if found is not None else _read_at(path, times, seek=False) or []


def _read_at(path: Path, times: Sequence[float], *, seek: bool) -> list[np.ndarray] | None:
    with _opened(path) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        base = (stream.start_time or 0) * float(stream.time_base)
        if seek:
            container.seek(round((times[0] + base) / float(stream.time_base)), stream=stream, backward=True)
        found: list[np.ndarray] = []
        shown: av.VideoFrame | None = None
        for frame in container.decode(video=0):
            if frame.time is None:
                continue
            now = frame.time - base
            if shown is None and now > times[0] + _ROUNDING and seek:
                return None
            if shown is not None:
                found += _shown_before(now, shown, times[len(found) :])
            if len(found) == len(times):
                return found
            shown = frame
        if shown is not None:
            assert shown.time is not None
            rate = float(stream.average_rate or 1)
            found += _shown_before(shown.time - base + 1.5 / rate, shown, times[len(found) :])
    if len(found) < len(times):
        raise ValueError(f"broken: ends before {times[len(found)]:.2f} s")
    return found


def _shown_before(now: float, frame: av.VideoFrame, times: Sequence[float]) -> list[np.ndarray]:
    """``frame`` for each of ``times`` that comes before ``now``, decoded to pixels at most once."""
    count = sum(time + _ROUNDING < now for time in times)
    if count == 0:
        return []
    if frame.is_corrupt:
        raise ValueError(f"broken: damaged at {frame.time:.2f} s")
    return [frame.to_ndarray(format="rgb24")] * count


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
