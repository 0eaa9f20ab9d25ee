"""Frames <-> video files. Frames are uint8 [F, H, W, 3] in RGB; files are H.264 in MP4.

decord reads where it is installed (it has wheels for Linux x86_64 and Windows), PyAV everywhere else and
where decord fails; both give the same pixels. PyAV writes and joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from storymem.images import read_image, write_image
from storymem.io import replacing

__all__ = [
    "VideoInfo",
    "iter_frames",
    "join_videos",
    "probe",
    "read_image",
    "read_video",
    "write_image",
    "write_video",
]

# x264 writes other bytes with another number of threads, so that is fixed. With its macroblock tree on, it
# was seen to write other bytes on every run where the CPU has AVX-512: off, though files grow by a third.
_ENCODER_THREADS = 4
_ENCODER_OPTIONS = {"preset": "medium", "x264-params": "mbtree=0"}


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds; ``frames`` is counted, not taken from the file's header, which may lie."""

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | Path) -> VideoInfo:
    """Count the frames of a file and read its size, without decoding.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a video.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        return VideoInfo(
            frames=_count_frames(container),
            fps=float(stream.average_rate or 0),
            height=stream.height,
            width=stream.width,
        )


def read_video(path: str | Path, indices: Sequence[int] | None = None) -> np.ndarray:
    """Decode frames of a file.

    Args:
        path: a video file of any format that ffmpeg reads.
        indices: which frames, in this order, repeats allowed; all of them by default.

    Returns:
        uint8 [len(indices), H, W, 3].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a video, ends early or is damaged before the last frame asked for, or an
            index is out of range.
    """
    with _opened(path) as container:
        claimed = container.streams.video[0].frames
        count = _count_frames(container)
    wanted = list(range(count)) if indices is None else list(indices)
    outside = [index for index in wanted if not 0 <= index < count]
    if outside:
        raise ValueError(f"{path} has {count} frames: there is no frame {outside[0]} (frames count from 0)")
    if not wanted:
        raise ValueError(f"{path}: no frames were asked for, or it has none")
    # decord can hang for ever on a file whose header promises more frames than there are.
    frames = _read_with_decord(path, wanted) if claimed == count else None
    return _read_with_pyav(path, wanted) if frames is None else frames


def iter_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Decode a file frame by frame, uint8 [H, W, 3] each, in memory that does not grow with its length.

    Raises as :func:`read_video` does; a damaged file yields the frames before the damage first.
    """
    for frame in _decoded(path):
        yield frame.to_ndarray(format="rgb24")


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float | Fraction, *, crf: int = 16) -> None:
    """Write frames as H.264 (yuv420p, BT.601) in one step: the file is complete or not there.

    The same frames give the same bytes, run after run and whatever the number of cores.

    Args:
        path: the file, with any suffix; the container is MP4.
        frames: uint8 [F, H, W, 3], or an iterable of [H, W, 3] that need not fit into memory.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (largest) to 51; 16 is hard to tell from the source.

    Raises:
        ValueError: if there is no frame, a side is odd (yuv420p halves both), or a frame has another type or
            size.
        OSError: if the file cannot be written.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: frames are {width}x{height}; H.264 needs an even width and height")
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        _set_up_encoder(stream, height, width, crf)
        for frame in chain([first], remaining):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise ValueError(
                    f"{path}: frames must all be uint8 [{height}, {width}, 3], one is {frame.dtype} {list(frame.shape)}"
                )
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def join_videos(paths: Sequence[str | Path], out: str | Path) -> None:
    """Put videos one after the other without encoding again: the result decodes to exactly the parts' frames.

    Args:
        paths: files written by :func:`write_video` with equal size, fps and settings.
        out: the joined file, written in one step.

    Raises:
        ValueError: if there are no parts, or one differs from the first in codec, size, frame rate or
            settings.
    """
    if not paths:
        raise ValueError(f"{out}: there are no videos to join")
    delay = _common_delay(paths)
    with _opened(paths[0]) as first, replacing(out) as partial, av.open(str(partial), "w", "mp4") as film:
        stream = film.add_stream_from_template(first.streams.video[0])
        start = 0
        for path in paths:
            with _opened(path) as part:
                start += _append(part, film, stream, start=start, delay=delay)


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no video file {path}")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no video stream")
        yield container


def _count_frames(container: InputContainer) -> int:
    """Read through the packets, one per frame, and leave the container at its end."""
    return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))


def _decoded(path: str | Path) -> Iterator[av.VideoFrame]:
    with _opened(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        count = 0
        try:
            for frame in container.decode(video=0):
                yield frame
                count += 1
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged: only {count} frames can be decoded ({error.strerror})") from error


def _read_with_pyav(path: str | Path, wanted: list[int]) -> np.ndarray:
    needed = set(wanted)
    found = {
        index: frame.to_ndarray(format="rgb24")
        for index, frame in enumerate(islice(_decoded(path), max(needed) + 1))
        if index in needed
    }
    if len(found) < len(needed):
        raise ValueError(f"{path} ends early: frame {min(needed - found.keys())} cannot be decoded")
    return np.stack([found[index] for index in wanted])


def _read_with_decord(path: str | Path, wanted: list[int]) -> np.ndarray | None:
    """``None`` where decord is not installed or cannot read the file."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    try:
        return decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy()
    except (decord.DECORDError, IndexError):
        return None


