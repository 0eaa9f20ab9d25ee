"""A whole shot from pixels: attributes by vote over its frames, the action from how the fitted poses change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from toyworld.attributes import FRAMINGS, UNKNOWN, Look, Seen
from toyworld.fit_character import Placement
from toyworld.motion import half_width
from toyworld.reader import read_frame

ROLLED = 0.6  # radians from upright
LIFTED = 3.0  # world units; walking lifts by 1.4


@dataclass(frozen=True, kw_only=True)
class ShotSeen:
    """What a shot shows and what happens in it; unknown where most frames do not tell."""

    seen: Seen
    action: str


def read_shot(frames: npt.NDArray[np.uint8], every: int = 2) -> ShotSeen:
    """Read every `every`-th frame of a shot uint8 [F, 64, 96, 3]; looks run from left to right."""
    read = [read_frame(frame) for frame in frames[::every]]
    seen = [attributes for attributes, _ in read]
    crowd = _commonest([len(s.looks) for s in seen])
    full = [s.looks for s in seen if len(s.looks) == crowd]
    looks = tuple(_vote_look([look[i] for look in full]) for i in range(crowd))
    names = ("place", "time", "framing", "landmark", "side", "flag")
    voted = Seen(**{name: vote(getattr(s, name) for s in seen) for name in names}, looks=looks)
    paths = [[fit.at for fit in fits] for _, fits in read if len(fits) == crowd]
    framing = voted.framing if voted.framing != UNKNOWN else FRAMINGS[1]
    action = UNKNOWN if crowd not in (1, 2) or len(paths) < 3 else read_action(paths, framing)
    return ShotSeen(seen=voted, action=action)


def vote(values: Iterable[str]) -> str:
    """The commonest value that is known, or unknown."""
    known = [value for value in values if value != UNKNOWN]
    return max(sorted(set(known)), key=known.count) if known else UNKNOWN


def read_action(path: Sequence[Sequence[Placement]], framing: str) -> str:
    """The action behind the poses of one or two characters over the frames in which all were found."""
    lift = max(at.lift for poses in path for at in poses)
    if len(path[0]) == 2:
        gaps = [right.x - left.x for left, right in path]
        if gaps[0] - gaps[-1] > 6:
            return "meets"
        return "jumps" if lift > LIFTED else "waits"
    (first, *_), (last, *_) = path[0], path[-1]
    away = last.x - first.x
    if abs(away) > 0.35 * half_width(framing):
        return "walks right" if away > 0 else "walks left"
    if sum(np.cos(poses[0].roll) < np.cos(ROLLED) for poses in path) >= 2:
        return "spins"
    if first.size < 0.8 and last.size - first.size > 0.15:
        return "grows"
    if lift > LIFTED:
        return "jumps"
    return "turns" if first.facing * last.facing < 0 else "waits"


def _vote_look(looks: Sequence[Look]) -> Look:
    return replace(looks[0], **{name: vote(getattr(look, name) for look in looks) for name in vars(looks[0])})


def _commonest(counts: Sequence[int]) -> int:
    return max(sorted(set(counts)), key=counts.count)
