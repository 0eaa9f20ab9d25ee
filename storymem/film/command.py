"""``storymem film FOLDER``: what a film consists of; joining, exporting and cleaning it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings
from storymem.film.export import check_export, export
from storymem.film.folder import Film, edited_film
from storymem.film.manifest import VIDEO
from storymem.film.matching import stale
from storymem.film.tables import NO_MEMORY, counted, film_table, memory_table, takes_table
from storymem.memory.bank import read_entries
from storymem.stopping import stopping_on_signals


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilmSettings:
    """The settings of ``storymem film``.

    Args:
        folder: of the film.
        action: show: print shots, takes and memory; join: write film.mp4 and storyboard.html; export: write clips and
            timelines; clean: delete the takes that no shot shows.
        output: the folder of an export; export in the film's folder by default.
        codec: of exported clips: h264 as they are, or prores (422 HQ).
        yes: clean without asking.
    """

    folder: UserPath
    action: Literal["show", "join", "export", "clean"] = "show"
    output: UserPath | None = None
    codec: Literal["h264", "prores"] = "h264"
    yes: bool = False


def film_command(config: Mapping[str, Any]) -> None:
    """Run ``storymem film`` with a composed configuration."""
    if not isinstance(folder := config.get("folder"), str | None):
        raise ValueError(f"{folder[-1]}: write one folder, and join, export or clean, or nothing")
    settings = build_settings(FilmSettings, config)
    film = Film.open(settings.folder)
    if settings.action == "show":
        print(described(film), flush=True)
        return
    only_read = settings.action == "export" and settings.output is not None  # the folder may be another user's
    with stopping_on_signals(), nullcontext(film) if only_read else edited_film(settings.folder) as film:
        done = {"join": _join, "export": _export, "clean": _clean}[settings.action](film, settings)
    print(done, flush=True)


def described(film: Film) -> str:
    """The film in text: a line for each shot, each take and each keyframe."""
    entries, videos = read_entries(film.folder), film.other_videos()
    missing = sum(slot.take is None for slot in film.slots)
    parts = [
        f"{film.story['title']}: {counted(len(film.slots), 'shot')}, {missing} without a take",
        film_table(film, stale(film, entries), videos),
    ]
    if len(film.takes) > len(film.shots):
        parts.append(takes_table(film, videos))
    if entries:
        parts.append(memory_table(film, entries))
    if film.lacks_memory:
        parts.append(NO_MEMORY)
    if lost := film.lost():
        parts.append(lost)
    again = [str(number) for number, slot in enumerate(film.slots, start=1) if slot.again]
    if again:
        shots = f"shot{'' if len(again) == 1 else 's'} {', '.join(again)}"
        parts.append(f"a run that regenerates {shots} was interrupted; storymem generate resumes it")
    return "\n\n".join(parts)


def _join(film: Film, settings: FilmSettings) -> str:
    _check_takes(film)
    return str(film.folder / VIDEO)  # written after this


def _export(film: Film, settings: FilmSettings) -> str:
    output = Path(settings.output or film.folder / "export")
    check_export(output, settings.codec)
    _check_takes(film)
    for note in export(film, output, settings.codec):
        print(note, file=sys.stderr)
    return str(output)


def _check_takes(film: Film) -> None:
    if not film.shots:
        raise ValueError(f"{film.folder} has no take yet: storymem generate makes one")
    film.check()


def _clean(film: Film, settings: FilmSettings) -> str:
    gone = sorted(film.not_shown, key=lambda take: take.file)
    for take in gone:
        print(f"{take.file}  seed {take.seed}  {take.prompt[:60]}")
    if not gone:
        return "there are no takes but those that the film shows"
    if not settings.yes and not _agreed(f"delete {counted(len(gone), 'take')} permanently? [y/N] "):
        return "nothing was deleted"
    film.clean()
    return f"deleted {counted(len(gone), 'take')}"


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ValueError("takes are deleted after a question that needs a terminal: add yes=true to delete them")
    return input(question).strip().lower() in ("y", "yes")
