"""Grouping: what may be in one group, what is dropped, and what stays the same when data is added."""

from itertools import combinations

import numpy as np
import pytest
import torch

from storymem.data import grouping
from storymem.data.grouping import Grouping, group_clips, nearest_others, split_groups
from storymem.data.settings import GroupSettings
from storymem.memory.keyframes import normalised

SETTINGS = GroupSettings(similarity=0.75, near_duplicate=0.97, max_size=5)


def clusters(count: int, size: int, *, spread: float = 0.4, dim: int = 32, seed: int = 0) -> np.ndarray:
    """``count`` directions with ``size`` vectors around each, [count * size, dim]; cosines within about 0.86."""
    random = np.random.default_rng(seed)
    centres = normalised(random.standard_normal((count, dim))).repeat(size, axis=0)
    return normalised(centres + spread * normalised(random.standard_normal(centres.shape)))


def names(embeddings: np.ndarray) -> list[str]:
    return [f"clip{number:05d}" for number in range(len(embeddings))]


def members(result: Grouping) -> list[set[str]]:
    found: dict[int, set[str]] = {}
    for id, number in result.group.items():
        found.setdefault(number, set()).add(id)
    assert sorted(found) == list(range(len(result.split)))
    return [found[number] for number in sorted(found)]


def test_all_clips_of_a_group_are_alike_but_not_the_same() -> None:
    embeddings = clusters(30, 7, spread=0.55)
    embeddings = np.concatenate([embeddings, normalised(embeddings[::10] + 1e-3)])
    ids = names(embeddings)
    result = group_clips(ids, embeddings, SETTINGS)
    row = {id: number for number, id in enumerate(ids)}
    for group in members(result):
        assert 2 <= len(group) <= SETTINGS.max_size
        for one, other in combinations(group, 2):
            assert 0.75 - 1e-6 <= embeddings[row[one]] @ embeddings[row[other]] < 0.97 + 1e-6
    accounted = [*result.group, *result.duplicates, *result.alone]
    assert sorted(accounted) == ids
    assert len(result.group) > 120


def test_clusters_far_apart_become_groups() -> None:
    embeddings = clusters(12, 4)
    result = group_clips(names(embeddings), embeddings, SETTINGS)
    assert sorted(map(sorted, members(result))) == [
        [f"clip{4 * cluster + k:05d}" for k in range(4)] for cluster in range(12)
    ]


def test_the_order_of_the_clips_does_not_matter() -> None:
    embeddings = clusters(20, 6, spread=0.6)
    ids = names(embeddings)
    order = np.random.default_rng(1).permutation(len(ids))
    one = group_clips(ids, embeddings, SETTINGS)
    other = group_clips([ids[row] for row in order], embeddings[order], SETTINGS)
    assert one == other


def test_one_of_any_number_of_near_duplicates_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "_ROWS", 16)
    settings = GroupSettings(neighbours=8)
    base = clusters(1, 3)
    copies = normalised(base[:1] + 1e-4 * np.random.default_rng(0).standard_normal((60, 32)))
    embeddings = np.concatenate([base, copies])  # 61 the same, and more of them than neighbours
    result = group_clips(names(embeddings), embeddings, settings)
    assert len(result.duplicates) == 60
    assert len(result.group) == 3, "the clips that the copies hid are found in the end"
    assert not set(result.duplicates) & set(result.duplicates.values()), "what remains is itself no copy"


def test_a_clip_without_companions_is_left_out_unless_wanted() -> None:
    embeddings = np.concatenate([clusters(2, 3), clusters(4, 1, seed=9)])
    result = group_clips(names(embeddings), embeddings, SETTINGS)
    assert result.alone == [f"clip{number:05d}" for number in range(6, 10)]
    kept = group_clips(names(embeddings), embeddings, GroupSettings(min_size=1))
    assert sorted(map(len, members(kept))) == [1, 1, 1, 1, 3, 3]
    assert kept.alone == []


