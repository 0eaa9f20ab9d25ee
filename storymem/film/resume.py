"""Going on with a film: whether it is the same film, what is kept of it, and what is said where it cannot go on."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from storymem.film.folder import Film, FilmError, differences, flat
from storymem.io import hash_json
from storymem.media.images import read_image
from storymem.story import Story


class Told(NamedTuple):
    """What a film tells and with which settings, as its manifest says."""

    story: dict[str, Any]
    config: dict[str, Any]


Reference = tuple[str, str, str | None]
"""A character's name, the path of a picture as the story gave it, and the hash of its pixels."""

SIZE = ("model.video.height", "model.video.width")


def story_record(story: Story) -> dict[str, Any]:
    """What the manifest keeps of a story: all that it says, and which pixels its reference images hold."""
    paths = list(dict.fromkeys([*story.references, *(path for shot in story.shots for path in shot.references)]))
    digests = {
        source: hashlib.sha256(read_image(path).tobytes()).hexdigest()
        for path, source in zip(paths, story.written(paths), strict=True)
    }
    return story.to_dict() | {"reference_sha256": digests}


def references(told: Mapping[str, Any]) -> list[Reference]:
    """The references of a story's characters, in order."""
    digests = told.get("reference_sha256", {})
    return [
        (character["name"], source, digests.get(source))
        for character in told.get("characters", ())
        for source in character.get("references", ())
    ]


def _shots(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [shot for scene in told["scenes"] for shot in scene["shots"]]


def _video(config: Mapping[str, Any]) -> dict[str, Any]:
    """Size, length and rate of the shots."""
    return {key: value for key, value in flat(config).items() if key.startswith("model.video.")}


def encoders(config: Mapping[str, Any]) -> str:
    """What tells the networks that encode pictures from others: a hash of all settings that may have a say in it."""
    chosen = {key: config.get(key) for key in ("model", "scorer", "weights", "runtime")}
    return hash_json(chosen)[:16]


def check_restart(film: Film, story: Story, now: Told, start: int) -> None:
    """Raise FilmError if shot ``start`` (from 0) and later ones of ``film`` cannot be made again with ``now``."""
    if start > len(film.shots):
        raise FilmError(
            f"resume=from_shot:{start + 1}: only {len(film.shots)} shots of {film.folder} are finished; "
            f"write from_shot:{len(film.shots) + 1} or less, or leave resume out to go on"
        )
    for number, (old, new) in enumerate(zip(_shots(film.story), _shots(now.story), strict=False)):
        if number < start and old != new:
            lines = "\n".join(f"  {line}" for line in differences(old, new))
            raise FilmError(
                f"{story.shots[number].label} has changed too, before the shot you start from; "
                f"use resume=from_shot:{number + 1}\n{lines}"
            )
    if start > 0 and _video(film.config) != _video(now.config):
        raise FilmError("size, length or rate of the shots have changed: use resume=from_shot:1 or another output")


def refusal(folder: Path, before: Told, now: Told) -> str:
    """What is said where the film in a folder is not the one that is asked for."""
    changed = differences(before.story, now.story) + differences(before.config, now.config)
    shown = "\n".join(f"  {line}" for line in changed[:12])
    more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
    settings = _as_before(before.config, now.config) if before.story == now.story else None
    go_on = f", or go on with the settings it has: add {settings}" if settings else ""
    return (
        f"{folder} holds a film of another story or with other settings:\n{shown}{more}\n"
        f"choose another output, or make shots N and later again with resume=from_shot:N{go_on}"
    )


def _as_before(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The arguments that bring back the settings ``before``; None if single values do not."""
    old, new = flat(before), flat(now)
    keys = [key for key in old.keys() | new.keys() if not key.startswith("weights.")]  # these follow from the others
    changed = sorted(key for key in keys if old.get(key, ...) != new.get(key, ...))
    if any(key not in old or key not in new or "[" in key or isinstance(old[key], list | dict) for key in changed):
        return None
    written = {None: "null", True: "true", False: "false"}
    values = [(key, written[old[key]] if isinstance(old[key], bool | None) else old[key]) for key in changed]
    return shlex.join(f"{key}={value}" for key, value in values)


@contextmanager
def saying_how_to_go_on(film: Film, resume: str) -> Iterator[None]:
    """Add to a stop by the user what goes on from there."""
    begun = len(film.shots)
    try:
        yield
    except KeyboardInterrupt as stop:
        if resume == "auto":
            stop.add_note("the same command goes on from here")
        elif len(film.shots) > begun:
            stop.add_note(f"the same command without resume={resume} goes on from here")
        else:
            stop.add_note(f"the film is as it was, and the same command begins with shot {begun + 1} again")
        raise
