"""Groups of clips that are alike but not the same, from one embedding per clip.

Three steps, each deterministic: the most similar clips of each clip are found; of near-duplicates only one is kept, so
that a clip is never asked to remember itself, nor known to training when it is held out for validation; then groups
are filled greedily. Every two clips of a group are similar (complete linkage), not only neighbours in a chain.

Clips take their turns in the order of a hash of their ids, so a clip that is added later changes groups only where
it is alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from storymem.data.settings import GroupSettings

FAISS_FROM = 20_000
_ROWS, _COLUMNS = 1024, 16384
# Of faiss's inverted file: lists visited for a clip, and how well the lists are fitted, which need not be well.
_VISITED, _FIT_ROUNDS, _FIT_POINTS = 32, 10, 64


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What became of each clip.

    Args:
        group: clip -> the number of its group, counted from 0.
        split: group -> "train" or "valid".
        duplicates: clip -> the clip of which it is a near-duplicate.
        alone: clips that found too few companions.
    """

    group: dict[str, int]
    split: list[Literal["train", "valid"]]
    duplicates: dict[str, str]
    alone: list[str]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Pairs of clips and their cosines, both directions of each pair, ordered by row and then by falling cosine.

    Args:
        starts: int64 [N + 1]; the pairs of row i are ``starts[i]:starts[i + 1]``.
        columns: int64 [P].
        cosines: float32 [P].
        full: bool [N]; rows that found as many as were asked for, so there may be more.
    """

    starts: np.ndarray
    columns: np.ndarray
    cosines: np.ndarray
    full: np.ndarray

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(columns, cosines) of one row."""
        pairs = slice(self.starts[row], self.starts[row + 1])
        return self.columns[pairs], self.cosines[pairs]

    @property
    def rows(self) -> np.ndarray:
        """The row of each pair, int64 [P]."""
        return np.repeat(np.arange(len(self.full)), np.diff(self.starts))

    def without(self, dropped: Collection[int]) -> Neighbours:
        """The same pairs where some rows are taken out and the others counted anew."""
        stays = np.ones(len(self.full), bool)
        stays[list(dropped)] = False
        number, rows = np.cumsum(stays) - 1, self.rows
        used = stays[rows] & stays[self.columns]
        return Neighbours(
            starts=np.searchsorted(number[rows[used]], np.arange(stays.sum() + 1)),
            columns=number[self.columns[used]],
            cosines=self.cosines[used],
            full=self.full[stays],
        )


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
        settings: thresholds and sizes.
        sizes: (height, width) of the clips, in the order of ``ids``: a memory frame has the size of the clip that
            looks at it, so a group is of one size. None: all have the same.
        places: where each clip comes from, in the order of ``ids``: only clips of one place come together. None:
            all are of one place.
        device: where exact search runs.

    Raises:
        ValueError: if no two clips are alike, with the similarities found.
    """
    assert len(ids) == len(embeddings)
    turns = sorted(range(len(ids)), key=lambda row: _hash(ids[row], "turn"))
    ids, embeddings = [ids[row] for row in turns], np.ascontiguousarray(embeddings[turns], dtype=np.float32)
    _, size_of = np.unique([sizes[row] for row in turns] if sizes else [(0, 0)] * len(ids), axis=0, return_inverse=True)
    rows_of: dict[str, list[int]] = {}
    for row, turn in enumerate(turns):
        rows_of.setdefault(places[turn] if places else "", []).append(row)
    duplicates: dict[int, int] = {}
    groups: list[list[int]] = []
    for rows in map(np.array, rows_of.values()):
        kept, copies, neighbours = _distinct(embeddings[rows], settings, device)
        duplicates |= {int(rows[copy]): int(rows[original]) for copy, original in copies.items()}
        rows = rows[kept]
        formed = form_groups(embeddings[rows], neighbours, settings, size_of.ravel()[rows])
        groups += [rows[members].tolist() for members in formed]
    left = [row for row in range(len(ids)) if row not in duplicates]
    if max(map(len, groups), default=0) < 2 and settings.min_size > 1:
        raise ValueError(_nothing_alike(embeddings[left], len(ids), len(duplicates), settings))
    group_of = {row: number for number, members in enumerate(groups) for row in members}
    return Grouping(
        group={ids[row]: number for row, number in group_of.items()},
        split=split_groups([ids[members[0]] for members in groups], settings.valid_fraction),
        duplicates={ids[copy]: ids[original] for copy, original in duplicates.items()},
        alone=sorted(ids[row] for row in left if row not in group_of),
    )


def _distinct(
    embeddings: np.ndarray, settings: GroupSettings, device: str | torch.device
) -> tuple[np.ndarray, dict[int, int], Neighbours]:
    """The rows that are kept, for each near-duplicate the row kept in its stead, and the neighbours of those kept."""
    kept = np.arange(len(embeddings))
    duplicates: dict[int, int] = {}
    while True:
        neighbours = find_neighbours(embeddings[kept], settings, device=device)
        copies = near_duplicates(neighbours, settings.near_duplicate)
        duplicates |= {int(kept[copy]): int(kept[original]) for copy, original in copies.items()}
        kept = np.delete(kept, list(copies))
        # Where dropped clips had filled the list of another, a new search finds what they hid.
        if not neighbours.full[neighbours.columns[np.isin(neighbours.rows, list(copies))]].any():
            return kept, {copy: _original(copy, duplicates) for copy in duplicates}, neighbours.without(copies)


def find_neighbours(
    embeddings: np.ndarray, settings: GroupSettings, *, device: str | torch.device = "cpu"
) -> Neighbours:
    """For each clip its ``settings.neighbours`` most similar clips of at least ``settings.similarity``."""
    count = min(settings.neighbours, len(embeddings) - 1)
    if count < 1:
        return _symmetric(np.zeros((len(embeddings), 0), np.int64), np.zeros((len(embeddings), 0), np.float32), -1)
    wants_faiss = settings.search == "faiss" or (settings.search == "auto" and len(embeddings) >= FAISS_FROM)
    if wants_faiss and _faiss_installed(required=settings.search == "faiss"):
        columns, cosines = search_faiss(embeddings, count)
    else:
        columns, cosines = search_exact(embeddings, count, device=device)
    return _symmetric(columns, cosines, settings.similarity)


def search_exact(
    embeddings: np.ndarray, count: int, *, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` nearest others of every row by cosine, by products of blocks; memory does not grow as N^2.

    Returns:
        (columns int64 [N, count], cosines float32 [N, count]), nearest first.
    """
    rows = torch.from_numpy(embeddings).to(device)
    all_columns = np.empty((len(rows), count), np.int64)
    all_cosines = np.empty((len(rows), count), np.float32)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        best = torch.empty(len(block), 0, device=rows.device)
        where = torch.empty(len(block), 0, dtype=torch.int64, device=rows.device)
        for first in range(0, len(rows), _COLUMNS):
            cosines = block @ rows[first : first + _COLUMNS].T
            _hide_selves(cosines, start, first)
            top = cosines.topk(min(count, cosines.shape[1]), dim=1)
            best, where = torch.cat([best, top.values], 1), torch.cat([where, top.indices + first], 1)
            best, order = best.topk(min(count, best.shape[1]), dim=1)
            where = where.gather(1, order)
        all_columns[start : start + _ROWS] = where.cpu().numpy()
        all_cosines[start : start + _ROWS] = best.cpu().numpy()
    return all_columns, all_cosines


