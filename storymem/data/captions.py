"""Captions of videos: text files beside them, or one table for a whole folder; loads no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from storymem.io import FileError, check_regular, folded, parse_json, read_text, text_lines

TABLES = ("captions.jsonl", "captions.csv")
_COLUMNS = {"video", "caption", "start", "end"}
_TABLE_BYTES = 4 << 30
_FIELD_CHARACTERS = 1 << 30  # csv's own limit is 128 kB


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text for a video, or for the part of it from ``start`` to ``end`` in seconds."""

    text: str
    start: float = 0.0
    end: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of a folder of videos.

    Args:
        by_video: video, as a path below the folder with ``/`` -> its captions.
        table: from which they were read, if there is one.
        unused: ``.txt`` files that belong to no video.
        respelled: names in captions -> the videos they are taken for: equal but for the spelling of accents and spaces.
    """

    by_video: Mapping[str, list[Caption]]
    table: Path | None = None
    unused: list[str] = field(default_factory=list)
    respelled: dict[str, str] = field(default_factory=dict)

    def of(self, video: str, start: float, end: float) -> Caption | None:
        """The caption of a part of a video (seconds): the one that covers most of it, the narrowest of several.

        A caption without times is for all shots of its video. None if nothing covers the part.
        """
        best, covered_most = None, 0.0
        for caption in sorted(self.by_video.get(video, ()), key=lambda caption: caption.end - caption.start):
            covered = min(end, caption.end) - max(start, caption.start)
            if covered > covered_most + 1e-6:
                best, covered_most = caption, covered
        return best


def read_captions(folder: Path, videos: Iterable[str], texts: Iterable[str], table: Path | None) -> Captions:
    """Collect the captions of ``videos``.

    A name is compared exactly; where nothing is equal, the one video that is equal but for the spelling of accents
    and spaces (Unicode normalisation) is meant.

    Args:
        folder: holds the videos.
        videos: paths below ``folder``.
        texts: ``.txt`` files below ``folder``; one of a video's name is its caption.
        table: a ``.jsonl`` or ``.csv`` file with the columns ``video``, ``caption`` and, where wanted, ``start`` and
            ``end`` in seconds; None: ``captions.jsonl`` or ``captions.csv`` in ``folder``, if there.

    Raises:
        ValueError: for no captions at all, captions of videos that are not there, two captions for the same, or
            a file that cannot be understood; it names file and line.
    """
    known = sorted(videos)
    found: dict[str, list[Caption]] = {}
    respelled: dict[str, str] = {}
    if table is None:
        there = [folder / name for name in TABLES if (folder / name).exists()]
        if len(there) > 1:
            raise ValueError(f"there are {there[0]} and {there[1].name}: say by captions= which one counts")
        table = there[0] if there else None
    if table is not None:
        _read_table(table, known, found, respelled)
    unused = _read_texts(folder, known, sorted(texts), found, respelled, table)
    if not found:
        raise ValueError(
            f"there are no captions for the videos in {folder}: write a .txt file beside each video, or "
            f"{TABLES[0]} with lines like "
            '{"video": "walk.mp4", "caption": "A woman walks through a park."}'
        )
    return Captions(by_video=found, table=table, unused=unused, respelled=respelled)


def _read_table(table: Path, videos: list[str], found: dict[str, list[Caption]], respelled: dict[str, str]) -> None:
    rows = list(_rows(table))
    if not rows:
        raise ValueError(f"{table} holds no captions: add some, or move it away")
    meant = _matched([name for _, name, _ in rows], videos)
    missing = [name for _, name, _ in rows if name not in meant]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{table} has captions for {len(missing)} videos that are not there: {some}. Paths are those below "
            "the folder of videos; delete these lines or add the videos"
        )
    for where, name, caption in rows:
        video = meant[name]
        if any((other.start, other.end) == (caption.start, caption.end) for other in found.get(video, ())):
            raise ValueError(f"{where}: {video} has a caption already; give one per video, or start and end")
        found.setdefault(video, []).append(caption)
        if name != video:
            respelled[name] = video


def _read_texts(
    folder: Path,
    videos: list[str],
    texts: list[str],
    found: dict[str, list[Caption]],
    respelled: dict[str, str],
    table: Path | None,
) -> list[str]:
    """Add the captions in ``texts`` to ``found``; returns those that belong to no video."""
    of: dict[str, list[str]] = {}
    for video in videos:
        of.setdefault(_stem(video), []).append(video)
    meant = _matched([_stem(text) for text in texts], of)
    source: dict[str, str] = {}
    for text in texts:
        stem = meant.get(_stem(text))
        if stem is None or not (caption := " ".join(read_text(folder / text).split())):
            continue
        video, *others = of[stem]
        if others:
            raise ValueError(
                f"{folder / text} lies beside {video} and {', '.join(others)}: rename one of the videos, or write "
                f"{TABLES[0]} with a line for each of them and delete {PurePosixPath(text).name}"
            )
        if video in found:
            raise ValueError(f"{video} has a caption in {source.get(video, table)} and another in {text}: keep one")
        found[video], source[video] = [Caption(text=caption)], text
        if stem != _stem(text):
            respelled[text] = video
    return [text for text in texts if _stem(text) not in meant]


def _matched(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Name -> the known name it is for: the same, else the only one that is equal after folding."""
    wanted, there = set(names), set(known)
    meant = {name: name for name in wanted & there}
    by_fold: dict[str, list[str]] = {}
    for name in sorted(there - wanted):
        by_fold.setdefault(_fold(name), []).append(name)
    for name in sorted(wanted - there):
        candidates = by_fold.get(_fold(name), [])
        if len(candidates) == 1:
            meant[name] = candidates[0]
    return meant


