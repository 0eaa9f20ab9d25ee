"""A folder of videos: which files are read, their captions and their masks. Loads no torch.

Paths are those below the folder, with ``/``. Names are compared exactly; where nothing is equal, the only name that is
equal but for the spelling of accents and spaces (Unicode normalisation) is meant.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from storymem.io import FileError, check_regular, folded, parse_json, read_text, text_lines

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v", ".ts", ".mts", ".m2ts"),
    *(".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".dv"),
}
TABLES = ("captions.jsonl", "captions.csv")
_COLUMNS = {"video", "caption", "start", "end"}
_TABLE_BYTES = 4 << 30
_FIELD_CHARACTERS = 1 << 30  # csv's own limit is 128 kB
_CONVERT = {
    ".gif": "GIF has at most 256 colours; convert it to .mp4 to train on it",
    ".webp": "animated WebP is not read; convert it to .mp4 to train on it",
}


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VideoFolder:
    """What a folder and all folders in it contain, sorted."""

    path: Path
    videos: list[str]
    texts: list[str]  # files with the suffix .txt
    ignored: dict[str, str]  # everything else -> why it is not read: words to count by, a colon, the rest


def scan_videos(folder: Path, *, without: Sequence[Path] = ()) -> VideoFolder:
    """List a folder and all folders in it. Links are followed, and every folder is read once.

    Args:
        folder: of the videos.
        without: folders that are left out without a report, such as an output that lies inside.

    Raises:
        ValueError: if there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: videos= names the folder that holds the clips")
    skipped = {_identity(path) for path in without if path.is_dir()} - {_identity(folder)}
    parents = {_identity(path) for path in folder.resolve().parents}
    read = set[tuple[int, int]]()
    files, ignored = list[str](), dict[str, str]()
    folders, links = [folder], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop()  # a folder that is inside keeps the name it has there
        try:
            identity, entries = _identity(here), sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            ignored[_below(folder, here)] = f"unreadable folder: {error.strerror}"
            continue
        if identity in read or identity in parents:
            what = "is read already" if identity in read else "holds the folder of the videos"
            ignored[_below(folder, here)] = f"linked folder: its target {what}"
            continue
        if identity in skipped:
            continue
        read.add(identity)
        for entry in entries:
            path = Path(entry.path)
            if (reason := _why_ignored(entry)) is not None:
                ignored[_below(folder, path)] = reason
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            else:
                files.append(_below(folder, path))
        links.sort(reverse=True)
    texts = sorted(name for name in files if name.lower().endswith(".txt"))
    videos = sorted(set(files).difference(texts))
    if not videos:
        kinds = Counter(reason.partition(":")[0] for reason in ignored.values())
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise ValueError(
            f"there is no video in {folder}; known suffixes are: {', '.join(sorted(VIDEO_SUFFIXES))}"
            + (f". Not read: {counts}; the first is {min(ignored)}" if ignored else "")
        )
    return VideoFolder(path=folder, videos=videos, texts=texts, ignored=ignored)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _why_ignored(entry: os.DirEntry[str]) -> str | None:
    """Why a file or folder is not read; None if it is."""
    if entry.name.startswith("."):
        return "hidden: its name begins with a dot"
    try:
        entry.name.encode()
        is_file, is_folder = entry.is_file(), entry.is_dir()
    except UnicodeEncodeError:
        return "name: it is not UTF-8; rename it"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if is_folder:
        return None
    if not is_file:
        dead = entry.is_symlink() and not os.path.exists(entry.path)
        return f"dead link: to {os.readlink(entry.path)}" if dead else "not a file: a FIFO or device"
    suffix = Path(entry.name).suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix == ".txt":
        return None if os.access(entry.path, os.R_OK) else "unreadable: permission denied"
    return f"not a video: {_CONVERT.get(suffix, 'its suffix is not that of a video')}"


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text for a video, or for the part of it from ``start`` to ``end`` in seconds."""

    text: str
    start: float = 0.0
    end: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of a folder of videos."""

    by_video: dict[str, list[Caption]] = field(default_factory=lambda: defaultdict(list))
    table: Path | None = None  # from which they were read, if there is one
    unused: list[str] = field(default_factory=list)  # .txt files that belong to no video
    respelled: dict[str, str] = field(default_factory=dict)  # names in captions -> videos with another spelling

    def of(self, video: str, start: float, end: float) -> Caption | None:
        """The caption of a part of a video (seconds): the one that covers most of it, the shortest of several.

        A caption without times is for all shots of its video. None if nothing covers the part.
        """
        best, most = None, 0.0
        for caption in sorted(self.by_video.get(video, ()), key=lambda caption: caption.end - caption.start):
            covered = min(end, caption.end) - max(start, caption.start)
            if covered > most + 1e-6:
                best, most = caption, covered
        return best


