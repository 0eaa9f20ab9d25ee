"""How each shot of a story is made, and from which on; the rules that plan and loop share. Loads no torch."""

from __future__ import annotations

from typing import Literal

from storymem.story import Shot, Story
from storymem.wan.settings import Continuity

FirstShot = Literal["auto", "t2v", "m2v"]
Mode = Literal["t2v", "m2v", "mi2v", "mm2v"]

GIVEN_FRAMES: dict[Mode, int] = {"t2v": 0, "m2v": 0, "mi2v": 1, "mm2v": 5}
"""How many frames of the shot before a shot begins with; they are cut from its video."""


def mode_of(shot: Shot, story: Story, *, continuity: Continuity, first_shot: FirstShot) -> Mode:
    """How a shot is made (paper sections 3.3 and 3.5).

    The first shot: text-to-video ("t2v"), or memory-to-video with the story's references as memory ("m2v", which is
    then MR2V); "auto" is the latter if there are references. A shot that continues the one before: what
    ``continuity`` says. Every other shot: "m2v".
    """
    if shot.index == 0:
        has_references = bool(story.references or shot.references)
        by_text = first_shot == "t2v" or (first_shot == "auto" and not has_references)
        return "t2v" if by_text else "m2v"
    return "m2v" if shot.cut or continuity == "none" else continuity


def check_lengths(story: Story, *, frames: int, continuity: Continuity, first_shot: FirstShot) -> None:
    """Raise ``ValueError`` for shots too short to be gone on from, or to show anything new.

    Args:
        story: what is told.
        frames: length of shots that do not say their own.
        continuity: as in :func:`mode_of`.
        first_shot: as in :func:`mode_of`.
    """
    problems = []
    for shot in story.shots:
        mode = mode_of(shot, story, continuity=continuity, first_shot=first_shot)
        least = max(GIVEN_FRAMES["mm2v"], GIVEN_FRAMES[mode] + 4)
        length = shot.frames or frames
        if length < least:
            problems.append(f"{shot.label} has {length} frames; with continuity={continuity} it needs at least {least}")
    if problems:
        raise ValueError("\n".join(problems))


def parse_resume(resume: str, shots: int) -> int | None:
    """``"auto"`` -> None; ``"from_shot:N"`` -> N - 1. ``ValueError`` for anything else."""
    if resume == "auto":
        return None
    name, _, number = resume.partition(":")
    if name == "from_shot" and number.isdigit() and 1 <= int(number) <= shots:
        return int(number) - 1
    raise ValueError(f"resume={resume}: write auto, or from_shot:N with N from 1 to {shots}")