def _set_up_encoder(stream: VideoStream, height: int, width: int, crf: int) -> None:
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = {"crf": str(crf), **_ENCODER_OPTIONS}
    context = stream.codec_context
    context.thread_count, context.thread_type = _ENCODER_THREADS, "FRAME"
    # Name the YUV, lest players guess by size: limited range, BT.601 (6 in H.264's tables).
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = 6


def _common_delay(paths: Sequence[str | Path]) -> int:
    """Check that packets of all files can follow each other in one stream.

    Returns:
        by how many frames decoding must run ahead of display for all of them; very short files have no
        B-frames.
    """
    formats, delays = [], []
    for path in paths:
        with _opened(path) as container:
            stream = container.streams.video[0]
            formats.append(_format(stream))
            first = next(container.demux(stream))
            assert first.pts is not None and first.dts is not None, path  # noqa: PT018
            delays.append(round((first.pts - first.dts) / _ticks_per_frame(stream)))
        for name, value in formats[-1].items():
            if value != formats[0][name]:
                raise ValueError(
                    f"{path} cannot be joined to {paths[0]}: the {name} differs ({value!r}, not {formats[0][name]!r})"
                )
    return max(delays)


def _format(stream: VideoStream) -> dict[str, object]:
    return {
        "codec": stream.codec_context.name,
        "size": f"{stream.width}x{stream.height}",
        "pixel format": stream.codec_context.pix_fmt,
        "frame rate": stream.average_rate,
        "time base": stream.time_base,
        "encoder settings": stream.codec_context.extradata,
    }


def _ticks_per_frame(stream: VideoStream) -> Fraction:
    assert stream.average_rate and stream.time_base, "a file without frame rate"  # noqa: PT018
    return 1 / (stream.average_rate * stream.time_base)


def _append(part: InputContainer, film: OutputContainer, stream: VideoStream, *, start: int, delay: int) -> int:
    """Copy a part's packets so that it begins at frame ``start``; return its number of frames.

    Packets come in decoding order, so the decoding times simply count up, ``delay`` frames early.
    """
    ticks = _ticks_per_frame(part.streams.video[0])
    frames = 0
    for packet in part.demux(video=0):
        if packet.pts is None:
            continue
        packet.pts += round(start * ticks)
        packet.dts = round((start + frames - delay) * ticks)
        packet.stream = stream
        film.mux(packet)
        frames += 1
    return frames