def read_captions(found: VideoFolder, table: Path | None) -> Captions:
    """Collect the captions of all videos of a folder.

    Args:
        found: the folder. A ``.txt`` file with a video's path and name is its caption.
        table: a ``.jsonl`` or ``.csv`` file with the columns ``video``, ``caption`` and, where wanted, ``start`` and
            ``end`` in seconds; None: ``captions.jsonl`` or ``captions.csv`` in the folder, if there.

    Raises:
        ValueError: for no captions at all, captions of videos that are not there, two captions for the same part, or
            a file that cannot be understood; it names file and line.
    """
    if table is None:
        existing = [found.path / name for name in TABLES if (found.path / name).exists()]
        if len(existing) > 1:
            raise ValueError(f"there are {existing[0]} and {existing[1].name}: choose one with captions=")
        table = existing[0] if existing else None
    captions = Captions(table=table)
    if table is not None:
        _read_table(table, found.videos, captions)
    _read_texts(found, captions)
    if not captions.by_video:
        raise ValueError(
            f"there are no captions for the videos in {found.path}: write a .txt file beside each video, or "
            f'{TABLES[0]} with lines like {{"video": "walk.mp4", "caption": "A woman walks through a park."}}'
        )
    return captions


def _read_table(table: Path, videos: list[str], captions: Captions) -> None:
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
        if any((other.start, other.end) == (caption.start, caption.end) for other in captions.by_video[video]):
            raise ValueError(f"{where}: {video} has a caption already; give one per video, or start and end")
        captions.by_video[video].append(caption)
        if name != video:
            captions.respelled[name] = video


def _read_texts(found: VideoFolder, captions: Captions) -> None:
    videos_of = _by_stem(found.videos)
    meant = _matched([_stem(text) for text in found.texts], videos_of)
    source: dict[str, str] = {}
    for text in found.texts:
        stem = meant.get(_stem(text))
        if stem is None:
            captions.unused.append(text)
        if stem is None or not (caption := " ".join(read_text(found.path / text).split())):
            continue
        video, *others = videos_of[stem]
        if others:
            raise ValueError(
                f"{found.path / text} lies beside {video} and {', '.join(others)}: rename one of the videos, or write "
                f"{TABLES[0]} with a line for each of them and delete {PurePosixPath(text).name}"
            )
        if captions.by_video.get(video):
            first = source.get(video, captions.table)
            raise ValueError(f"{video} has a caption in {first} and another in {text}: keep one")
        captions.by_video[video], source[video] = [Caption(text=caption)], text
        if stem != _stem(text):
            captions.respelled[text] = video


def _matched(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Name -> the known name it is for: the same, else the only one that is equal after folding."""
    wanted, there = set(names), set(known)
    meant = {name: name for name in wanted & there}
    by_fold = defaultdict[str, list[str]](list)
    for name in there - wanted:
        by_fold[_fold(name)].append(name)
    for name in wanted - there:
        if len(candidates := by_fold.get(_fold(name), [])) == 1:
            meant[name] = candidates[0]
    return meant


def _fold(path: str) -> str:
    return "/".join(folded(part) for part in path.replace("\\", "/").split("/"))


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _by_stem(videos: Iterable[str]) -> dict[str, list[str]]:
    found = defaultdict[str, list[str]](list)
    for video in videos:
        found[_stem(video)].append(video)
    return found


def _rows(table: Path) -> Iterator[tuple[str, str, Caption]]:
    """(place for messages, video, caption) of every line."""
    check_regular(table)
    kind = table.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise ValueError(f"{table}: captions must be a .jsonl or .csv file")
    text = read_text(table, limit=_TABLE_BYTES)
    for where, row in _json_rows(table, text) if kind == ".jsonl" else _csv_rows(table, text):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object with video and caption")
        if not {"video", "caption"} <= row.keys() <= _COLUMNS:
            raise ValueError(f"{where}: a line has video, caption and optionally start, end; this has {', '.join(row)}")
        video, caption = row["video"], row["caption"]
        if not isinstance(video, str) or not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: video and caption must be texts, and neither may be empty")
        try:
            (video + caption).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: holds half of a character (\\ud800 to \\udfff alone); write it whole") from None
        yield where, Path(video).as_posix(), Caption(text=" ".join(caption.split()), **_times(where, row))


def _json_rows(table: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_lines(text), start=1):
        if line.strip():
            yield (where := f"{table}, line {number}"), parse_json(line, where)


def _csv_rows(table: Path, text: str) -> Iterator[tuple[str, Any]]:
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


# --- masks ------------------------------------------------------------------------------------------------------------


def find_masks(folder: Path, videos: VideoFolder) -> dict[str, Path]:
    """Video -> its mask: the file in ``folder`` with the same path and name, with any suffix.

    Raises:
        ValueError: if there are none, or one belongs to no video or to several.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: masks= names a folder that holds masks as videos= holds videos")
    known, by_stem = set(videos.videos), _by_stem(videos.videos)
    files: dict[str, Path] = {}
    unknown = []
    for mask in scan_videos(folder).videos:
        owners = [mask] if mask in known else by_stem.get(_stem(mask), [])
        if not owners:
            unknown.append(mask)
        elif len(owners) > 1:
            raise ValueError(f"{folder / mask} belongs to {owners[0]} and {owners[1]}: give it the suffix of its video")
        elif owners[0] in files:
            raise ValueError(f"{folder / mask} and {files[owners[0]].name} belong to {owners[0]}: remove one of them")
        else:
            files[owners[0]] = folder / mask
    if unknown:
        raise ValueError(
            f"{folder} holds {len(unknown)} masks that belong to no video in {videos.path}, the first is {unknown[0]}: "
            "a mask has the path and name of its video"
        )
    return files
