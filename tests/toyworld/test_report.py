"""How right answers are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.composing import composed
from toyworld.attributes import UNKNOWN
from toyworld.build import WEIGHTS
from toyworld.damage import DAMAGES
from toyworld.report import FILTER, GUIDANCE, NEGATIVE_SEES_MEMORY, agreement, held_out_shots, measure, shares


def test_what_is_read_as_it_is_agrees() -> None:
    seen = held_out_shots(1)[0].seen(3)
    answers = agreement(seen, seen)
    assert all(right for _, right in answers)
    assert {"place", "shape", "eyes"} <= {name for name, _ in answers}


def test_unknown_is_no_right_answer_and_no_question() -> None:
    seen = held_out_shots(1)[0].seen(3)
    assert ("place", False) in agreement(seen, replace(seen, place=UNKNOWN))
    assert "place" not in dict(agreement(replace(seen, place=UNKNOWN), seen))


def test_missed_people_cost_all_their_looks() -> None:
    seen = held_out_shots(1)[0].seen(3)
    answers = agreement(seen, replace(seen, looks=()))
    assert [right for name, right in answers if name == "hat"] == [False] * len(seen.looks)


def test_shares_are_counted_part_by_part() -> None:
    assert shares([("hat", True), ("hat", False), ("place", True)]) == {"hat": pytest.approx(0.5), "place": 1.0}


def test_prompts_with_looks_belong_to_the_same_shots() -> None:
    plain, described = held_out_shots(3), held_out_shots(3, looks=True)
    for one, two in zip(plain, described, strict=True):
        assert two.prompt.startswith(one.prompt)
        assert one.seen(0) == two.seen(0)


def test_what_is_measured_is_what_the_embedded_model_does() -> None:
    config = composed("story=story.yaml")
    assert (config["sampler"]["guidance"], config["sampler"]["negative_sees_memory"]) == (
        GUIDANCE,
        NEGATIVE_SEES_MEMORY,
    )
    assert config["scorer"]["quality"]["threshold"] == FILTER


def test_the_filter_keeps_more_of_what_is_made_than_of_what_is_damaged() -> None:
    (found,) = measure(WEIGHTS, count=8, steps=6, parts=["filter"]).values()
    assert found["frames"] == 2 * 3
    assert found["by_damage"].keys() == set(DAMAGES)
    assert found["refused_of_damaged"] == pytest.approx(sum(found["by_damage"].values()) / len(DAMAGES))
    assert found["kept"] > 1 - found["refused_of_damaged"]
