"""Captions of videos: text files beside them, or one table for a whole folder; loads no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = ("captions.jsonl", "captions.csv")
_COLUMNS = {"video", "caption", "start", "end"}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text for a video, or for the part of it from ``start`` to ``end`` in seconds."""

    text: str
    start: float = 0.0
    end: float = float("inf")


class Captions:
    """The captions of a folder of videos.

    Args:
        by_video: video, as a path below the folder with ``/`` -> its captions.
    """

    def __init__(self, by_video: Mapping[str, list[Caption]]) -> None:
        self._by_video = by_video

    def of(self, video: str, start: float, end: float) -> str | None:
        """The caption of a part of a video (seconds): the one that covers most of it, the narrowest of several.

        A caption without times is for all shots of its video. None if nothing covers the part.
        """
        best, covered_most = None, 0.0
        for caption in sorted(self._by_video.get(video, ()), key=lambda caption: caption.end - caption.start):
            covered = min(end, caption.end) - max(start, caption.start)
            if covered > covered_most + 1e-6:
                best, covered_most = caption.text, covered
        return best


def read_captions(folder: Path, videos: Iterable[str], table: Path | None) -> Captions:
    """Collect the captions of ``videos``.

    Args:
        folder: holds the videos and ``.txt`` files of the same names.
        videos: paths below ``folder``.
        table: a ``.jsonl`` or ``.csv`` file with the columns ``video``, ``caption`` and, where wanted, ``start`` and
            ``end`` in seconds; None: ``captions.jsonl`` or ``captions.csv`` in ``folder``, if there.

    Raises:
        ValueError: for no captions at all, captions of videos that are not there, two captions for the same, or
            a table that cannot be understood; it names file and line.
    """
    known = set(videos)
    found: dict[str, list[Caption]] = {}
    if table is None:
        table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is not None:
        rows = list(_rows(table))
        _refuse_missing(table, [video for _, video, _ in rows if video not in known])
        for where, video, caption in rows:
            if any((other.start, other.end) == (caption.start, caption.end) for other in found.get(video, ())):
                raise ValueError(f"{where}: {video} has a caption already; give one per video, or start and end")
            found.setdefault(video, []).append(caption)
    for video in sorted(known):
        beside = (folder / video).with_suffix(".txt")
        if beside.is_file() and (text := " ".join(beside.read_text(encoding="utf-8").split())):
            if video in found:
                raise ValueError(f"{video} has a caption in {table} and another in {beside.name}: keep one")
            found[video] = [Caption(text=text)]
    if not found:
        raise ValueError(
            f"there are no captions for the videos in {folder}: write a .txt file beside each video, or "
            f"{TABLES[0]} with lines like "
            '{"video": "walk.mp4", "caption": "A woman walks through a park."}'
        )
    return Captions(found)


def _rows(table: Path) -> Iterator[tuple[str, str, Caption]]:
    """(place, video, caption) of every line."""
    if not table.is_file():
        raise ValueError(f"there is no file {table} with captions")
    for where, row in _jsonl(table) if table.suffix == ".jsonl" else _csv(table):
        unknown = {str(key) for key in row} - _COLUMNS
        if unknown or not {"video", "caption"} <= row.keys():
            raise ValueError(f"{where}: a line has video, caption and perhaps start, end; this has {', '.join(row)}")
        video, text = row["video"], row["caption"]
        if not isinstance(video, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: video and caption must be texts, and neither may be empty")
        yield where, Path(video).as_posix(), Caption(text=" ".join(text.split()), **_times(where, row))


def _jsonl(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}, line {number}: is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {number}: must be an object with video and caption")
        yield f"{table}, line {number}", row


def _csv(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if table.suffix != ".csv":
        raise ValueError(f"{table}: captions come as .jsonl or .csv")
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="(too many columns)")
        for row in reader:
            yield f"{table}, line {reader.line_num}", {key: value for key, value in row.items() if value is not None}


def _times(where: str, row: Mapping[str, Any]) -> dict[str, float]:
    try:
        times = {name: float(row[name]) for name in ("start", "end") if row.get(name) not in (None, "")}
    except (TypeError, ValueError):
        raise ValueError(f"{where}: start and end are seconds") from None
    if not 0 <= times.get("start", 0.0) < times.get("end", float("inf")):
        raise ValueError(f"{where}: start must be at least 0 and before end")
    return times


def _refuse_missing(table: Path, missing: list[str]) -> None:
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{table} has captions for {len(missing)} videos that are not there: {some}. Paths are those below "
            "the folder of videos; delete these lines or add the videos"
        )
