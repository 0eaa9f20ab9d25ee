"""What a run makes of a film: whether it is the same film, which takes are missing, what to type where it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from storymem.film.differences import SIDES, arguments_between, differences, flat, setting_changes
from storymem.film.folder import Film
from storymem.film.manifest import FilmError, OtherFilmError, Slot, scripts
from storymem.film.matching import matches
from storymem.film.settings import Work
from storymem.io import hash_json
from storymem.media.images import read_image
from storymem.story import Story

_MOST = 12  # lines of a list


class Reference(NamedTuple):
    """A reference image: its path in the story, the hash of its pixels, and the character or the shot that it is of."""

    source: str
    sha256: str | None
    character: str | None = None
    folder: str | None = None  # of the shot's takes


def story_record(story: Story) -> dict[str, Any]:
    """What the manifest holds of a story: all of it, and hashes of the pixels of its reference images."""
    paths = list(dict.fromkeys(story.all_references))
    digests = {
        source: hashlib.sha256(read_image(path).tobytes()).hexdigest()
        for path, source in zip(paths, story.written(paths), strict=True)
    }
    return story.to_dict() | {"reference_sha256": digests}


def references(story: Mapping[str, Any], slots: Sequence[Slot]) -> list[Reference]:
    """The references in a story's record, in the order of ``Story.all_references``; ``slots`` are its shots."""
    digests = story.get("reference_sha256", {})
    of_characters = [
        Reference(source, digests.get(source), character=character["name"])
        for character in story.get("characters", ())
        for source in character.get("references", ())
    ]
    shots = (shot for scene in story["scenes"] for shot in scene["shots"])
    return of_characters + [
        Reference(source, digests.get(source), folder=slot.folder)
        for slot, shot in zip(slots, shots, strict=True)
        for source in shot.get("references", ())
    ]


def encoders(config: Mapping[str, Any]) -> str:
    """Identifies the networks that embed and encode keyframes: a hash of all settings that may matter."""
    return hash_json({key: config.get(key) for key in ("model", "scorer", "weights", "runtime")})[:16]


