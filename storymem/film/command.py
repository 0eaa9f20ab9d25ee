"""``storymem film FOLDER``: what a film consists of; joining, exporting and cleaning it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings
from storymem.stopping import stopping_on_signals

if TYPE_CHECKING:
    from storymem.film.folder import Film
    from storymem.memory.bank import Entry


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
    settings = build_settings(FilmSettings, config)
    from storymem.film.folder import Film
    from storymem.film.manifest import film_folder

    folder = Path(settings.folder)
    Film.open(folder)  # a folder without a film is not locked
    if settings.action == "show":
        print(described(Film.open(folder)), flush=True)
        return
    with stopping_on_signals(), film_folder(folder):
        film = Film.open(folder)
        film.remove_unfinished()
        {"join": _join, "export": _export, "clean": _clean}[settings.action](film, settings)


def described(film: Film) -> str:
    """The film in text: a line for each shot, each take and each keyframe."""
    from storymem.film.matching import stale
    from storymem.film.progress import counted, film_table, format_table
    from storymem.memory.bank import read_entries

    entries = read_entries(film.folder)
    old = stale(film, entries)
    missing = sum(slot.take is None for slot in film.slots)
    parts = [
        f"{film.story['title']}: {counted(len(film.slots), 'shot')}, {missing} without a take",
        film_table(film, old),
    ]
    if len(film.takes) > len(film.shots):
        parts.append(format_table([("take of shot", "take", "shown", "seed", "seconds", "settings"), *_takes(film)]))
    if entries:
        heading = ("keyframe", "shot", "frame", "quality", "similarity", "of")
        parts.append(format_table([heading, *map(_keyframe, entries)]))
    again = [str(number) for number, slot in enumerate(film.slots, start=1) if slot.again]
    if again:
        shots = f"shot{'' if len(again) == 1 else 's'} {', '.join(again)}"
        parts.append(f"a run that regenerates {shots} was interrupted; storymem generate resumes it")
    return "\n\n".join(parts)


def _takes(film: Film) -> Iterator[tuple[str, ...]]:
    from storymem.film.resume import setting_changes

    slots = {slot.folder: (number, slot.take) for number, slot in enumerate(film.slots, start=1)}
    for take in sorted(film.takes, key=lambda take: (*slots.get(take.folder, (10**9, 0))[:1], take.folder, take.take)):
        number, chosen = slots.get(take.folder, (None, None))
        config = film.config_of(take)
        others = [] if config is None else setting_changes(config, film.config)
        changed = ", ".join(line.partition(" before,")[0] for line in others[:3]) + (", ..." if len(others) > 3 else "")
        shown = "yes" if take.take == chosen else ""
        shot = f"none ({take.prompt[:30]})" if number is None else str(number)
        seconds = f"{sum(take.seconds.values()):.1f}"
        yield shot, str(take.take), shown, str(take.seed), seconds, "not known" if config is None else changed


def _keyframe(entry: Entry) -> tuple[str, ...]:
    values = (entry.shot, entry.frame, entry.quality, entry.similarity)
    written = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
    return entry.id, *written, entry.character or entry.source or ""


def _join(film: Film, settings: FilmSettings) -> None:
    from storymem.film.storyboard import storyboard

    film.check()
    film.refresh(storyboard(film))
    if film.video is None:
        raise ValueError(f"{film.folder} has no take yet: storymem generate makes one")
    print(film.video, flush=True)


def _export(film: Film, settings: FilmSettings) -> None:
    from storymem.film.export import check_export, export

    output = Path(settings.output or film.folder / "export")
    if not film.shots:
        raise ValueError(f"{film.folder} has no take yet: storymem generate makes one")
    check_export(output, settings.codec)
    film.check()
    for note in export(film, output, settings.codec):
        print(note, file=sys.stderr)
    print(output, flush=True)


def _clean(film: Film, settings: FilmSettings) -> None:
    from storymem.film.progress import counted
    from storymem.film.storyboard import storyboard

    shown = film.shots
    gone = [take for take in film.takes if take not in shown]
    for take in gone:
        print(f"{take.file}  seed {take.seed}  {take.prompt[:60]}")
    if not gone:
        print("there are no takes but those that the film shows")
        return
    if not settings.yes and not _agreed(f"delete {counted(len(gone), 'take')} permanently? [y/N] "):
        print("nothing was deleted")
        return
    film.clean()
    film.refresh(storyboard(film))
    print(f"deleted {counted(len(gone), 'take')}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ValueError("takes are deleted after a question that needs a terminal: add yes=true to delete them")
    return input(question).strip().lower() in ("y", "yes")
