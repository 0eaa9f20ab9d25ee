"""Batches: what a sample may be made of, and that it follows from seed and step alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from storymem.training.batches import train_batches
from storymem.training.objectives.memory import MemorySamples
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.training.run_settings import BatchSettings
from tests.training.tiny import MemoryLatents, TinyClip, latents, source

EIGHT = 8


def planner(data: MemoryLatents | None = None, **changes: Any) -> MemorySamples:
    changes = {"max_memory": 3, "text_dropout": 0.0} | changes
    batch = {name: changes.pop(name) for name in list(changes) if name in BatchSettings.__dataclass_fields__}
    return MemorySamples(
        MemoryObjectiveSettings(), source(data or latents(groups=3), batch=BatchSettings(**batch), **changes)
    )


def mixed() -> MemoryLatents:
    """A large group, a pair, a clip alone, and a group of two sizes."""
    clips = [TinyClip(f"a{k}", 0, "train", (9, 32, 48), 2) for k in range(4)]
    clips += [TinyClip(f"b{k}", 1, "train", (9, 32, 48), 1) for k in range(2)]
    clips += [TinyClip("alone", 2, "train", (9, 32, 48), 3)]
    clips += [TinyClip("wide", 3, "train", (9, 32, 48), 1), TinyClip("tall", 3, "train", (9, 48, 32), 1)]
    clips += [TinyClip("long", 3, "train", (17, 32, 48), 1)]
    return MemoryLatents(tuple(clips))


def test_memory_is_of_other_clips_of_the_group_and_of_the_same_size() -> None:
    data = mixed()
    plans = planner(data)
    seen = set()
    for step in range(200):
        samples = plans.plan(step)
        assert len({(data.clips[s.clip].bucket, len(s.memory)) for s in samples}) == 1
        for sample in samples:
            target = data.clips[sample.clip]
            seen.add(target.id)
            assert len(set(sample.memory)) == len(sample.memory)
            for index, keyframe in sample.memory:
                other = data.clips[index]
                assert other.id != target.id
                assert other.group == target.group
                assert other.bucket[1:] == target.bucket[1:]
                assert 0 <= keyframe < other.keyframes
    assert seen == set(data.by_id)


def test_small_groups_give_the_memory_they_have() -> None:
    data = mixed()
    plans = planner(data, count=1)
    most: Counter[str] = Counter()
    for step in range(400):
        (sample,) = plans.plan(step)
        name = data.clips[sample.clip].id
        most[name] = max(most[name], len(sample.memory))
    assert most["a0"] == 3
    assert most["b0"] == 1
    assert most["alone"] == most["tall"] == 0
    assert most["wide"] == most["long"] == 1  # of the same height and width, whatever their length


def test_memory_is_random_in_number_and_order() -> None:
    plans = planner()
    counts = Counter(len(plans.plan(step)[0].memory) for step in range(400))
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 60
    orders = {sample.memory for step in range(200) for sample in plans.plan(step) if len(sample.memory) == 2}
    assert any((b, a) in orders for a, b in orders)


def test_samples_follow_from_seed_and_step_alone() -> None:
    ahead, again, other = planner(), planner(), planner(seed=1)
    later = ahead.plan(7)
    assert [again.plan(step) for step in range(8)][7] == later
    assert other.plan(7) != later
    assert planner(latents(groups=3), split="valid", max_memory=2).plan(7) != later


def test_text_and_given_frames_are_left_out_as_often_as_set() -> None:
    plans = planner(conditioning="mm2v", given_probability=0.5, text_dropout=0.1)
    samples = [sample for step in range(250) for sample in plans.plan(step)]
    assert sum(s.given == 5 for s in samples) / len(samples) == pytest.approx(0.5, abs=0.04)
    assert sum(s.drop_text for s in samples) / len(samples) == pytest.approx(0.1, abs=0.03)
    assert {s.given for s in samples} == {0, 5}


def test_processes_share_a_step() -> None:
    plans = planner()

    def ids(rank: int, world: int, workers: int = 0) -> list[tuple[str, ...]]:
        batches = train_batches(plans, size=2, rank=rank, world=world, workers=workers)
        return [batch.ids for batch in islice(batches, EIGHT)]

    alone = ids(0, 1)
    first, second = ids(0, 2), ids(1, 2)
    # Four batches of two a step for one process; two of them for each of two.
    assert [*first[:2], *second[:2], *first[2:4], *second[2:4]] == alone


@pytest.mark.parametrize("start", [0, 3])
def test_workers_change_nothing(start: int) -> None:
    plans = planner(conditioning="mi2v", given_probability=0.5)
    here = train_batches(plans, size=4, start=start)
    there = train_batches(plans, size=4, start=start, workers=1)
    for mine, theirs in islice(zip(here, there, strict=False), 4):
        assert mine.ids == theirs.ids
        for name in ("x0", "noise", "u", "condition", "mask", "text"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_a_sample_holds_its_memory_its_condition_and_its_text() -> None:
    data = latents()
    samples = planner(data, count=1, max_memory=2)
    (plan,) = samples.plan(0)
    plan = replace(plan, memory=((1, 1), (2, 0)), clip=0, given=5, drop_text=False)
    sample = samples.read(plan)
    remembered = torch.stack([data.keyframes(1)[1, :, 0], data.keyframes(2)[0, :, 0]], dim=1)
    assert torch.equal(sample.x0[0], torch.cat([remembered, data.video(0)], dim=1))
    assert sample.condition.shape == (1, 20, 2 + 3, 4, 6)
    mask, conditions = sample.condition[0, :4], sample.condition[0, 4:]
    # Memory and the two latent frames that five motion frames fill are to be believed, the last is not.
    assert mask.amax(dim=(0, 2, 3)).tolist() == mask.amin(dim=(0, 2, 3)).tolist() == [1, 1, 1, 1, 0]
    assert torch.equal(conditions, torch.cat([remembered, data.given(0, 5)], dim=1))
    assert torch.equal(sample.mask[0], data.mask(0))
    assert torch.equal(sample.text[0], data.text(0))
    assert torch.equal(samples.read(replace(plan, drop_text=True)).text[0], data.empty_text())
    assert sample.memory_frames == 2


def test_too_much_memory_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"max_memory=7.*more than 4 keyframes.*max_memory=4"):
        planner(max_memory=7)


def test_groups_of_one_are_refused_if_there_shall_be_memory() -> None:
    alone = latents(groups=4, size=1)
    with pytest.raises(ValueError, match="no clip has more than 0 keyframes in the other clips of its group"):
        planner(alone)
    assert planner(alone, max_memory=0).plan(0)[0].memory == ()


def test_no_held_out_clips() -> None:
    with pytest.raises(ValueError, match=r"no valid clips.*validation.every=0"):
        planner(latents(valid=0), split="valid")
