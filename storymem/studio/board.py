"""A film as the studio shows it: plain records, and HTML that refers to files of the film's folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from storymem.film.folder import Film
from storymem.film.manifest import KeyframeRecord, Take, scripts
from storymem.film.matching import stale
from storymem.film.reasons import reason, summary
from storymem.film.resume import story_record
from storymem.memory.bank import Entry, keyframe_files, read_entries
from storymem.studio.actions import Studio
from storymem.studio.work import Job


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A keyframe: its id and image, what is seen, why it is in the memory, and its number there, from 1."""

    id: str
    image: str
    alt: str
    notes: tuple[str, ...] = ()
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A shot of the story as it is now, with its takes in the film."""

    number: int
    scene: int
    begins_scene: bool
    continues: bool
    prompt: str
    take: Take | None
    takes: Sequence[Take]
    stale: str | None
    recalled: Sequence[Picture]
    added: Sequence[Picture]
    picked: bool

    @property
    def alt(self) -> str:
        """What is seen."""
        assert self.take is not None
        return f"Shot {self.number}, take {self.take.take}: {self.take.prompt}"


def film_now(studio: Studio) -> Film | None:
    """The film with the story as it is on disk now, whose shots have the takes that they would keep."""
    film = studio.film
    if film is not None:
        film.use_story(story_record(studio.story))
    return film


def cards(studio: Studio, picked: int) -> list[Card]:
    """All shots of the story."""
    film, story = film_now(studio), studio.story
    entries = {entry.id: entry for entry in read_entries(film.folder)} if film is not None and film.has_memory else {}
    old = {} if film is None or not entries else stale(film, list(entries.values()))
    prompts = {} if film is None else dict(enumerate((s.content["prompt"] for s in scripts(film.story)), start=1))
    found = []
    for shot in story.shots:
        take = None if film is None else film.take_of(shot.index)
        found.append(
            Card(
                number=shot.index + 1,
                scene=shot.scene,
                begins_scene=shot.number == 1,
                continues=not shot.cut,
                prompt=shot.prompt,
                take=take,
                takes=[] if film is None else film.takes_of(shot.index),
                stale=old.get(shot.index + 1),
                recalled=[_recalled(id, entries.get(id), prompts) for id in take.memory] if take else [],
                added=[_added(record, take) for record in take.keyframes] if take else [],
                picked=shot.index + 1 == picked,
            )
        )
    return found


def memory(studio: Studio) -> list[Picture]:
    """The keyframes of the memory, oldest first."""
    film = film_now(studio)
    if film is None or not film.has_memory:
        return []
    prompts = dict(enumerate((script.content["prompt"] for script in scripts(film.story)), start=1))
    users = {id: [str(take.shot) for take in film.shots if id in take.memory] for id in _ids(film)}
    found = []
    for number, entry in enumerate(read_entries(film.folder), start=1):
        shots = users.get(entry.id, [])
        notes = [f"recalled for shot{'s' * (len(shots) > 1)} {', '.join(shots)}" if shots else "not recalled yet"]
        picture = _recalled(entry.id, entry, prompts)
        found.append(
            Picture(
                id=entry.id,
                image=entry.image,
                alt=picture.alt,
                notes=(*_scores(entry.quality, entry.similarity), *notes, *(["pinned"] * entry.pinned)),
                number=number,
            )
        )
    return found


def _ids(film: Film) -> set[str]:
    return {id for take in film.shots for id in take.memory}


def _recalled(id: str, entry: Entry | None, prompts: dict[int, str]) -> Picture:
    image = keyframe_files(id)[0] if entry is None else entry.image
    if entry is None:
        return Picture(id=id, image=image, alt=f"Keyframe {id}, no longer in the memory")
    of = f"frame {entry.frame} of shot {entry.shot}" if entry.frame else f"reference image {entry.source or entry.id}"
    text = prompts.get(entry.shot or 0, "") if entry.frame else entry.character or ""
    return Picture(id=id, image=image, alt=f"{of}: {text}" if text else of)


def _added(record: KeyframeRecord, take: Take) -> Picture:
    return Picture(
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


def board_html(studio: Studio, picked: int) -> str:
    """The storyboard."""
    film = studio.film
    video = None if film is None or film.video is None else film.video.name
    where = f"{studio.story_file}, in {studio.folder}"
    shots = cards(studio, picked)
    return _html("board", studio, video, shots, studio.story.title, where)


def pair_html(studio: Studio, shot: int, numbers: Sequence[int]) -> str:
    """Takes of a shot, side by side."""
    film = film_now(studio)
    takes = [] if film is None else [t for n in dict.fromkeys(numbers) for t in film.takes_of(shot - 1) if t.take == n]
    return _html("pair", studio, takes, None if film is None else film.slots[shot - 1].take)


def memory_html(studio: Studio) -> str:
    """The memory."""
    return _html("memory", studio, memory(studio))


def fates_html(studio: Studio, shot: int) -> str:
    """Why frames of a shot (from 1) became keyframes or not."""
    film = film_now(studio)
    take = None if film is None else film.take_of(shot - 1)
    rows = [] if take is None else [(one, reason(one)) for one in take.candidates or ()]
    line = None if take is None else summary(take)
    return _html("fates", studio, shot, take, line, rows, studio.memory_command(f"shot={shot}"))


def status_html(job: Job | None, waiting: int) -> str:
    """What is being made."""
    image = None if job is None or job.progress.preview is None else base64.b64encode(job.progress.preview).decode()
    return str(_parts().status(job, waiting, image))


def _html(part: str, studio: Studio, *values: Any) -> str:
    def url(name: str) -> Markup:
        return Markup(_url(studio.folder, name))

    return str(getattr(_parts(), part)(*values, url))
