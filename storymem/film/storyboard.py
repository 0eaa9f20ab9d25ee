"""A film as a page: every shot with its text, the keyframes that it recalled and added, and the memory as it is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from storymem.film.manifest import REPLACED, VIDEO, Manifest, Script, Take, scripts
from storymem.film.matching import stale
from storymem.film.tables import origin, recalled_by, summary
from storymem.memory.bank import Entry, KeyframeRecord, keyframe_files, read_entries

#: Templates of the page and of the studio.
TEMPLATES = Environment(
    loader=PackageLoader("storymem", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_MODES = {
    "t2v": "text to video",
    "i2v": "image to video, from an image made for the shot",
    "m2v": "memory to video",
    "mi2v": "memory to video, from the last frame of the previous shot",
    "mm2v": "memory to video, from the last five frames of the previous shot",
}


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
    """A shot (from 1) as the story has it, with the take that the film shows of it, one of ``takes``."""

    number: int
    script: Script
    take: Take | None
    takes: int
    stale: str | None
    recalled: Sequence[Thumbnail]
    added: Sequence[Thumbnail]

    @property
    def about(self) -> str:
        """How the take was made."""
        if (take := self.take) is None:
            return ""
        number = f"take {take.take}" + (f" ({self.takes} takes)" if self.takes > 1 else "")
        seconds = f"{sum(take.seconds.values()):.1f} s"
        video = [f"video {REPLACED}"] if take.is_replaced else []
        return " · ".join([number, _MODES[take.mode], f"{take.frames} frames", f"seed {take.seed}", seconds, *video])

    @property
    def summary(self) -> str | None:
        """What became of the frames of the take."""
        return None if self.take is None else summary(self.take)


def storyboard(film: Manifest, folder: Path) -> str:
    """The page ``storyboard.html`` of the film in ``folder``; it opens from disk and refers to files of the folder."""
    entries = read_entries(folder)
    return TEMPLATES.get_template("film/storyboard.html.j2").render(
        story=film.story,
        cards=cards(film, entries),
        memory=thumbnails(film, entries or ()),
        video=VIDEO if film.shots else None,
        url=quote,
    )


def cards(film: Manifest, entries: Sequence[Entry] | None) -> list[Card]:
    """All shots; ``entries`` are the memory, None if there is none."""
    known = {entry.id: entry for entry in entries or ()}
    old = stale(film, entries)
    prompts = _prompts(film)
    found = []
    for number, script in enumerate(scripts(film.story), start=1):
        take = film.take_of(number - 1)
        card = Card(
            number=number,
            script=script,
            take=take,
            takes=len(film.takes_of(number - 1)),
            stale=old.get(number),
            recalled=[_thumbnail(prompts, known.get(id), id) for id in take.memory] if take else [],
            added=[_added(record, take) for record in take.keyframes] if take else [],
        )
        found.append(card)
    return found


def thumbnails(film: Manifest, entries: Sequence[Entry]) -> list[Thumbnail]:
    """The keyframes of the memory, oldest first."""
    found, prompts = [], _prompts(film)
    for number, entry in enumerate(entries, start=1):
        shots = recalled_by(film, entry.id)
        numbers = ", ".join(map(str, shots))
        recalled = f"recalled for shot{'s' * (len(shots) > 1)} {numbers}" if shots else "not recalled yet"
        notes = (origin(entry), *_scores(vars(entry)), recalled, *["pinned"] * entry.pinned)
        found.append(_thumbnail(prompts, entry, entry.id, notes=notes, number=number))
    return found


def _thumbnail(
    prompts: Sequence[str], entry: Entry | None, id: str, *, notes: tuple[str, ...] = (), number: int | None = None
) -> Thumbnail:
    """A keyframe of the memory; ``entry`` is None for one that is no longer there."""
    if entry is None:
        return Thumbnail(id=id, image=keyframe_files(id)[0], alt=f"Keyframe {id}, no longer in the memory")
    if entry.frame and entry.shot and entry.shot <= len(prompts):
        alt = f"frame {entry.frame} of shot {entry.shot}: {prompts[entry.shot - 1]}"
    else:
        alt = f"reference image {entry.source or entry.id}" + (f": {entry.character}" if entry.character else "")
    return Thumbnail(id=id, image=entry.image, alt=alt, notes=notes, number=number)


def _prompts(film: Manifest) -> list[str]:
    return [script.content["prompt"] for script in scripts(film.story)]


def _added(record: KeyframeRecord, take: Take) -> Thumbnail:
    alt = f"frame {record.frame} of shot {take.shot}: {take.prompt}"
    return Thumbnail(id=record.id, image=keyframe_files(record.id)[0], alt=alt, notes=_scores(vars(record)))


def _scores(values: Mapping[str, float | None]) -> tuple[str, ...]:
    return tuple(f"{name} {value:.2f}" for name in ("quality", "similarity") if (value := values[name]) is not None)
