"""A film as the studio shows it: plain records, and HTML that refers to files of the film's folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from storymem.film.manifest import MANIFEST, KeyframeRecord, Take
from storymem.film.matching import stale
from storymem.film.memory_edits import command_of
from storymem.film.reasons import reason, summary
from storymem.film.resume import story_record
from storymem.film.tables import recalled_by
from storymem.memory.bank import Entry, keyframe_files, read_entries
from storymem.story import Shot
from storymem.studio.actions import Studio
from storymem.studio.work import Job


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A keyframe: its id and image, what is seen, why it is in the memory, and its number there, from 1."""

    id: str
    image: str
    alt: str
    notes: tuple[str, ...] = ()
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A shot of the story as it is now, with its takes in the film."""

    shot: Shot
    take: Take | None
    takes: Sequence[Take]
    stale: str | None
    recalled: Sequence[Thumbnail]
    added: Sequence[Thumbnail]


class View:
    """What a studio shows, as it is on disk now.

    Attributes:
        version: of the film, before it was read.
        story: whose film it is.
        film: with this story, whose shots have the takes that they would keep; None before the first take.
        entries: the memory, oldest first.
    """

    def __init__(self, studio: Studio) -> None:
        self.version = version(studio)
        self.studio, self.story, self.film = studio, studio.story, studio.film
        self.entries: Sequence[Entry] = ()
        if self.film is not None:
            self.film.use_story(story_record(self.story))
            self.entries = read_entries(self.film.folder) if self.film.has_memory else ()

    def takes_of(self, shot: int) -> list[Take]:
        """All takes of ``shot`` (from 1)."""
        return [] if self.film is None else self.film.takes_of(shot - 1)

    def take_of(self, shot: int) -> Take | None:
        """The take that the film shows of ``shot``."""
        return None if self.film is None else self.film.take_of(shot - 1)

    def cards(self) -> list[Card]:
        """All shots of the story."""
        entries = {entry.id: entry for entry in self.entries}
        old = {} if self.film is None or not entries else stale(self.film, self.entries)
        found = []
        for number, shot in enumerate(self.story.shots, start=1):
            take = self.take_of(number)
            found.append(
                Card(
                    shot=shot,
                    take=take,
                    takes=self.takes_of(number),
                    stale=old.get(number),
                    recalled=[self._recalled(id, entries.get(id)) for id in take.memory] if take else [],
                    added=[_added(record, take) for record in take.keyframes] if take else [],
                )
            )
        return found

    def memory(self) -> list[Thumbnail]:
        """The keyframes of the memory, oldest first."""
        found = []
        for number, entry in enumerate(self.entries, start=1):
            shots = recalled_by(self.film, entry.id) if self.film else []
            numbers = ", ".join(map(str, shots))
            recalled = f"recalled for shot{'s' * (len(shots) > 1)} {numbers}" if shots else "not recalled yet"
            notes = (*_scores(entry.quality, entry.similarity), recalled, *(["pinned"] * entry.pinned))
            found.append(replace(self._recalled(entry.id, entry), notes=notes, number=number))
        return found

    def _recalled(self, id: str, entry: Entry | None) -> Thumbnail:
        if entry is None:
            return Thumbnail(id=id, image=keyframe_files(id)[0], alt=f"Keyframe {id}, no longer in the memory")
        if entry.frame:
            of = f"frame {entry.frame} of shot {entry.shot}"
            text = next((shot.prompt for shot in self.story.shots if shot.index + 1 == entry.shot), None)
        else:
            of, text = f"reference image {entry.source or entry.id}", entry.character
        return Thumbnail(id=id, image=entry.image, alt=f"{of}: {text}" if text else of)


def version(studio: Studio) -> str:
    """Another text once the film has changed."""
    manifest = studio.folder / MANIFEST
    return f"{manifest} {manifest.stat().st_mtime_ns if manifest.is_file() else 0}"


def _added(record: KeyframeRecord, take: Take) -> Thumbnail:
    return Thumbnail(
        id=record.id,
        image=keyframe_files(record.id)[0],
        alt=f"frame {record.frame} of shot {take.shot}: {take.prompt}",
        notes=_scores(record.quality, record.similarity),
    )


def _scores(quality: float | None, similarity: float | None) -> tuple[str, ...]:
    found = {"quality": quality, "similarity": similarity}
    return tuple(f"{name} {value:.2f}" for name, value in found.items() if value is not None)


# --- HTML


@cache
def _parts() -> Any:
    templates = Environment(
        loader=PackageLoader("storymem.studio", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("parts.html.j2").module


def _url(folder: Path, name: str) -> str:
    """Where the page finds a file of the film; another URL once the file has changed."""
    path = folder.resolve() / name
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return f"/gradio_api/file={quote(str(path))}?{changed}"


def board_html(view: View, picked: int) -> str:
    """The storyboard, on which the shot ``picked`` (from 1) is chosen."""
    video = None if view.film is None or view.film.video is None else view.film.video.name
    where = f"{view.studio.story_file}, in {view.studio.folder}"
    return _html("board", view, video, view.cards(), picked, view.story.title, where)


def pair_html(view: View, shot: int, numbers: Sequence[int]) -> str:
    """Takes of a shot, side by side."""
    takes = {take.take: take for take in view.takes_of(shot)}
    chosen = view.take_of(shot)
    shown = [takes[number] for number in dict.fromkeys(numbers) if number in takes]
    return _html("pair", view, shown, chosen and chosen.take)


def memory_html(view: View) -> str:
    """The memory."""
    return _html("keyframes", view, "Keyframes of the film, oldest first", view.memory())


def fates_html(view: View, shot: int) -> str:
    """Why frames of a shot (from 1) became keyframes or not."""
    take = view.take_of(shot)
    rows = [] if take is None else [(one, reason(one)) for one in take.candidates or ()]
    line = None if take is None else summary(take)
    return _html("fates", view, shot, take, line, rows, command_of(view.studio.folder, f"shot={shot}"))


def status_html(job: Job | None, waiting: int) -> str:
    """What is being made."""
    image = None if job is None or job.progress.preview is None else base64.b64encode(job.progress.preview).decode()
    return str(_parts().status(job, waiting, image))


def _html(part: str, view: View, *values: Any) -> str:
    def url(name: str) -> Markup:
        return Markup(_url(view.studio.folder, name))

    return str(getattr(_parts(), part)(*values, url))