def _fold(path: str) -> str:
    return "/".join(folded(part) for part in path.replace("\\", "/").split("/"))


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _rows(table: Path) -> Iterator[tuple[str, str, Caption]]:
    """(place, video, caption) of every line."""
    check_regular(table)
    if table.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{table}: captions come as .jsonl or .csv")
    text = read_text(table, limit=_TABLE_BYTES)
    for where, row in _jsonl(table, text) if table.suffix.lower() == ".jsonl" else _csv(table, text):
        unknown = {str(key) for key in row} - _COLUMNS
        if unknown or not {"video", "caption"} <= row.keys():
            raise ValueError(f"{where}: a line has video, caption and perhaps start, end; this has {', '.join(row)}")
        video, caption = row["video"], row["caption"]
        if not isinstance(video, str) or not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: video and caption must be texts, and neither may be empty")
        try:
            (video + caption).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: holds half of a character (\\ud800 to \\udfff alone); write it whole") from None
        yield where, Path(video).as_posix(), Caption(text=" ".join(caption.split()), **_times(where, row))


def _jsonl(table: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text_lines(text), start=1):
        where = f"{table}, line {number}"
        if not line.strip():
            continue
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object with video and caption")
        yield where, row


def _csv(table: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_FIELD_CHARACTERS)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="(too many columns)", strict=True)
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError(f"{table}, line 1: a column is named twice: {', '.join(columns)}")
        for row in reader:
            yield f"{table}, line {reader.line_num}", {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:
        raise FileError(
            f"{table}, line {reader.line_num + 1}: is not CSV ({error}); a quote in a text is written twice"
        ) from None


def _times(where: str, row: Mapping[str, Any]) -> dict[str, float]:
    try:
        times = {name: float(row[name]) for name in ("start", "end") if row.get(name) not in (None, "")}
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: start and end are seconds") from None
    if not 0 <= times.get("start", 0.0) < times.get("end", float("inf")):
        raise ValueError(f"{where}: start must be at least 0 and before end")
    return times
