"""A folder of videos: which of its files are read, and why the others are not; loads no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v", ".ts", ".mts", ".m2ts"),
    *(".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".dv"),
}
TEXT_SUFFIX = ".txt"
_CONVERT = {
    ".gif": "GIF has at most 256 colours; convert it to .mp4 to train on it",
    ".webp": "animated WebP is not read; convert it to .mp4 to train on it",
}


@dataclass(frozen=True, kw_only=True)
class VideoFolder:
    """What lies in a folder and below. Paths are those below the folder, with ``/``, and sorted.

    Args:
        path: of the folder.
        videos: files with the suffix of a video.
        texts: files with the suffix ``.txt``.
        ignored: everything else -> why it is not read; a reason begins with words to count by and a colon.
    """

    path: Path
    videos: list[str]
    texts: list[str]
    ignored: dict[str, str]


def scan_videos(folder: Path, *, without: Sequence[Path] = ()) -> VideoFolder:
    """Look through a folder and all below it. Links are followed, and every folder is read once.

    Args:
        folder: of the videos.
        without: folders that are left out and not told of, such as an output that lies inside.

    Raises:
        ValueError: if there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: videos= names the folder that holds the clips")
    aside = {_identity(path) for path in without if path.is_dir()} - {_identity(folder)}
    above = {_identity(path) for path in folder.resolve().parents}
    read = set[tuple[int, int]]()
    videos, texts, ignored = list[str](), list[str](), dict[str, str]()
    folders, links = [folder], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop()  # what lies inside is named by where it lies
        try:
            identity, entries = _identity(here), sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            ignored[_below(folder, here)] = f"unreadable folder: {error.strerror}"
            continue
        if identity in read or identity in above:
            what = "is read already" if identity in read else "holds the folder of the videos"
            ignored[_below(folder, here)] = f"linked folder: what it leads to {what}"
            continue
        if identity in aside:
            continue
        read.add(identity)
        for entry in entries:
            path = Path(entry.path)
            if (reason := _refusal(entry)) is not None:
                ignored[_below(folder, path)] = reason
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            else:
                (texts if path.suffix.lower() == TEXT_SUFFIX else videos).append(_below(folder, path))
        links.sort(reverse=True)
    if not videos:
        raise ValueError(_no_video(folder, ignored))
    return VideoFolder(path=folder, videos=sorted(videos), texts=sorted(texts), ignored=ignored)


def find_videos(folder: Path) -> list[str]:
    """All videos in ``folder`` and below; see :func:`scan_videos`."""
    return scan_videos(folder).videos


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _refusal(entry: os.DirEntry[str]) -> str | None:
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
    if suffix in VIDEO_SUFFIXES or suffix == TEXT_SUFFIX:
        return None if os.access(entry.path, os.R_OK) else "unreadable: permission denied"
    return f"not a video: {_CONVERT.get(suffix, 'its suffix is not that of a video')}"


def _no_video(folder: Path, ignored: dict[str, str]) -> str:
    kinds = Counter(reason.partition(":")[0] for reason in ignored.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"there is no video in {folder}; known are: {', '.join(sorted(VIDEO_SUFFIXES))}" + (
        f". Not read: {told}; {min(ignored)} the first of them" if ignored else ""
    )
