"""Frames <-> video files. Frames are uint8 [F, H, W, 3] in sRGB; files are H.264 in MP4.

All videos are read here, by PyAV: as a player shows them (see :mod:`storymem.media.pixels`), with frames numbered from
the first that can be decoded. decord, which other code of this field uses, decodes damaged files without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from storymem.io import replacing
from storymem.media.decoding import VideoError, file_url, opened, probe, wanted_frames
from storymem.media.decoding import VideoInfo as VideoInfo
from storymem.media.pixels import FrameConverter

READER = f"PyAV {av.__version__}"
"""What reads videos, for files that state results."""
READING = 2
"""To be raised when the same file is read as other pixels or times than before."""

_ROUNDING = 2e-3  # seconds; containers round times, at worst to milliseconds

# x264 writes other bytes with another number of threads, so that is fixed. With its macroblock tree on, it
# was seen to write other bytes on every run where the CPU has AVX-512: off, though files grow by a third.
_ENCODER_THREADS = 4
_ENCODER_OPTIONS = {"preset": "medium", "x264-params": "mbtree=0"}


def read_video(path: str | Path, indices: Sequence[int] | None = None) -> np.ndarray:
    """Decode frames of a file.

    Args:
        path: a video file of any format that FFmpeg reads.
        indices: which frames, in this order, repeats allowed; all of them by default.

    Returns:
        uint8 [len(indices), H, W, 3].

    Raises:
        FileNotFoundError: if there is no such file.
        VideoError: as :func:`probe`; also if a requested frame is damaged, or all are requested of a file that is cut
            off.
        ValueError: if an index is out of range.
    """
    info = probe(path)
    wanted = list(range(info.frames)) if indices is None else list(indices)
    outside = [index for index in wanted if not 0 <= index < info.frames]
    if outside:
        raise ValueError(f"{path} has {info.frames} frames: there is no frame {outside[0]} (frames count from 0)")
    if not wanted:
        raise ValueError(f"{path}: no frames were requested")
    places: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        places.setdefault(number, []).append(place)
    frames = np.empty((len(wanted), info.height, info.width, 3), np.uint8)
    for number, frame in numbered_frames(path, indices):
        frames[places[number]] = frame
    return frames


def iter_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Decode a file frame by frame, uint8 [H, W, 3] each, in RAM that does not grow with its length.

    Raises as :func:`read_video` does; a damaged file yields the frames before the damage first.
    """
    return (frame for _, frame in numbered_frames(path))