def _hide_selves(cosines: torch.Tensor, start: int, first: int) -> None:
    """Of a block that begins at row ``start`` and column ``first``: no clip is its own neighbour."""
    rows = torch.arange(len(cosines), device=cosines.device)
    columns = rows + start - first
    inside = (columns >= 0) & (columns < cosines.shape[1])
    cosines[rows[inside], columns[inside]] = -torch.inf


def search_faiss(embeddings: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`search_exact`, by an inverted file of faiss: approximate, and its time grows as N^1.5.

    Where fewer are found, columns are -1.
    """
    import faiss

    lists = max(1, min(int(4 * len(embeddings) ** 0.5), len(embeddings) // 39))
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(embeddings.shape[1]), embeddings.shape[1], lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter, index.cp.max_points_per_centroid = _FIT_ROUNDS, _FIT_POINTS
    index.train(embeddings)
    index.add(embeddings)
    index.nprobe = _VISITED
    cosines, columns = index.search(embeddings, count + 1)
    # A clip is among its own neighbours, at any place if it has duplicates, or not at all: then the last goes.
    is_self = columns == np.arange(len(embeddings))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return columns[~is_self].reshape(-1, count), cosines[~is_self].reshape(-1, count)


def near_duplicates(neighbours: Neighbours, threshold: float) -> dict[int, int]:
    """Clip -> the earlier clip that is kept in its stead, for cosines of at least ``threshold``."""
    copies: dict[int, int] = {}
    for row in np.flatnonzero(np.diff(neighbours.starts)).tolist():
        if row in copies:
            continue
        columns, cosines = neighbours.of(row)
        for column in columns[cosines >= threshold].tolist():
            if column > row:
                copies.setdefault(column, row)
    return copies


def _original(copy: int, duplicates: Mapping[int, int]) -> int:
    """The clip that is kept; what stood for a copy in one round may have been dropped in a later one."""
    while copy in duplicates:
        copy = duplicates[copy]
    return copy


def form_groups(
    embeddings: np.ndarray, neighbours: Neighbours, settings: GroupSettings, size_of: np.ndarray
) -> list[list[int]]:
    """Fill groups in the order of the rows: a clip and those of its free neighbours that are alike to all before them.

    Only clips of one size, an integer in ``size_of`` [N], come together.

    Groups below ``min_size`` are given up, and their clips join what other groups will have them. The first clip of
    a group is the one that began it.
    """
    groups: list[list[int]] = []
    group_of: dict[int, int] = {}
    left: list[int] = []
    for row in range(len(embeddings)):
        if row in group_of:
            continue
        columns, cosines = neighbours.of(row)
        near = columns[(cosines < settings.near_duplicate) & (size_of[columns] == size_of[row])]
        free = [row, *(column for column in near.tolist() if column not in group_of)]
        members = _alike(embeddings, free, settings)
        if len(members) < settings.min_size:
            left.append(row)
            continue
        group_of |= dict.fromkeys(members, len(groups))
        groups.append(members)
    for row in left:
        if row not in group_of:
            columns, _ = neighbours.of(row)
            near = columns[size_of[columns] == size_of[row]].tolist()
            _join(row, near, groups, group_of, embeddings, settings)
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


def _join(
    row: int,
    near: list[int],
    groups: list[list[int]],
    group_of: dict[int, int],
    embeddings: np.ndarray,
    settings: GroupSettings,
) -> None:
    """Put a clip into the group of the first of ``near`` that has room and is alike throughout, if there is one."""
    for number in dict.fromkeys(group_of[column] for column in near if column in group_of):
        joined = [*groups[number], row]
        if len(joined) <= settings.max_size and _alike(embeddings, joined, settings) == joined:
            groups[number] = joined
            group_of[row] = number
            return


def split_groups(firsts: Sequence[str], valid_fraction: float) -> list[Literal["train", "valid"]]:
    """A split for each group, by a hash of its first clip's id.

    So a group stays where it is when data is added. With two groups or more and a fraction above 0 at least one is
    held out, and at least one is not.
    """
    hashes = [_hash(first, "split") / 2**64 for first in firsts]
    valid = {place for place, value in enumerate(hashes) if value < valid_fraction}
    if len(firsts) > 1 and valid_fraction > 0:
        order = sorted(range(len(firsts)), key=hashes.__getitem__)
        valid = (valid | {order[0]}) - {order[-1]}
    elif len(firsts) == 1:
        valid = set()
    return ["valid" if place in valid else "train" for place in range(len(firsts))]


def _symmetric(columns: np.ndarray, cosines: np.ndarray, threshold: float) -> Neighbours:
    """Keep pairs of at least ``threshold``, each in both directions and once."""
    count, width = columns.shape
    used = (columns >= 0) & (cosines >= threshold)
    full = np.asarray(used.all(axis=1)) & (width > 0)
    rows, places = np.nonzero(used)
    others, values = columns[rows, places], cosines[rows, places]
    keys = np.minimum(rows, others) * count + np.maximum(rows, others)
    _, once = np.unique(keys, return_index=True)
    rows, others, values = rows[once], others[once], values[once]
    rows, others = np.concatenate([rows, others]), np.concatenate([others, rows])
    values = np.concatenate([values, values])
    order = np.lexsort((others, -values, rows))
    starts = np.searchsorted(rows[order], np.arange(count + 1))
    return Neighbours(starts=starts, columns=others[order], cosines=values[order], full=full)


def _faiss_installed(*, required: bool) -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        if required:
            raise ValueError(
                "group.search=faiss needs a package that is not installed: pip install faiss-cpu"
            ) from None
        return False
    return True


def _nothing_alike(embeddings: np.ndarray, clips: int, duplicates: int, settings: GroupSettings) -> str:
    if len(embeddings) < 2:
        return f"there is nothing to group: of {clips} clips {duplicates} are near-duplicates of others"
    sample = embeddings[:4096]
    _, cosines = search_exact(sample, 1)
    return (
        f"groups are all of size one: no two of {len(embeddings)} clips have a similarity between "
        f"group.similarity={settings.similarity} and group.near_duplicate={settings.near_duplicate} "
        f"({duplicates} near-duplicates were left out). The nearest neighbour of a clip has a similarity of "
        f"{np.median(cosines):.3f} (median), {cosines.max():.3f} at most: set group.similarity below that, or add "
        "clips that show the same people and places"
    )


def _hash(id: str, salt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}:{id}".encode()).digest()[:8])
