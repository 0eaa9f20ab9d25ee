"""The drawn world: deterministic, continuous, and silent about looks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from toyworld.attributes import (
    ACTIONS,
    BODY_COLOURS,
    EYES,
    FRAMES,
    HATS,
    HEIGHT,
    LOOKS,
    PLACES,
    PROP_COLOURS,
    SHAPES,
    TIMES,
    UNKNOWN,
    WIDTH,
)
from toyworld.words import ACTION_WORDS, EYE_WORDS, FRAMING_WORDS, HAT_WORDS, PLACE_WORDS, TIME_WORDS
from toyworld.world import HELD_OUT, ToyShot, people_mask, render, render_layers, story

SEEDS = range(HELD_OUT, HELD_OUT + 12)


def shots(seeds: range = SEEDS) -> list[ToyShot]:
    return [shot for seed in seeds for shot in story(seed).shots]


def test_the_same_seed_gives_the_same_story_and_another_seed_another() -> None:
    one, two, other = story(5), story(5), story(6)
    assert [shot.prompt for shot in one.shots] == [shot.prompt for shot in two.shots]
    assert one.cast == two.cast
    for a, b in zip(one.shots, two.shots, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
    assert [shot.prompt for shot in one.shots] != [shot.prompt for shot in other.shots]


def test_a_shot_is_seventeen_frames_of_pixels() -> None:
    frames = story(0).shots[0].frames
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert frames.dtype == np.uint8


@pytest.mark.parametrize("count", [1, 2, 8, 12])
def test_a_story_has_as_many_shots_as_asked_for(count: int) -> None:
    assert len(story(3, shots=count).shots) == count


def test_there_are_more_than_four_hundred_looks_and_all_are_drawn_differently() -> None:
    assert len(LOOKS) == len(set(LOOKS)) > 400
    shot = next(s for s in shots() if len(s.cast) == 1 and s.framing == "wide")
    pictures = {
        render(replace(shot, cast=(replace(shot.cast[0], look=look),)), slice(0, 1)).tobytes() for look in LOOKS
    }
    assert len(pictures) == len(LOOKS)


def test_a_shot_without_a_cut_begins_with_the_last_frame_of_the_one_before() -> None:
    joints = 0
    for seed in SEEDS:
        told = story(seed).shots
        assert told[0].cut
        for before, after in pairwise(told):
            if not after.cut:
                joints += 1
                np.testing.assert_array_equal(render(before, slice(16, 17)), render(after, slice(0, 1)))
                assert (before.place, before.time, before.framing) == (after.place, after.time, after.framing)
    assert joints > 5


def test_a_place_keeps_its_landmark_and_a_character_its_look_through_a_story() -> None:
    for seed in SEEDS:
        told = story(seed)
        for name in {character.name for character in told.cast}:
            assert len({c.look for shot in told.shots for c in shot.cast if c.name == name}) <= 1
        for place in PLACES:
            assert len({shot.scenery for shot in told.shots if shot.place == place}) <= 1


def test_every_action_place_and_time_occurs() -> None:
    drawn = shots(range(60))
    assert {shot.action for shot in drawn} == set(ACTIONS)
    assert {shot.place for shot in drawn} == set(PLACES)
    assert {shot.time for shot in drawn} == set(TIMES)


def test_prompts_say_names_place_time_framing_and_action() -> None:
    for shot in shots():
        text = shot.prompt.lower()
        assert all(character.name.lower() in text for character in shot.cast)
        assert any(words in text for words in PLACE_WORDS[shot.place])
        assert any(words in text for words in TIME_WORDS[shot.time])
        assert any(words.lower() in text for words in FRAMING_WORDS[shot.framing])
        if len(shot.cast) == 1:
            assert any(words in text for words in ACTION_WORDS[shot.action])


def test_prompts_say_nothing_about_looks_unless_asked() -> None:
    looks = {*BODY_COLOURS, *PROP_COLOURS, *SHAPES, *HAT_WORDS.values(), *EYE_WORDS.values(), "creature", "flag"}
    for seed in SEEDS:
        for plain, described in zip(story(seed).shots, story(seed, looks=True).shots, strict=True):
            assert not any(f" {word}" in plain.prompt for word in looks)
            assert described.prompt.startswith(plain.prompt)
            for character in described.cast:
                assert f" {character.look.colour} " in described.prompt
                assert HAT_WORDS[character.look.hat] in described.prompt


def test_a_story_asked_for_looks_is_the_same_story() -> None:
    for plain, described in zip(story(9).shots, story(9, looks=True).shots, strict=True):
        assert (plain.action, plain.pan, plain.cut) == (described.action, described.pan, described.cut)
        np.testing.assert_array_equal(plain.frames, described.frames)


def test_part_of_a_shot_is_drawn_as_in_the_whole() -> None:
    for shot in shots(range(2)):
        np.testing.assert_array_equal(render(shot, slice(6, 9)), shot.frames[6:9])


def test_the_backdrop_is_the_shot_without_its_people() -> None:
    shot = next(s for s in shots() if s.framing == "wide" and len(s.cast) == 1)
    frames, backdrop = render_layers(shot, slice(0, 3))
    changed = (frames != backdrop).any(axis=(0, 3))
    np.testing.assert_array_equal(frames, shot.frames[:3])
    assert 0.02 < changed.mean() < 0.35


def test_the_mask_of_people_holds_what_they_change_and_not_the_place() -> None:
    for shot in shots(range(12)):
        frames, backdrop = render_layers(shot, slice(None))
        mask, change = people_mask(frames, backdrop), np.abs(frames.astype(int) - backdrop).max(axis=-1)
        assert mask.any(axis=(1, 2)).all()
        assert change[~mask].max() < 8 <= change[mask].max()


def test_people_move_as_the_action_says() -> None:
    for shot in shots(range(40)):
        pose = shot.poses[0]
        if shot.action == "walks right":
            assert pose.x[-1] > pose.x[0] + 6
        if shot.action == "walks left":
            assert pose.x[-1] < pose.x[0] - 6
        if shot.action == "jumps":
            assert pose.lift.max() > 5
        if shot.action == "grows":
            assert pose.size[-1] > 1.5 * pose.size[0]
        if shot.action == "turns":
            assert pose.facing[0] * pose.facing[-1] == pytest.approx(-1)
        if shot.action == "meets":
            assert shot.poses[1].x[-1] - pose.x[-1] < shot.poses[1].x[0] - pose.x[0] - 10


def test_colours_pass_softly_from_one_to_the_next() -> None:
    """Anti-aliasing: along a row across a character there are pixels between body and backdrop."""
    shot = next(s for s in shots() if s.framing == "close" and s.time == "noon" and len(s.cast) == 1)
    frames, backdrop = render_layers(shot, slice(0, 1))
    share = np.abs(frames.astype(int) - backdrop).max(axis=-1)[0]
    assert ((share > 8) & (share < 0.5 * share.max())).sum() > 50


def test_what_lies_outside_the_picture_is_unknown() -> None:
    shot = next(s for s in shots() if s.framing == "close")
    far = replace(shot, camera=shot.camera * 0 + (60.0 if shot.scenery.side == "left" else -60.0))
    assert far.seen(0).landmark == UNKNOWN
    assert far.seen(0).place == shot.place


def test_looks_are_listed_from_left_to_right() -> None:
    shot = next(s for s in shots(range(40)) if s.action == "meets")
    order = sorted(range(2), key=lambda i: shot.poses[i].x[0])
    assert shot.seen(0).looks == tuple(shot.cast[i].look for i in order)


def test_every_hat_and_every_pair_of_eyes_has_words() -> None:
    assert set(HAT_WORDS) == set(HATS)
    assert set(EYE_WORDS) == set(EYES)
