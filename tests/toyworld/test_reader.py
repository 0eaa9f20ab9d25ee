"""Reading attributes back from pixels: right on clean frames, unknown on damaged ones."""

from __future__ import annotations

import numpy as np
import pytest

from toyworld.attributes import LOOK_PARTS, PLACE_PARTS, UNKNOWN, Look, Seen
from toyworld.damage import blur
from toyworld.reader import read_attributes, read_shot, vote
from toyworld.world import HELD_OUT, story


def frames_and_truths(count: int, offset: int = 0) -> list[tuple[np.ndarray, Seen]]:
    rng = np.random.default_rng(offset)
    chosen = []
    for i in range(count):
        shot = story(HELD_OUT + offset + i).shots[i % 8]
        at = int(rng.integers(len(shot.frames)))
        chosen.append((shot.frames[at], shot.seen(at)))
    return chosen


def compare(truth: Seen, read: Seen) -> list[tuple[str, str]]:
    """Pairs of true and read values, of everything that can be seen."""
    pairs = [(getattr(truth, part), getattr(read, part)) for part in PLACE_PARTS]
    nobody = Look(**dict.fromkeys(LOOK_PARTS, UNKNOWN))
    looks = list(read.looks) if len(read.looks) == len(truth.looks) else [nobody] * len(truth.looks)
    for true_look, look in zip(truth.looks, looks, strict=True):
        pairs += [(getattr(true_look, part), getattr(look, part)) for part in LOOK_PARTS]
    return [(true, value) for true, value in pairs if true != UNKNOWN]


def test_clean_frames_are_read_right() -> None:
    pairs = [pair for frame, truth in frames_and_truths(20) for pair in compare(truth, read_attributes(frame))]
    assert np.mean([true == value for true, value in pairs]) >= 0.99


@pytest.mark.slow
def test_many_clean_frames_are_read_right() -> None:
    drawn = frames_and_truths(200, offset=1000)
    pairs = [pair for frame, truth in drawn for pair in compare(truth, read_attributes(frame))]
    assert np.mean([true == value for true, value in pairs]) >= 0.99


def test_a_badly_blurred_frame_is_unknown_rather_than_wrong() -> None:
    pairs = []
    for frame, truth in frames_and_truths(4, offset=200):
        soft = blur(frame.astype(np.float32), 4.0).astype(np.uint8)
        pairs += compare(truth, read_attributes(soft))
    wrong = np.mean([value not in (true, UNKNOWN) for true, value in pairs])
    unknown = np.mean([value == UNKNOWN for _, value in pairs])
    assert wrong < 0.12
    assert unknown > 0.1


def test_pure_noise_shows_no_place() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    read = read_attributes(noise)
    assert (read.place, read.framing, read.landmark, read.flag) == (UNKNOWN,) * 4


def test_a_grey_frame_shows_nothing() -> None:
    read = read_attributes(np.full((64, 96, 3), 128, dtype=np.uint8))
    assert (read.place, read.time, read.framing) == (UNKNOWN,) * 3
    assert read.looks == ()


def test_slight_noise_does_no_harm() -> None:
    rng = np.random.default_rng(1)
    pairs = []
    for frame, truth in frames_and_truths(6, offset=300):
        grainy = np.clip(frame + rng.normal(0, 4, frame.shape), 0, 255).astype(np.uint8)
        pairs += compare(truth, read_attributes(grainy))
    assert np.mean([true == value for true, value in pairs]) > 0.93


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[64, 96, 3\]"):
        read_attributes(np.zeros((64, 64, 3), dtype=np.uint8))


def test_whole_shots_are_read_with_their_action() -> None:
    shots = [story(HELD_OUT + 500 + i).shots[i % 8] for i in range(3)]
    assert [read_shot(shot.frames).action for shot in shots] == [shot.action for shot in shots]


def test_a_vote_ignores_what_is_unknown() -> None:
    assert vote(["red", UNKNOWN, UNKNOWN, "red", "blue"]) == "red"
    assert vote([UNKNOWN]) == UNKNOWN
