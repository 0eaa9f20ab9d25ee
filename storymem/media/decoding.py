"""Video files as FFmpeg decodes them: which frames there are, when they are shown, and how to decode them.

:mod:`storymem.media.video` turns them into images.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from storymem.io import FileError, check_regular
from storymem.media.pixels import FrameConverter

#: For metadata that is not UTF-8, which PyAV 19 reads without being asked to.
_LENIENT: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
# Each packet of these is one frame; of others (VP8 has invisible frames) frames are counted by decoding.
_FRAME_PER_PACKET = {
    *("h264", "hevc", "libdav1d", "av1", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "h263"),
    *("mjpeg", "png", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "qtrle", "rawvideo", "v210", "cfhd"),
}
_SEEK_FROM = 16  # frames; decoding fewer is as quick as seeking
LONGEST_STILL = 0.5  # seconds; where no frame comes for longer, frames are missing or the image stands still


class VideoError(FileError):
    """A file that is no video, is damaged, or holds what cannot be read; ``reason`` is the message without its name."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoInfo:
    """What a video file holds; only frames that can be decoded count, whatever the header states.

    Args:
        times: when each frame is shown, float64 [frames], in seconds after the first, ascending.
        fps: frames per second, on average and without pauses; 0 for a single frame without a stated rate.
        height, width: of a frame as it is shown: upright, of square pixels.
        missing: frames that the file states and does not hold whole; not 0 if it is cut off or pieces are lost.
        notes: how what is read differs from what is stored ("rotated: by 90 degrees ..."), and what was guessed
            ("untagged: ..."); each begins with a word to count by.
        stamps: presentation times of the frames in the stream's own unit, ascending; None where frames can only
            be counted.
        interlaced: fields are made into whole frames.
        sound: there is some, which is not read.
    """

    times: np.ndarray
    fps: float
    height: int
    width: int
    missing: int
    notes: tuple[str, ...]
    stamps: list[int] | None = None
    interlaced: bool = False
    sound: bool = False

    @property
    def frames(self) -> int:
        """How many."""
        return len(self.times)


def file_url(path: str | Path) -> str:
    """A path that FFmpeg reads as a file with any characters (``a:b.mp4``, ``-i``, ``%d``)."""
    return f"file:{path}"