def check_size(film: Film, config: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Raise FilmError if takes made with ``config`` do not fit those of ``film`` that stay."""
    made = {job.index for job in jobs}
    stays = any(take.index not in made for take in film.shots)
    if stays and film.before is not None and _resized(film.before.config, config):
        raise FilmError("size or rate of the shots have changed: use resume=from_shot:1 or another output")


def _resized(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether shots of these settings do not make one film."""
    old, new = flat(before), flat(now)
    return any(old.get(key) != new.get(key) for key in (*SIDES, "model.video.fps"))


def match_film(film: Film, story: Mapping[str, Any], config: Mapping[str, Any], work: Work) -> None:
    """Match the takes of ``film`` with ``story`` (its record).

    Shots that were edited, added, moved or removed make no difference, if others stay. A take of a single shot may have
    settings of its own.

    Raises:
        OtherFilmError: if it has takes, and some stay, and it is not a film of this story and these settings: what
            differs, what to type.
    """
    film.use_story(story)
    before = film.before
    if before is None or not film.takes or work.onwards is not None:
        return
    settings = [] if work.shots is not None else setting_changes(before.config, config)
    if film.shots and not settings:
        return
    changes = [*film_changes(before.story, story), *settings]
    if not film.shots:
        changes += _shot_changes(before.story, story)
    kind = "with other settings" if film.shots else "of another story: none of its shots is in this one"
    more = [f"and {len(changes) - _MOST} more"] if len(changes) > _MOST else []
    lines = [f"{film.folder} holds a film {kind}:", *(f"  {line}" for line in [*changes[:_MOST], *more])]
    cures = {"resume=from_shot:1": "regenerate all shots" if film.shots else "make the film of this story here"}
    if film.shots and not _resized(before.config, config):
        cures = {
            "shot=N": "make a take of shot N with these settings",
            "resume=from_shot:N": "regenerate shots N and later",
        }
    cures["output=FOLDER"] = "make another film"
    if film.shots and (arguments := arguments_between(before.config, config)):
        if arguments.startswith("size="):  # another aspect may be in the command
            arguments = f"aspect=null {arguments}"
        cures[arguments] = "resume this film with its own settings"
    advice = ["add to the command:", *(f"  {key}  to {what}" for key, what in cures.items())]
    raise OtherFilmError("\n".join(lines), "\n".join(advice))


def film_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for each change of a story outside its shots."""
    without = ("scenes", "characters", "reference_sha256")
    yield from differences(*({k: v for k, v in _given(story).items() if k not in without} for story in (old, new)))
    known, cast = ({one["name"]: _given(one) for one in story.get("characters", ())} for story in (old, new))
    yield from (f"character {name} is no longer in the story" for name in known if name not in cast)
    for name, character in cast.items():
        if name in known:
            yield from (f"character {name}: {line}" for line in differences(known[name], character))
        else:
            yield f"character {name} is new"
    images, now = (story.get("reference_sha256", {}) for story in (old, new))
    changed = [source for source in images if images[source] != now.get(source, images[source])]
    yield from (f"the image {source} has changed" for source in changed)


def _given(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what was left out."""
    return {key: value for key, value in record.items() if value not in (None, [], {})}


def _shot_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key that differs between the shots at equal places; style and looks belong to the story."""
    places: dict[str, list[int]] = {}
    for number, (script, now) in enumerate(zip(scripts(old), scripts(new), strict=False), start=1):
        for key in (script.content.keys() | now.content.keys()) - {"style", "looks"}:
            if script.content.get(key) != now.content.get(key):
                places.setdefault(key, []).append(number)
    for key, numbers in sorted(places.items()):
        yield f"shot{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {key} changed"


def story_changes(film: Film) -> Iterator[str]:
    """A line for each change of the story since ``film`` was opened."""
    if film.before is not None:
        yield from matches(film, film.before)
        yield from film_changes(film.before.story, film.story)


@dataclass(frozen=True)
class Job:
    """Takes to be made of one shot.

    Args:
        index: of the shot, from 0.
        takes: how many.
        fresh: from noise that no take of the shot has.
    """

    index: int
    takes: int = 1
    fresh: bool = False


def jobs_of(film: Film, work: Work) -> list[Job]:
    """What is to be made, in the film's order; the shots of a run that regenerates are marked in ``film``."""
    first = len(film.slots) if work.onwards is None else work.onwards
    jobs = []
    for index, slot in enumerate(film.slots):
        if work.shots is not None and index in work.shots:
            jobs.append(Job(index, work.takes, fresh=True))
        elif index >= first or (work.shots is None and (slot.take is None or slot.again)):
            jobs.append(Job(index))
    if work.onwards is not None:
        film.slots = [replace(slot, again=slot.again or n >= first) for n, slot in enumerate(film.slots)]
    return jobs


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run works on.

    Args:
        story: of now.
        film: with this story, and the takes that its shots have.
        jobs: the takes to make.
        config: the settings of the takes to make.
    """

    story: Story
    film: Film
    jobs: list[Job]
    config: dict[str, Any]

    @property
    def changed(self) -> bool:
        """Whether the story is another than the film's on disk, or its memory is missing."""
        film, before = self.film, self.film.before
        return film.lacks_memory or (before is not None and (before.story != film.story or before.slots != film.slots))


@contextmanager
def naming_next_command(film: Film, work: Work, jobs: Sequence[Job]) -> Iterator[None]:
    """Add the command that resumes to an interrupt by the user."""
    before = len(film.takes)
    try:
        yield
    except KeyboardInterrupt as stop:
        made = len(film.takes) - before
        if not work.words:
            stop.add_note("the same command resumes")
        elif not made:
            stop.add_note(f"the film is as it was; the same command regenerates from shot {jobs[0].index + 1}")
        elif work.onwards is not None:
            stop.add_note(f"the same command without {work.words} resumes")
        else:
            left = [job.index + 1 for job in jobs if sum(j.takes for j in jobs if j.index < job.index) >= made]
            rest = f"; shot={','.join(map(str, left))} makes takes of the others" if left else ""
            stop.add_note(f"{made} of {sum(job.takes for job in jobs)} takes were made and stay{rest}")
        raise
