"""A film as the studio shows it: HTML that refers to files of the film's folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from storymem.film.folder import Film
from storymem.film.manifest import MANIFEST
from storymem.film.memory_edits import command_of
from storymem.film.resume import story_record
from storymem.film.storyboard import TEMPLATES, cards, thumbnails
from storymem.film.tables import reason, summary
from storymem.memory.bank import read_entries
from storymem.studio.actions import Studio
from storymem.studio.work import Job


class View:
    """What a studio shows, as it is on disk now.

    Attributes:
        version: of the film, before it was read.
        story: whose film it is.
        film: with this story, whose shots have the takes that they would keep.
        entries: the memory, oldest first; None if there is none.
    """

    def __init__(self, studio: Studio) -> None:
        self.version = version(studio)
        self.studio, self.story = studio, studio.story
        record = story_record(self.story)
        self.film = studio.film or Film(studio.folder, story=record, config={})
        self.film.use_story(record)
        self.entries = read_entries(studio.folder)


def version(studio: Studio) -> str:
    """Another text once the film has changed."""
    manifest = studio.folder / MANIFEST
    return f"{manifest} {manifest.stat().st_mtime_ns if manifest.is_file() else 0}"


_parts: Any = TEMPLATES.get_template("studio/parts.html.j2").module


def _url(folder: Path, name: str) -> str:
    """Where the page finds a file of the film; another URL once the file has changed."""
    path = folder.resolve() / name
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return f"/gradio_api/file={quote(str(path))}?{changed}"


def board_html(view: View, picked: int) -> str:
    """The storyboard, on which the shot ``picked`` (from 1) is chosen."""
    where = f"{view.studio.story_file}, in {view.studio.folder}"
    shown = cards(view.film, view.entries)
    return _html("board", view, view.story.title, where, view.film.joined, shown, picked)


def pair_html(view: View, shot: int, numbers: Sequence[int]) -> str:
    """Takes of a shot, side by side."""
    takes = {take.take: take for take in view.film.takes_of(shot - 1)}
    chosen = view.film.take_of(shot - 1)
    shown = [takes[number] for number in dict.fromkeys(numbers) if number in takes]
    return _html("pair", view, shown, chosen and chosen.take)


def memory_html(view: View) -> str:
    """The memory."""
    return _html("keyframes", view, "Keyframes of the film, oldest first", thumbnails(view.film, view.entries or ()))


def fates_html(view: View, shot: int) -> str:
    """Why frames of a shot (from 1) became keyframes or not."""
    take = view.film.take_of(shot - 1)
    rows = [] if take is None else [(one, reason(one)) for one in take.candidates or ()]
    line = None if take is None else summary(take)
    return _html("fates", view, shot, take, line, rows, command_of(view.studio.folder, f"shot={shot}"))


def status_html(job: Job | None, waiting: int) -> str:
    """What is being made."""
    image = None if job is None or job.progress.preview is None else base64.b64encode(job.progress.preview).decode()
    return str(_parts.status(job, waiting, image))


def _html(part: str, view: View, *values: Any) -> str:
    def url(name: str) -> Markup:
        return Markup(_url(view.studio.folder, name))

    return str(getattr(_parts, part)(*values, url))