class Video:
    """An open file: its packets and its frames as they are stored."""

    def __init__(self, path: str | Path, container: InputContainer, stream: VideoStream) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.pixel_aspect = stream.sample_aspect_ratio
        self.empty_packets = 0  # "show the last frame again" in AVI
        if stream.codec_context is None:
            raise VideoError(path, "holds video of a codec that is not known")
        # Not "AUTO": when frames are decoded side by side, FFmpeg flags a damaged one on some runs only.
        stream.thread_type = "SLICE"
        self._decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ("vp8", "vp9"):
            with suppress(av.FFmpegError, ValueError):  # FFmpeg's own decoders drop the alpha channel
                name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name]
                self._decoder = av.CodecContext.create(name, "r")

    def packets(self) -> Iterator[av.Packet]:
        """All packets with content."""
        count = 0
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # an empty one would end the decoding
                    yield packet
                    count += 1
                self.empty_packets += packet.size == 0 and packet.dts is not None
        except av.FFmpegError as error:
            raise VideoError(self.path, f"is damaged after {count} packets of data ({error.strerror})") from error

    def frames(self, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
        """Frames in the order in which they are shown; packets that refer to what is not in the file give none."""
        count = 0
        try:
            for packet in chain(packets, [None]):
                try:
                    frames = self._decoder.decode(packet)
                except av.error.InvalidDataError:
                    if count:
                        raise
                    continue
                for frame in frames:
                    yield frame
                    count += 1
        except av.FFmpegError as error:
            raise VideoError(self.path, f"is damaged: only {count} frames can be decoded ({error.strerror})") from error

    def numbered(self, info: VideoInfo) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their numbers, from where the container was sought to."""
        frames = self.frames(self.packets())
        if info.interlaced:
            frames = _deinterlaced(frames, self.stream)
        if info.stamps is None:
            yield from enumerate(frames)
            return
        for frame in frames:
            number = bisect_left(info.stamps, frame.pts or 0)
            if number < len(info.stamps) and info.stamps[number] == frame.pts:
                yield number, frame


@contextmanager
def opened(path: str | Path) -> Iterator[Video]:
    """A file for reading. Raises as :func:`probe`."""
    check_regular(path)
    try:
        # Files that name other files (playlists) may name local ones only.
        container = av.open(file_url(path), options={"protocol_whitelist": "file"}, **_LENIENT)
    except av.FFmpegError as error:
        raise VideoError(path, f"cannot be read as a video: {error.strerror}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(path, "holds no video stream")
        yield Video(path, container, stream)


def probe(path: str | Path) -> VideoInfo:
    """Read a video's packets and decode its first frame; the result is cached for as long as the file is the same.

    All frames are decoded only where packets do not determine frames: AVI and raw streams, VP8, interlaced video.

    Raises:
        FileNotFoundError: if there is no such file.
        VideoError: if it is no video, holds no frame that can be decoded, or colours that are not known.
    """
    status = check_regular(path).stat()
    return _probed(str(Path(path).absolute()), path, (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=256)
def _probed(absolute: str, path: str | Path, version: tuple[int, ...]) -> VideoInfo:
    """``absolute`` and ``version`` identify a file and its content; ``path`` is for messages."""
    with opened(path) as video:
        seen: list[_Packet] = []
        packets = _recorded(video.packets(), seen)
        first = next(video.frames(packets), None)
        if first is None:
            raise VideoError(path, "holds no frame that can be decoded")
        for _ in packets:
            pass
        try:
            images = FrameConverter(first, video.pixel_aspect)
        except ValueError as error:
            raise VideoError(path, f"cannot be read: {error}") from error
        stamps = _stamps(seen, first, video)
        missing = max(0, video.stream.frames - len(seen) - video.empty_packets)
        missing += sum(packet.corrupt and (packet.pts or 0) >= (first.pts or 0) for packet in seen)
        base, rate = float(video.stream.time_base or 0), float(video.stream.average_rate or 0)
        sound = bool(video.container.streams.audio)
        stated_end = _seconds(video.stream.metadata.get("DURATION", ""))  # Matroska and WebM
    notes = list(images.notes)
    if first.interlaced_frame:
        notes.append("interlaced: fields made into whole frames by bwdif")
    if stamps and (lost := sum(not packet.discard and (packet.pts or 0) < stamps[0] for packet in seen)):
        notes.append(f"late start: {lost} frames before the first that can be decoded are left out")
    shown = _decoded_stamps(path) if stamps is None else stamps
    times = (np.array(shown, np.float64) - shown[0]) * base
    if (np.diff(times) <= 0).any():
        notes.append("no times: frames are assumed to follow each other at the stated rate")
        times = np.arange(len(times)) / (rate or 25)
    fps = _average_rate(times, rate)
    if not missing and fps and len(times) > 1 and stated_end - times[-1] > max(3 / fps, 2 * np.diff(times).max()):
        missing = round((stated_end - times[-1]) * fps)
    if missing:
        notes.append(f"incomplete: about {missing} frames of those that it states are cut off or damaged")
    return VideoInfo(
        times=times,
        fps=fps,
        height=images.size[0],
        width=images.size[1],
        missing=missing,
        notes=tuple(notes),
        stamps=stamps,
        interlaced=first.interlaced_frame,
        sound=sound,
    )


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    discard: bool
    corrupt: bool


def _recorded(packets: Iterator[av.Packet], seen: list[_Packet]) -> Iterator[av.Packet]:
    for packet in packets:
        seen.append(_Packet(packet.pts, packet.dts, packet.is_discard, packet.is_corrupt))
        yield packet


def _stamps(seen: Sequence[_Packet], first: av.VideoFrame, video: Video) -> list[int] | None:
    """When the frames are shown, by the packets; None where these do not determine it."""
    if video.stream.codec_context.name not in _FRAME_PER_PACKET or video.container.format.name == "avi":
        return None
    times = [packet.pts for packet in seen if packet.pts is not None and not packet.discard]
    if first.interlaced_frame or first.pts is None or len(times) < sum(not packet.discard for packet in seen):
        return None
    order = [packet.dts for packet in seen if packet.dts is not None]
    stamps = sorted(time for time in times if time >= first.pts)
    if any(after < before for before, after in pairwise(order)) or len(set(stamps)) < len(stamps):
        return None  # recordings put one after the other, each with times of its own
    return stamps if stamps and stamps[0] == first.pts else None


def _seconds(duration: str) -> float:
    """Seconds of ``01:02:03.5``; 0 for any other text."""
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", duration)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0


def _decoded_stamps(path: str | Path) -> list[int]:
    """Presentation times of all frames, 0 for those that have none."""
    with opened(path) as video:
        return [frame.pts or 0 for frame in video.frames(video.packets())]


def _average_rate(times: np.ndarray, stated: float) -> float:
    """Frames per second, as stated if that agrees with the times."""
    if len(times) < 2:
        return stated
    steps = np.diff(times)
    measured = 1 / float(steps[steps <= max(LONGEST_STILL, 3 * np.median(steps))].mean())
    return stated if abs(stated - measured) < 0.01 * measured else measured


def wanted_frames(
    path: str | Path, info: VideoInfo, wanted: set[int], *, seek: bool = True
) -> Iterator[tuple[int, av.VideoFrame, Video]]:
    """The wanted frames, in order; those that cannot be decoded are missing."""
    remaining = sorted(wanted, reverse=True)
    if not remaining:
        return
    seek = seek and info.stamps is not None and remaining[-1] >= _SEEK_FROM
    with opened(path) as video:
        if seek and info.stamps is not None:
            video.container.seek(info.stamps[remaining[-1]], stream=video.stream, backward=True)
        for number, frame in video.numbered(info):
            # After seeking, frames may be missing that are there when all is decoded from the beginning.
            if seek and (number > remaining[-1] or (number == remaining[-1] and frame.is_corrupt)):
                break
            while remaining and remaining[-1] < number:
                remaining.pop()
            if remaining and remaining[-1] == number:
                yield number, frame, video
                remaining.pop()
            if not remaining:
                return
    if seek:
        yield from wanted_frames(path, info, set(remaining), seek=False)


def _deinterlaced(frames: Iterator[av.VideoFrame], stream: VideoStream) -> Iterator[av.VideoFrame]:
    """As many frames, each with the lines of the field that it lacks."""
    graph = av.filter.Graph()
    first = next(frames, None)
    if first is None:
        return
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, time_base=stream.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    for frame in chain([first], frames, [None]):
        graph.push(frame)
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                yield graph.pull()
