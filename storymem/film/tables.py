"""Shots, takes and keyframes of a film as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from storymem.film.manifest import Take, scripts
from storymem.film.reasons import origin, reason

if TYPE_CHECKING:
    from storymem.film.folder import Film
    from storymem.memory.bank import Entry


def film_table(film: Film, stale: Mapping[int, str] | None = None) -> str:
    """A line per shot: the take that is chosen, how it was made, frames, seconds, keyframes recalled and added.

    Args:
        film: with its takes.
        stale: see :func:`storymem.film.matching.stale`.
    """
    heading = ("shot", "scene", "take", "takes", "mode", "seed", "frames", "seconds", "recalled", "added (frames)")
    rows: list[tuple[str, ...]] = [heading if not stale else (*heading, "not what would be made now")]
    for index, script in enumerate(scripts(film.story)):
        take, count = film.take_of(index), len(film.takes_of(index))
        place = (str(index + 1), f"{script.scene}.{script.number}")
        if take is None:
            row = (*place, "none", str(count), *[""] * 6)
        else:
            added = ", ".join(str(keyframe.frame) for keyframe in take.keyframes)
            row = (
                *(*place, str(take.take), str(count), take.mode, str(take.seed)),
                *(str(take.frames), f"{sum(take.seconds.values()):.1f}", str(len(take.memory))),
                f"{len(take.keyframes)} ({added})" if added else "0",
            )
        rows.append(row if not stale else (*row, stale.get(index + 1, "")))
    return format_table(rows)


def takes_table(film: Film) -> str:
    """A line per take, by shots, and which settings it has other than the film; takes of no shot are the last."""
    from storymem.film.resume import setting_changes  # which imports this

    rows: list[tuple[str, ...]] = [("take of shot", "take", "shown", "seed", "seconds", "settings")]
    slots = {slot.folder: (number, slot.take) for number, slot in enumerate(film.slots, start=1)}
    none = (len(slots) + 1, None)
    for take in sorted(film.takes, key=lambda take: (slots.get(take.folder, none)[0], take.folder, take.take)):
        number, chosen = slots.get(take.folder, none)
        config = film.config_of(take)
        others = [] if config is None else setting_changes(config, film.config)
        changed = ", ".join(line.partition(" before,")[0] for line in others[:3]) + (", ..." if len(others) > 3 else "")
        shot = str(number) if number <= len(slots) else f"none ({take.prompt[:30]})"
        shown = "yes" if take.take == chosen else ""
        settings = "not known" if config is None else changed
        rows.append((shot, str(take.take), shown, str(take.seed), f"{sum(take.seconds.values()):.1f}", settings))
    return format_table(rows)


def memory_table(film: Film, entries: Sequence[Entry]) -> str:
    """A line per keyframe of the memory, with its number, from 1."""
    heading = ("", "keyframe", "from", "character", "quality", "similarity", "recalled by shots", "")
    rows: list[tuple[str, ...]] = [heading]
    for number, entry in enumerate(entries, start=1):
        scores = ("" if value is None else f"{value:.2f}" for value in (entry.quality, entry.similarity))
        shots = ", ".join(map(str, recalled_by(film, entry.id)))
        pinned = "pinned" if entry.pinned else ""
        rows.append((str(number), entry.id, origin(entry), entry.character or "", *scores, shots, pinned))
    return format_table(rows)


def recalled_by(film: Film, id: str) -> list[int]:
    """The shots (from 1) whose takes recalled a keyframe."""
    return [take.shot for take in film.shots if id in take.memory]


def candidates_table(take: Take) -> str:
    """A line per frame that was examined as a keyframe, and why it became one or not."""
    rows: list[tuple[str, ...]] = [("frame", "quality", "similarity", "threshold", "verdict")]
    for one in take.candidates or ():
        values = (one.quality, one.similarity, one.threshold)
        rows.append((str(one.frame), *("" if value is None else f"{value:.3f}" for value in values), reason(one)))
    return format_table(rows)


def counted(count: int, name: str) -> str:
    """``2, "take"`` -> ``2 takes``."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as right-aligned columns, the first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
