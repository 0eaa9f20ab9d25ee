"""Why frames became keyframes or not, in words. Loads no torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from storymem.film.manifest import CandidateRecord, Take, Verdict

if TYPE_CHECKING:
    from storymem.memory.bank import Entry


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
