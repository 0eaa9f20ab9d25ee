"""Resuming a film: whether it is the same film, and what to type where it is not."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

from storymem.film.folder import Film, FilmError
from storymem.io import hash_json
from storymem.media.images import read_image
from storymem.scorers import with_defaults
from storymem.story import Story

_MOST = 12  # lines of a list


class Recipe(NamedTuple):
    """What a film is made from, as its manifest holds it."""

    story: dict[str, Any]
    config: dict[str, Any]


class Reference(NamedTuple):
    """A reference image of a character: the character's name, its path in the story, the hash of its pixels."""

    character: str
    source: str
    sha256: str | None


def story_record(story: Story) -> dict[str, Any]:
    """What the manifest holds of a story: all of it, and hashes of the pixels of its reference images."""
    paths = list(dict.fromkeys([*story.references, *(path for shot in story.shots for path in shot.references)]))
    digests = {
        source: hashlib.sha256(read_image(path).tobytes()).hexdigest()
        for path, source in zip(paths, story.written(paths), strict=True)
    }
    return story.to_dict() | {"reference_sha256": digests}


def references(story: Mapping[str, Any]) -> list[Reference]:
    """The references of the characters in a story's record, in order."""
    digests = story.get("reference_sha256", {})
    return [
        Reference(character["name"], source, digests.get(source))
        for character in story.get("characters", ())
        for source in character.get("references", ())
    ]


def encoders(config: Mapping[str, Any]) -> str:
    """Identifies the networks that embed and encode keyframes: a hash of all settings that may matter."""
    return hash_json({key: config.get(key) for key in ("model", "scorer", "weights", "runtime")})[:16]


def check_restart(film: Film, story: Story, now: Recipe, start: int) -> None:
    """Raise FilmError if shot ``start`` (from 0) and later ones of ``film`` cannot be regenerated with ``now``."""
    if start > len(film.shots):
        raise FilmError(
            f"resume=from_shot:{start + 1}: only {len(film.shots)} shots of {film.folder} are finished; "
            f"write from_shot:{len(film.shots) + 1} or less, or leave resume out"
        )
    for number, changed in _shot_changes(film.story, now.story).items():
        if number < start:
            raise FilmError(
                f"{story.shots[number].label} has changed too, before the shot you start from: "
                f"use resume=from_shot:{number + 1}\n  {'; '.join(changed)}"
            )
    old, new = flat(film.config), flat(now.config)
    if start > 0 and any(old.get(key) != new.get(key) for key in old | new if key.startswith("model.video.")):
        raise FilmError("size, length or rate of the shots have changed: use resume=from_shot:1 or another output")


def check_same(film: Film, now: Recipe) -> None:
    """Raise FilmError if ``film``, of which shots are finished, is not the film of ``now``: what differs, what to type.

    How shots are divided into scenes makes no difference.
    """
    shots = _shot_changes(film.story, now.story)
    story = [*_story_changes(film.story, now.story), *_labelled(shots, now.story)]
    settings = setting_changes(film.config, now.config)
    if not story and not settings:
        return
    changes = [*story, *settings]
    lines = [f"{film.folder} holds a film of another story or with other settings:"]
    lines += [f"  {change}" for change in changes[:_MOST]]
    if len(changes) > _MOST:
        lines.append(f"  and {len(changes) - _MOST} more")
    total = sum(len(scene["shots"]) for scene in now.story["scenes"])
    first = min(min(shots) + 1, len(film.shots) + 1, total) if shots else "N"
    cures = {f"resume=from_shot:{first}": f"regenerate shots {first} and later", "output=FOLDER": "make another film"}
    if not story and (arguments := _arguments(film.config, now.config)):
        cures[arguments] = "resume this film with its own settings"
    raise FilmError("\n".join([*lines, "add to the command:", *(f"  {key}  to {what}" for key, what in cures.items())]))


def _story_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each change outside the shots."""
    besides = [{k: v for k, v in story.items() if k not in ("scenes", "reference_sha256")} for story in (old, new)]
    images, now = (story.get("reference_sha256", {}) for story in (old, new))
    repainted = [source for source in images if source in now and images[source] != now[source]]
    return [*differences(*besides), *(f"the image {source} has changed" for source in repainted)]


def _shot_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[int, list[str]]:
    """Shot (from 0) -> what has changed in it."""
    shots = ([shot for scene in story["scenes"] for shot in scene["shots"]] for story in (old, new))
    changes: dict[int, list[str]] = {}
    for number, (before, after) in enumerate(zip_longest(*shots)):
        if before is None:
            changes[number] = ["is new"]
        elif after is None:
            changes[number] = [f"is gone ({before['prompt']!r:.80})"]
        elif changed := differences(before, after):
            changes[number] = changed
    return changes


def _labelled(changes: Mapping[int, list[str]], story: Mapping[str, Any]) -> list[str]:
    places = [
        f"scene {number}, shot {place}"
        for number, scene in enumerate(story["scenes"], start=1)
        for place in range(1, len(scene["shots"]) + 1)
    ]
    return [
        f"shot {number + 1}{f' ({places[number]})' if number < len(places) else ''}: {change}"
        for number, lines in changes.items()
        for change in lines
    ]


def _arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The arguments that bring back the settings ``before``; None if single values do not."""
    old, new = _settings(before), _settings(now)
    keys = [key for key in old.keys() | new.keys() if not key.startswith("weights.")]  # these follow from the others
    changed = sorted(key for key in keys if old.get(key, ...) != new.get(key, ...))
    if any(key not in old or key not in new or "[" in key or isinstance(old[key], list | dict) for key in changed):
        return None
    written = {None: "null", True: "true", False: "false"}
    values = [(key, written[old[key]] if isinstance(old[key], bool | None) else old[key]) for key in changed]
    return shlex.join(f"{key}={value}" for key, value in values)


@contextmanager
def naming_next_command(film: Film, resume: str) -> Iterator[None]:
    """Add the command that resumes to an interrupt by the user."""
    finished = len(film.shots)
    try:
        yield
    except KeyboardInterrupt as stop:
        if resume == "auto":
            stop.add_note("the same command resumes")
        elif len(film.shots) > finished:
            stop.add_note(f"the same command without resume={resume} resumes")
        else:
            stop.add_note(f"the film is as it was; the same command regenerates from shot {finished + 1}")
        raise


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each difference between the settings of films, whether or not they list the defaults of scorers."""
    return differences(_settings(before), _settings(after))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value of every setting that decides what a film looks like."""
    scorers = {name: with_defaults(node) for name, node in config.get("scorer", {}).items()}
    return {path: value for path, value in flat({**config, "scorer": scorers}).items() if value not in ({}, [])}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs: ``sampler.steps: 8 before, 40 now``."""
    old, new = flat(before), flat(after)
    return [
        f"{key}: {old.get(key, 'nothing')!r} before, {new.get(key, 'nothing')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...)
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value in nested mappings and lists under its path: ``sampler.steps``, ``characters[2].name``."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", item) for number, item in enumerate(value, start=1)]
    else:
        return {path: value}
    return {key: leaf for where, item in items for key, leaf in flat(item, where).items()}