def numbered_frames(
    path: str | Path,
    indices: Iterable[int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    interpolation: str | None = None,
    damaged: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode frames one by one, in the order of the file, each with its number.

    Args:
        path: of the video.
        indices: which, in any order; all by default.
        size: height and width; those of the file by default.
        interpolation: of swscale, for ``size``.
        damaged: include frames that were decoded from damaged data, and omit those that were not decoded at all.

    Yields:
        number and uint8 [H, W, 3].

    Raises:
        As :func:`read_video`.
    """
    info = probe(path)
    wanted = set(range(info.frames) if indices is None else indices)
    converter: FrameConverter | None = None
    for number, frame, video in wanted_frames(path, info, wanted):
        if frame.is_corrupt and not damaged:
            raise VideoError(path, f"is damaged: frame {number} cannot be decoded whole")
        try:
            converter = converter or FrameConverter(frame, video.pixel_aspect)
            yield number, converter.image(frame, size, interpolation)
        except ValueError as error:
            raise VideoError(path, f"cannot be read: {error}") from error
        wanted.discard(number)
    if wanted and not damaged:
        raise VideoError(path, f"is damaged: frame {min(wanted)} cannot be decoded")
    if indices is None and not damaged and info.missing:
        raise VideoError(path, f"is cut off or has lost pieces: about {info.missing} frames are missing")


def frames_at(path: str | Path, times: Sequence[float]) -> list[int]:
    """The number of the frame that a player shows at each of ``times``, in seconds after the first frame.

    Raises:
        VideoError: as :func:`probe`; also if the video ends before one of them.
    """
    info = probe(path)
    end = info.times[-1] + 1.5 / (info.fps or 1)
    late = [time for time in times if time + _ROUNDING >= end]
    if late:
        raise VideoError(path, f"ends before {late[0]:.2f} s")
    found = np.searchsorted(info.times, np.asarray(times) + _ROUNDING, side="right") - 1
    return np.maximum(found, 0).tolist()


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float | Fraction, *, crf: int = 16) -> None:
    """Write frames as H.264 (yuv420p, BT.601) in one step: the file is complete or not there.

    The same frames give the same bytes on every run and on any number of cores.

    Args:
        path: the file, with any suffix; the container is MP4.
        frames: uint8 [F, H, W, 3], or an iterable of [H, W, 3] that need not fit into RAM.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (largest) to 51; 16 is visually close to lossless.

    Raises:
        ValueError: if there is no frame, a side is odd (yuv420p halves both), or a frame has another type or size.
        FileError: if the file cannot be written.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: frames are {width}x{height}; H.264 needs an even width and height")
    with replacing(path) as partial, av.open(file_url(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        _set_up_encoder(stream, height, width, crf)
        for frame in chain([first], remaining):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise ValueError(
                    f"{path}: frames must all be uint8 [{height}, {width}, 3], one is {frame.dtype} {list(frame.shape)}"
                )
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))


def _set_up_encoder(stream: VideoStream, height: int, width: int, crf: int) -> None:
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = {"crf": str(crf), **_ENCODER_OPTIONS}
    context = stream.codec_context
    context.thread_count, context.thread_type = _ENCODER_THREADS, "FRAME"
    # State limited range and BT.601 (6 in H.264's tables): players guess an unstated matrix by the size.
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = 6


def join_videos(
    parts: Sequence[str | Path | Iterable[np.ndarray]], out: str | Path, fps: float | None = None
) -> list[str]:
    """Join videos one after the other.

    What :func:`write_video` wrote is not encoded again: the result decodes to exactly its frames. What comes from
    another encoder, or was written with other settings, is encoded again. Sound is left out.

    Args:
        parts: videos of equal size and frame rate; or frames, uint8 [H, W, 3], which are encoded.
        out: the joined file, written in one step.
        fps: frames per second of parts that are frames; that of the first video by default.

    Returns:
        a line for each video that was encoded again, and for each whose sound was left out.

    Raises:
        ValueError: if there are no parts, or parts differ in size or frame rate; without ``fps`` and videos.
        VideoError: as :func:`probe`.
    """
    if not parts:
        raise ValueError(f"{out}: there are no videos to join")
    paths, name = [Path(part) for part in parts if isinstance(part, str | Path)], Path(out).name
    rate = fps or (probe(paths[0]).fps if paths else 0)
    if not rate:
        raise ValueError(f"{out}: frames have no rate of their own: give fps")
    notes = [f"{path} has sound, which is left out of {name}" for path in paths if probe(path).sound]
    temporary: list[Path] = []

    def encoded(frames: Iterable[np.ndarray]) -> _Part:
        # A name that storymem.io.remove_leftovers deletes
        temporary.append(Path(out).with_name(f".{name}.{len(temporary)}.partial"))
        write_video(temporary[-1], frames, rate)
        return _part(temporary[-1])

    try:
        found = [_part(part) if isinstance(part, str | Path) else encoded(part) for part in parts]
        first = probe(found[0].path)
        for path in (part.path for part in found):
            info = probe(path)
            if (info.height, info.width) != (first.height, first.width) or abs(info.fps - rate) > 0.01 * rate:
                raise ValueError(f"{path} cannot be joined to {found[0].path}: its size or rate differs; fit it first")
        if found[0].format is None or any(part.format != found[0].format for part in found):
            ours = encoded([next(iter_frames(found[0].path))]).format
            for number, part in enumerate(found):
                if part.format != ours:
                    found[number] = encoded(iter_frames(part.path))
                    notes.append(f"{part.path} comes from another encoder and is encoded again for {name}")
        _concatenate(found, out)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return notes


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A video to be joined.

    Args:
        path: of the file.
        format: what must be equal for packets to follow each other in one stream; None if they cannot be copied.
        delay: by how many frames decoding must run ahead of display; very short files have no B-frames.
    """

    path: Path
    format: tuple[object, ...] | None
    delay: int


def _part(path: str | Path) -> _Part:
    info = probe(path)
    with opened(path) as video:
        stream = video.stream
        as_stored = all(note.startswith("untagged") for note in info.notes)
        ticks = _ticks_per_frame(stream)
        if (
            not (as_stored and ticks and info.stamps)
            or "mp4" not in video.container.format.name
            or len(info.stamps) != stream.frames
            or any(stamp != round(number * ticks) for number, stamp in enumerate(info.stamps))
        ):
            return _Part(path=Path(path), format=None, delay=0)
        context = stream.codec_context
        form = (
            *(context.name, context.pix_fmt, stream.width, stream.height),
            *(stream.average_rate, stream.time_base, context.extradata),
        )
        first = next(video.packets())
        assert first.pts is not None and first.dts is not None, path  # noqa: PT018
        return _Part(path=Path(path), format=form, delay=round((first.pts - first.dts) / ticks))


def _concatenate(parts: Sequence[_Part], out: str | Path) -> None:
    """Copy the packets of parts of one format, so that frames follow each other without gap.

    Packets come in decoding order, so the decoding times simply count up, ``delay`` frames early.
    """
    delay, start = max(part.delay for part in parts), 0
    with opened(parts[0].path) as first, replacing(out) as partial, av.open(file_url(partial), "w", "mp4") as film:
        stream = film.add_stream_from_template(first.stream)
        ticks = _ticks_per_frame(first.stream)
        for part in parts:
            count = 0
            with opened(part.path) as video:
                for packet in video.packets():
                    assert packet.pts is not None, part.path
                    packet.pts += round(start * ticks)
                    packet.dts = round((start + count - delay) * ticks)
                    packet.stream = stream
                    film.mux(packet)
                    count += 1
            start += count


def _ticks_per_frame(stream: VideoStream) -> Fraction:
    return 1 / (stream.average_rate * stream.time_base) if stream.average_rate and stream.time_base else Fraction(0)
