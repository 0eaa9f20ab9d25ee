"""A film in words: tables of shots, takes and keyframes, and why frames became keyframes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from storymem.film.differences import setting_changes
from storymem.film.manifest import CandidateRecord, Manifest, Take, scripts
from storymem.memory.bank import Entry
from storymem.memory.selection import Verdict

NO_MEMORY = "memory.json is missing: storymem generate writes it again from the takes"


def film_table(film: Manifest, stale: Mapping[int, str], videos: Mapping[str, str]) -> str:
    """A line per shot: the take that is chosen, how it was made, frames, seconds, keyframes recalled and added.

    ``stale`` is of :func:`storymem.film.matching.stale`, ``videos`` of :meth:`storymem.film.folder.Film.other_videos`.
    """
    heading = ("shot", "scene", "take", "takes", "mode", "seed", "frames", "seconds", "recalled", "added (frames)")
    rows: list[tuple[str, ...]] = [(*heading, "video", "not what would be made now")]
    for index, script in enumerate(scripts(film.story)):
        take, count = film.take_of(index), len(film.takes_of(index))
        place = (str(index + 1), f"{script.scene}.{script.number}")
        if take is None:
            row = (*place, "none", str(count), *[""] * 7)
        else:
            added = ", ".join(str(keyframe.frame) for keyframe in take.keyframes)
            row = (
                *(*place, str(take.take), str(count), take.mode, str(take.seed)),
                *(str(take.frames), f"{sum(take.seconds.values()):.1f}", str(len(take.memory))),
                *(f"{len(take.keyframes)} ({added})" if added else "0", videos.get(take.file, "")),
            )
        rows.append((*row, stale.get(index + 1, "")))
    return format_table(rows, optional=2)


def takes_table(film: Manifest, videos: Mapping[str, str]) -> str:
    """A line per take, by shots, and which settings it has other than the film; takes of no shot are the last."""
    rows: list[tuple[str, ...]] = [("take of shot", "take", "shown", "seed", "seconds", "settings", "video")]
    slots = {slot.folder: (number, slot.take) for number, slot in enumerate(film.slots, start=1)}
    none = (len(slots) + 1, None)
    for take in sorted(film.takes, key=lambda take: (slots.get(take.folder, none)[0], take.folder, take.take)):
        number, chosen = slots.get(take.folder, none)
        config = film.config_of(take)
        others = [] if config is None else setting_changes(config, film.config)
        changed = ", ".join(line.partition(" before,")[0] for line in others[:3]) + (", ..." if len(others) > 3 else "")
        shot = str(number) if number <= len(slots) else f"none ({take.prompt[:30]})"
        shown = "yes" if take.take == chosen else ""
        about = ("not known" if config is None else changed, videos.get(take.file, ""))
        rows.append((shot, str(take.take), shown, str(take.seed), f"{sum(take.seconds.values()):.1f}", *about))
    return format_table(rows, optional=1)


def memory_table(film: Manifest, entries: Sequence[Entry]) -> str:
    """A line per keyframe of the memory, with its number, from 1."""
    heading = ("", "keyframe", "from", "character", "quality", "similarity", "recalled by shots", "")
    rows: list[tuple[str, ...]] = [heading]
    for number, entry in enumerate(entries, start=1):
        scores = ("" if value is None else f"{value:.2f}" for value in (entry.quality, entry.similarity))
        shots = ", ".join(map(str, recalled_by(film, entry.id)))
        pinned = "pinned" if entry.pinned else ""
        rows.append((str(number), entry.id, origin(entry), entry.character or "", *scores, shots, pinned))
    return format_table(rows)


def recalled_by(film: Manifest, id: str) -> list[int]:
    """The shots (from 1) whose takes recalled a keyframe."""
    return [take.shot for take in film.shots if id in take.memory]


def candidates_table(take: Take) -> str:
    """A line per frame that was examined as a keyframe, and why it became one or not."""
    rows: list[tuple[str, ...]] = [("frame", "quality", "similarity", "threshold", "verdict")]
    for one in take.candidates or ():
        values = (one.quality, one.similarity, one.threshold)
        rows.append((str(one.frame), *("" if value is None else f"{value:.3f}" for value in values), reason(one)))
    return format_table(rows)


def reason(candidate: CandidateRecord) -> str:
    """The verdict on a candidate, with the numbers that decided."""
    limit = "" if candidate.threshold is None else f"{candidate.threshold:.2f}"
    cosine = "" if candidate.similarity is None else f"{candidate.similarity:.2f}"
    if candidate.verdict == "low quality":
        return f"quality {candidate.quality:.2f} is below {limit}"
    if candidate.verdict == "like the last":
        return f"like the last one chosen: similarity {cosine}, new below {limit}"
    if candidate.verdict == "in the memory":
        return f"in the memory already: similarity {cosine}, above {limit}"
    return "kept: the memory was empty" if not cosine else f"kept: similarity {cosine} to the memory"


def summary(take: Take) -> str | None:
    """What became of the frames of a take in one line; None where it is not known."""
    if not take.candidates:
        return None
    counts = Counter(one.verdict for one in take.candidates)
    limits = {one.verdict: one.threshold for one in take.candidates}
    words: dict[Verdict, str] = {
        "kept": "kept",
        "low quality": f"below quality {limits.get('low quality') or 0:.2f}",
        "like the last": "like the last one chosen",
        "in the memory": "in the memory already",
    }
    parts = [f"{counts[verdict]} {text}" for verdict, text in words.items() if counts[verdict]]
    none = "" if counts["kept"] else "none kept; "
    return f"{none}{take.frames} frames, {len(take.candidates)} examined: {', '.join(parts)}"


def origin(entry: Entry) -> str:
    """Where a keyframe is from."""
    if entry.source is not None:
        return entry.source
    if entry.frame is not None:
        return f"shot {entry.shot}, frame {entry.frame}"
    return "the user" if entry.shot is None else f"the user, for shots from {entry.shot}"


def counted(count: int, name: str) -> str:
    """``2, "take"`` -> ``2 takes``."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def format_table(rows: Sequence[Sequence[str]], *, optional: int = 0) -> str:
    """Rows of equal length as right-aligned columns, the first row as heading.

    Of the last columns, as many as are ``optional`` are left out if they are empty.
    """
    columns = [*zip(*rows, strict=True)]
    columns = [one for place, one in enumerate(columns) if place < len(columns) - optional or any(one[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
