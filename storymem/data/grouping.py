"""Groups of clips that are alike but not the same, from one embedding per clip.

Of near-duplicates only one is kept, so that a clip is never its own memory, nor seen in training when it is held out
for validation. Then groups are filled greedily with the most similar clips. Every two clips of a group are similar
(complete linkage), not only neighbours in a chain.

Clips take their turns in the order of a hash of their ids, so a clip that is added later changes groups only where
it is alike. Similarities are computed in blocks: RAM does not grow as N^2.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from storymem.data.settings import GroupSettings

_ROWS = 256  # of a block of similarities, which has a column for each clip


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What became of each clip."""

    group: dict[str, int]  # clip -> the number of its group, counted from 0
    split: list[Literal["train", "valid"]]  # of each group
    duplicates: dict[str, str]  # clip -> the clip of which it is a near-duplicate
    alone: list[str]  # clips with too few companions


def group_clips(
    ids: Sequence[str],
    embeddings: np.ndarray,
    settings: GroupSettings,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    places: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Grouping:
    """Group clips by their embeddings.

    Args:
        ids: of the clips, in any order.
        embeddings: float32 [N, D], L2-normalised, one row per clip.
        sizes: (height, width) of the clips, in the order of ``ids``: a memory frame has the size of the clip that
            reads it, so a group is of one size. None: all have the same.
        places: where each clip comes from, in the order of ``ids``: only clips of one place are grouped, and
            near-duplicates are searched for within one place. None: all are of one place.
        device: where similarities are computed.

    Raises:
        ValueError: if no two clips are alike, with the similarities found.
    """
    assert len(ids) == len(embeddings)
    turns = sorted(range(len(ids)), key=lambda row: _hash(ids[row], "turn"))
    ids = [ids[row] for row in turns]
    rows = torch.from_numpy(np.ascontiguousarray(embeddings[turns], dtype=np.float32)).to(device)
    copies: dict[int, int] = {}
    for members in _partition([places[row] for row in turns] if places else [""] * len(ids)):
        found = near_duplicates(rows[members], settings.near_duplicate)
        copies |= {members[copy]: members[original] for copy, original in found.items()}
    left = [row for row in range(len(ids)) if row not in copies]
    keys = [(places[turns[row]] if places else "", sizes[turns[row]] if sizes else None) for row in left]
    groups: list[list[int]] = []
    for members in _partition(keys):
        own = [left[place] for place in members]
        groups += [[own[place] for place in formed] for formed in form_groups(rows[own], settings)]
    groups.sort(key=lambda formed: formed[0])
    if max(map(len, groups), default=0) < 2 and settings.min_size > 1:
        raise ValueError(_nothing_alike(rows[left], len(ids), settings))
    group_of = {row: number for number, formed in enumerate(groups) for row in formed}
    return Grouping(
        group={ids[row]: number for row, number in group_of.items()},
        split=split_groups([ids[formed[0]] for formed in groups], settings.valid_fraction),
        duplicates={ids[copy]: ids[original] for copy, original in copies.items()},
        alone=sorted(ids[row] for row in left if row not in group_of),
    )


def _partition(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys, ascending."""
    places: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return list(places.values())


def near_duplicates(rows: Tensor, threshold: float) -> dict[int, int]:
    """Row -> the earlier row that is used instead, for cosines of at least ``threshold``; rows [N, D]."""
    copies: dict[int, int] = {}
    originals: list[int] = []
    bank = torch.empty_like(rows)  # of the originals
    for start in range(0, len(rows), _ROWS):
        block, known = rows[start : start + _ROWS], len(originals)
        alike = (torch.cat([block @ bank[:known].T, block @ block.T], dim=1) >= threshold).cpu().numpy()
        is_original = np.arange(alike.shape[1]) < known
        for row, near in enumerate(alike):
            near &= is_original
            if near.any():
                place = int(near.argmax())
                copies[start + row] = originals[place] if place < known else start + place - known
            else:
                is_original[known + row] = True
        new = np.flatnonzero(is_original[known:])
        originals += (start + new).tolist()
        bank[known : len(originals)] = block[new]
    return copies


def nearest_others(block: Tensor, columns: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
    """The cosines and numbers of the ``count`` most similar rows of ``columns`` [N, D], best first.

    ``block`` is rows ``first`` and on of ``columns``; no row is its own neighbour.
    """
    cosines = block @ columns.T
    cosines.diagonal(first).fill_(-torch.inf)
    best, numbers = cosines.topk(min(count, len(columns)), dim=1)
    return best, numbers


def find_neighbours(rows: Tensor, settings: GroupSettings) -> list[list[int]]:
    """Of each row its ``settings.neighbours`` most similar ones of at least ``settings.similarity``, and those of which
    it is one, most similar first."""
    found: list[dict[int, float]] = [{} for _ in range(len(rows))]
    count = min(settings.neighbours, len(rows) - 1)
    for start in range(0, len(rows) if count > 0 else 0, _ROWS):
        cosines, columns = nearest_others(rows[start : start + _ROWS], rows, count, first=start)
        near = zip(cosines.tolist(), columns.tolist(), strict=True)
        for row, (values, numbers) in enumerate(near, start):
            for cosine, column in zip(values, numbers, strict=True):
                if cosine >= settings.similarity:
                    found[row][column] = found[column][row] = cosine
    return [sorted(near, key=lambda column: (-near[column], column)) for near in found]


def form_groups(rows: Tensor, settings: GroupSettings) -> list[list[int]]:
    """Fill groups in the order of the rows: a clip, and those of its free neighbours that are alike to all before them.

    Groups below ``min_size`` are given up, and their clips join a group that has room and is alike throughout, if
    there is one. The first clip of a group is the one that began it.
    """
    neighbours, embeddings = find_neighbours(rows, settings), rows.cpu().numpy()
    groups: list[list[int]] = []
    group_of: dict[int, int] = {}
    left: list[int] = []
    for row in range(len(rows)):
        if row in group_of:
            continue
        free = [column for column in neighbours[row] if column not in group_of]
        members = _alike(embeddings, [row, *free], settings)
        if len(members) < settings.min_size:
            left.append(row)
            continue
        group_of |= dict.fromkeys(members, len(groups))
        groups.append(members)
    for row in left:
        for number in dict.fromkeys(group_of[near] for near in neighbours[row] if near in group_of):
            joined = [*groups[number], row]
            if row not in group_of and _alike(embeddings, joined, settings) == joined:
                groups[number], group_of[row] = joined, number
    return groups


def _alike(embeddings: np.ndarray, candidates: list[int], settings: GroupSettings) -> list[int]:
    """The first candidate, and each later one that is alike to all taken before, up to ``max_size``."""
    cosines = embeddings[candidates] @ embeddings[candidates].T
    fits = (cosines >= settings.similarity) & (cosines < settings.near_duplicate)
    taken = [0]
    for place in range(1, len(candidates)):
        if len(taken) == settings.max_size:
            break
        if fits[place, taken].all():
            taken.append(place)
    return [candidates[place] for place in taken]


def split_groups(firsts: Sequence[str], valid_fraction: float) -> list[Literal["train", "valid"]]:
    """A split for each group, by a hash of its first clip's id, so a group stays where it is when data is added.

    With two groups or more and a fraction above 0 at least one is held out, and at least one is not.
    """
    hashes = [_hash(first, "split") / 2**64 for first in firsts]
    valid = {place for place, value in enumerate(hashes) if value < valid_fraction}
    if len(firsts) > 1 and valid_fraction > 0:
        order = sorted(range(len(firsts)), key=hashes.__getitem__)
        valid = (valid | {order[0]}) - {order[-1]}
    elif len(firsts) == 1:
        valid = set()
    return ["valid" if place in valid else "train" for place in range(len(firsts))]


def _nothing_alike(rows: Tensor, clips: int, settings: GroupSettings) -> str:
    duplicates = clips - len(rows)
    if len(rows) < 2:
        return f"there is nothing to group: of {clips} clips {duplicates} are near-duplicates of others"
    cosines, _ = nearest_others(rows[:4096], rows[:4096], 1, first=0)
    return (
        f"groups are all of size one: no two of {len(rows)} clips have a similarity between "
        f"group.similarity={settings.similarity} and group.near_duplicate={settings.near_duplicate} "
        f"({duplicates} near-duplicates were left out). The nearest neighbour of a clip has a similarity of "
        f"{cosines.median().item():.3f} (median), {cosines.max().item():.3f} at most: set group.similarity below that, "
        "or add clips that show the same people and places"
    )


def _hash(id: str, salt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}:{id}".encode()).digest()[:8])
