"""Simulated methods to compare with, without any pixels: what share of character attributes would they keep?"""

from __future__ import annotations

import numpy as np

from toyworld.attributes import LOOKS, Look
from toyworld.world import ToyStory


def share_of_characters(source: ToyStory, mode: str, *, tries: int) -> float:
    """Mean share of attributes that are as at first appearance.

    Shots with `cut: false` show whoever was in the shot before. After a cut, "independent" draws new looks; "nameless"
    gives every character the right look at first and then takes any of those seen so far, for a keyframe in memory has
    no name on it.
    """
    rng = np.random.default_rng([source.seed, tries])
    return float(np.mean([_one_film(source, mode, rng) for _ in range(tries)]))


def _one_film(source: ToyStory, mode: str, rng: np.random.Generator) -> float:
    first: dict[str, Look] = {}
    shown: list[Look] = []
    same: list[bool] = []
    for shot in source.shots:
        if shot.cut:
            shown = []
            for character in shot.cast:
                known = [look for look in first.values() if look not in shown]
                pool = list(LOOKS) if mode == "independent" else [character.look]
                if mode == "nameless" and character.name in first:
                    pool = known
                shown.append(pool[int(rng.integers(len(pool)))])
        for character, look in zip(shot.cast, shown, strict=True):
            if character.name in first:
                reference = first[character.name]
                same += [value == getattr(reference, part) for part, value in vars(look).items()]
            else:
                first[character.name] = look
    return float(np.mean(same))
