"""Exporting a film for an editing program: its clips, and timelines that name them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from storymem.film.folder import Film
from storymem.film.manifest import FilmError, scripts
from storymem.io import hash_file, read_json_object, replacing, replacing_folder, set_aside, write_json
from storymem.media.decoding import file_url
from storymem.media.video import iter_frames, probe

logger = logging.getLogger(__name__)

Codec = Literal["h264", "prores"]
_RECORD = ".export.json"  # the files of all exports to a folder, and the hashes that they were written with
_PRORES = "prores_ks"


def check_export(output: Path, codec: Codec) -> None:
    """Raise ``ValueError`` if a film cannot be exported to ``output``, or not in this codec."""
    if output.exists() and not output.is_dir():
        raise FilmError(f"{output} is a file: choose another output")
    others = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if others and _RECORD not in others:
        raise FilmError(f"{output} is not empty and no earlier export ({', '.join(others[:3])}): choose another output")
    if codec == "prores" and _PRORES not in av.codecs_available:
        raise ValueError(f"codec=prores: this build of PyAV has no encoder {_PRORES}; write codec=h264")


def export(film: Film, output: Path, codec: Codec) -> list[str]:
    """Write the chosen takes as clips, and ``timeline.otio`` and ``timeline.edl`` where that is possible.

    Args:
        film: that was checked.
        output: a folder, replaced as a whole; see :func:`check_export`. Files that only it has stay, and those of an
            earlier export that the user changed get other names.
        codec: "h264" copies the takes; "prores" converts them to ProRes 422 HQ.

    Returns:
        What was left out, and why.
    """
    takes = film.shots
    earlier = read_json_object(output / _RECORD) if (output / _RECORD).exists() else {}
    with replacing_folder(output) as folder:
        (folder / "clips").mkdir()
        clips = {}
        for take in takes:
            source = film.folder / take.file
            name = f"clips/shot_{take.shot:03d}_take_{take.take:03d}.{'mov' if codec == 'prores' else 'mp4'}"
            if codec == "prores":
                write_prores(folder / name, iter_frames(source), probe(source).fps)
            else:
                shutil.copyfile(source, folder / name)
            clips[take.shot] = name
        notes = [*_write_timelines(film, folder, clips)]
        written = {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*.*")}
        write_json(folder / _RECORD, earlier | written)
        for name, digest in written.items():
            if (output / name).is_file() and hash_file(output / name) not in (digest, earlier.get(name)):
                set_aside(output / name)
        return notes


def _write_timelines(film: Film, folder: Path, clips: dict[int, str]) -> Iterable[str]:
    try:
        import opentimelineio as otio
    except ImportError:
        yield "timelines are not written: they need pip install 'storymem[export]'"
        return
    rate = round(probe(folder / next(iter(clips.values()))).fps, 3)
    timeline = otio.schema.Timeline(film.story["title"])
    track = otio.schema.Track("Video", kind=otio.schema.TrackKind.Video)
    timeline.tracks.append(track)
    for number, script in enumerate(scripts(film.story), start=1):
        take = film.take_of(number - 1)
        if take is None:
            yield f"shot {number} has no take: it is a gap of a second"
            track.append(otio.schema.Gap(name=f"Shot {number}", source_range=_range(otio, round(rate), rate)))
            continue
        length = _range(otio, probe(folder / clips[number]).frames, rate)
        media = otio.schema.ExternalReference(target_url=clips[number], available_range=length)
        clip = otio.schema.Clip(name=f"Shot {number}", media_reference=media, source_range=length)
        clip.metadata["storymem"] = {"prompt": script.content["prompt"], "take": take.take, "seed": take.seed}
        track.append(clip)
    otio.adapters.write_to_file(timeline, str(folder / "timeline.otio"), adapter_name="otio_json")
    if "cmx_3600" not in otio.adapters.available_adapter_names():
        yield "timeline.edl is not written: it needs pip install 'storymem[export]'"
    elif not otio.opentime.RationalTime.is_smpte_timecode_rate(rate):
        yield f"timeline.edl is not written: EDL has no timecode at {rate:g} frames per second; timeline.otio has all"
    else:
        otio.adapters.write_to_file(timeline, str(folder / "timeline.edl"), adapter_name="cmx_3600", rate=rate)


def _range(otio: object, frames: int, rate: float) -> object:
    time = otio.opentime  # type: ignore[attr-defined]
    return time.TimeRange(time.RationalTime(0, rate), time.RationalTime(frames, rate))


def write_prores(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames, uint8 [H, W, 3] in sRGB, as ProRes 422 HQ (10 bits, BT.709) in a QuickTime file."""
    remaining = iter(frames)
    first = next(remaining)
    with replacing(path) as partial, av.open(file_url(partial), "w", format="mov") as container:
        stream = container.add_stream(_PRORES, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv422p10le"
        stream.options = {"profile": "hq"}
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        for frame in chain([first], remaining):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            colours = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
            # More threads spoil rows of chroma between them.
            container.mux(stream.encode(image.reformat(format="yuv422p10le", threads=1, **colours)))
        container.mux(stream.encode(None))