def test_a_group_is_of_one_size() -> None:
    embeddings = clusters(1, 6)
    sizes = [(480, 832), (832, 480)] * 3
    result = group_clips(names(embeddings), embeddings, SETTINGS, sizes=sizes)
    groups = [{int(id[-1]) for id in group} for group in members(result)]
    assert sorted(map(sorted, groups)) == [[0, 2, 4], [1, 3, 5]]


def test_clips_of_different_places_do_not_come_together() -> None:
    crowd = clusters(1, 6)
    embeddings = np.concatenate([crowd, crowd + 1e-5])  # each clip has its double in the other place
    ids = names(embeddings)
    apart = group_clips(ids, normalised(embeddings), SETTINGS, places=["a"] * 6 + ["b"] * 6)
    groups = sorted(map(sorted, members(apart)))
    assert len(groups) == 2
    assert set(groups[0]) <= set(ids[:6])
    assert set(groups[1]) <= set(ids[6:])
    assert not apart.duplicates
    together = group_clips(ids, normalised(embeddings), SETTINGS)
    assert len(together.duplicates) == 6


def test_few_neighbours_do_not_hide_those_of_the_same_place() -> None:
    crowd = clusters(1, 40, spread=0.3)
    settings = GroupSettings(neighbours=4, similarity=0.5)
    found = group_clips(names(crowd), crowd, settings, places=[str(row % 20) for row in range(40)])
    assert sorted(map(len, members(found))) == [2] * 20


def test_groups_all_of_size_one_are_refused_with_the_similarities() -> None:
    embeddings = np.eye(5, 8, dtype=np.float32)
    with pytest.raises(ValueError, match=r"all of size one: no two of 5 .* 0\.000 \(median\).* set group\.similarity"):
        group_clips(names(embeddings), embeddings, SETTINGS)
    with pytest.raises(ValueError, match="of 4 clips 3 are near-duplicates"):
        group_clips(names(embeddings[:4]), embeddings[[0, 0, 0, 0]], SETTINGS)


def test_groups_stay_when_data_is_added() -> None:
    many = clusters(60, 4)
    ids = names(many)
    before = group_clips(ids[:160], many[:160], GroupSettings(valid_fraction=0.2))
    after = group_clips(ids, many, GroupSettings(valid_fraction=0.2))
    split_before = {id: before.split[number] for id, number in before.group.items()}
    split_after = {id: after.split[number] for id, number in after.group.items()}
    assert {id: split_after[id] for id in split_before} == split_before
    assert 0.1 < after.split.count("valid") / len(after.split) < 0.3


def test_some_group_is_held_out_and_some_is_not() -> None:
    assert sorted(split_groups(["a", "b"], 0.001)) == ["train", "valid"]
    assert sorted(split_groups(["a", "b"], 0.999)) == ["train", "valid"]
    assert split_groups(["a"], 0.9) == ["train"]
    assert split_groups(["a", "b", "c"], 0.0) == ["train"] * 3


@pytest.mark.parametrize("count", [1, 7, 299])
def test_exact_search_agrees_with_numpy(count: int) -> None:
    embeddings = clusters(100, 3, spread=2.0)
    rows = torch.from_numpy(embeddings)
    blocks = [nearest_others(rows[start : start + 64], rows, count, first=start) for start in range(0, 300, 64)]
    cosines, columns = (np.concatenate([block[place].numpy() for block in blocks]) for place in range(2))
    all_cosines = embeddings @ embeddings.T
    np.fill_diagonal(all_cosines, -2)
    expected = np.sort(all_cosines, axis=1)[:, ::-1][:, :count]
    assert np.allclose(cosines, expected, atol=1e-6)
    assert np.allclose(np.take_along_axis(all_cosines, columns, axis=1), cosines, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": 0.98}, "alike, but not the same"),
        ({"min_size": 9, "max_size": 4}, "min_size=9 must lie between 1 and max_size=4"),
        ({"valid_fraction": 1.0}, "valid_fraction must be 0.999 or less"),
    ],
)
def test_settings_that_cannot_be_met(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupSettings(**changes)
