"""The shot loop: what each shot is given, what it adds to the memory, how a film is resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storymem.film.folder import Film
from storymem.film.manifest import FilmError
from storymem.film.settings import parse_resume
from storymem.film.storyteller import Storyteller
from storymem.media.video import read_video
from storymem.memory import ComingShot, Keyframe, KeyframeSelector, MemoryBank, Relevant, SinkAndRecent
from storymem.scorers.aesthetic import AestheticScorer
from tests.stories import CLIP, FOUR_SHOTS, MODEL, TWO_SHOTS, content, plain_image, story, storyteller


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storyteller, Film]:
    """A film of four shots, and what has made it."""
    teller, folder = storyteller(), tmp_path_factory.mktemp("told")
    return teller, teller.tell(story(folder, FOUR_SHOTS), folder / "film")


@pytest.fixture
def finished(told: tuple[Storyteller, Film]) -> Path:
    return told[1].folder


def test_a_story_becomes_a_film(told: tuple[Storyteller, Film]) -> None:
    film = told[1]
    assert film.video is not None
    assert [shot.mode for shot in film.shots] == ["t2v", "mi2v", "m2v", "mi2v"]
    assert [shot.frames for shot in film.shots] == [9, 8, 9, 8]
    assert [shot.seed for shot in film.shots] == [0, 1, 99, 3]
    joined = read_video(film.video)
    parts = [read_video(film.folder / shot.file) for shot in film.shots]
    np.testing.assert_array_equal(joined, np.concatenate(parts))
    page = (film.folder / "storyboard.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert all((film.folder / source).is_file() for source in sources)
    shown = {f"keyframes/{id}.png" for shot in film.shots for id in (*shot.memory, *(k.id for k in shot.keyframes))}
    assert {*shown, "film.mp4", *(shot.file for shot in film.shots)} == set(sources)
    reread = Film.open(film.folder)
    assert reread.shots == film.shots
    assert reread.story == film.story
    assert reread.config == film.config


@pytest.mark.parametrize(("continuity", "given"), [("none", 0), ("mi2v", 1), ("mm2v", 5)])
def test_a_continued_shot_begins_with_the_end_of_the_one_before(tmp_path: Path, continuity: str, given: int) -> None:
    teller, loaded = storyteller(continuity), story(tmp_path, FOUR_SHOTS)
    film = teller.tell(loaded, tmp_path / "film")
    asked = teller.generator.requests
    assert [len(request.given) for request in asked] == [0, given, 0, given]
    if given:
        np.testing.assert_array_equal(asked[1].given, film.last_frames(0, given))
        assert film.shots[1].repeated == given
        assert len(read_video(film.folder / film.shots[1].file)) == MODEL.video.frames - given


def test_memory_is_what_the_shots_before_left(tmp_path: Path) -> None:
    teller = storyteller(recall=SinkAndRecent(capacity=3, sink=1))
    film = teller.tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    left = [tuple(keyframe.id for keyframe in shot.keyframes) for shot in film.shots]
    assert all(len(ids) == 2 for ids in left)
    assert film.shots[0].memory == ()
    assert film.shots[1].memory == left[0]
    assert film.shots[2].memory == (left[0][0], *left[1])
    assert film.shots[3].memory == (left[0][0], *left[2])
    assert [len(request.memory) for request in teller.generator.requests] == [0, 2, 3, 3]


def test_every_text_is_encoded_before_the_first_shot_and_every_keyframe_once(told: tuple[Storyteller, Film]) -> None:
    teller, film = told
    assert len(teller.generator.encoded_texts) == 4
    recalled = {id for shot in film.shots for id in shot.memory}
    assert teller.generator.encoded_keyframes == len(recalled)
    kept = MemoryBank.load(film.folder)
    assert {keyframe.id for keyframe in kept if keyframe.latent is not None} == recalled


def test_frames_are_embedded_once_in_batches_and_scored_lazily(tmp_path: Path) -> None:
    teller = storyteller()
    seen: list[int] = []
    inner = teller.embedder.embed_images
    teller.embedder.embed_images = lambda frames: (seen.append(len(frames)), inner(frames))[1]

    quality = CountingAesthetic.from_config(CLIP, threshold=-1000.0)
    film = replace(teller, quality=quality).tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    assert seen == [shot.frames for shot in film.shots]
    assert quality.calls == [1] * len(quality.calls)
    assert len(quality.calls) <= sum(shot.frames for shot in film.shots)
    assert all(keyframe.quality is not None for shot in film.shots for keyframe in shot.keyframes)


class CountingAesthetic(AestheticScorer):
    """The real scorer, which also records how many frames it is asked for at a time."""

    def score(self, frames: torch.Tensor) -> torch.Tensor:
        self.calls = [*getattr(self, "calls", []), len(frames)]
        return super().score(frames)


def test_frames_of_low_quality_do_not_become_keyframes(tmp_path: Path) -> None:
    strict = AestheticScorer.from_config(CLIP, threshold=1000.0)
    film = storyteller(quality=strict).tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    assert all(shot.keyframes == () and shot.memory == () for shot in film.shots)


def test_references_are_the_first_memory(tmp_path: Path) -> None:
    plain_image(tmp_path / "red.png", (255, 0, 0), size=(96, 32))
    plain_image(tmp_path / "green.png", (0, 255, 0))
    plain_image(tmp_path / "blue.png", (0, 0, 255))
    text = FOUR_SHOTS.replace(
        "scenes:",
        "characters:\n  - {name: Dog, references: [red.png, green.png]}\nscenes:",
        1,
    ).replace("seed: 99}", "seed: 99, references: [blue.png]}")
    teller = storyteller()
    film = teller.tell(story(tmp_path, text), tmp_path / "film")
    assert film.shots[0].mode == "m2v"  # first_shot=auto
    assert film.shots[0].memory == ("ref_dog_1", "ref_dog_2")
    assert film.shots[1].memory[:2] == ("ref_dog_1", "ref_dog_2")
    assert "ref_blue_1" not in film.shots[1].memory
    assert "ref_blue_1" in film.shots[2].memory
    assert "ref_blue_1" in film.shots[3].memory
    bank = MemoryBank.load(film.folder)
    assert bank["ref_dog_1"].image.shape == (32, 48, 3)
    assert bank["ref_dog_1"].character == "Dog"
    assert bank["ref_dog_1"].source == "red.png"
    assert (bank["ref_blue_1"].image == (0, 0, 255)).all()


def test_first_shot_by_text_has_networks_of_its_own_unless_the_model_has_none(
    told: tuple[Storyteller, Film], tmp_path: Path
) -> None:
    own, alone = told[1], replace(MODEL, has_text_to_video=False)
    shared = storyteller(model=alone).tell(story(tmp_path, TWO_SHOTS), tmp_path / "shared")
    assert own.shots[0].mode == shared.shots[0].mode == "t2v"
    assert (read_video(own.folder / own.shots[0].file) != read_video(shared.folder / shared.shots[0].file)).any()


def test_the_same_command_again_generates_nothing(film: Path) -> None:
    stamp = (film / "film.mp4").stat().st_mtime_ns
    teller = storyteller()
    after = teller.tell(story(film.parent, FOUR_SHOTS), film)
    assert teller.generator.requests == []
    assert teller.generator.encoded_texts == []
    assert after.video.stat().st_mtime_ns == stamp


def test_another_story_and_other_settings_are_refused_with_what_changed_and_what_to_type(
    film: Path, tmp_path: Path
) -> None:
    with pytest.raises(FilmError) as refused:
        storyteller().tell(story(tmp_path, FOUR_SHOTS.replace("overview:", "style: Oil\noverview:")), tmp_path / "film")
    assert str(refused.value).splitlines() == [
        f"{tmp_path}/film holds a film of another story: none of its shots is in this one:",
        "  style: nothing before, 'Oil' now",
        "add to the command:",
        "  resume=from_shot:1  to make the film of this story here",
        "  output=FOLDER  to make another film",
    ]
    other = FOUR_SHOTS.replace('{prompt: "', '{prompt: "Once: ') + "characters: [{name: Ada}]\n"
    with pytest.raises(FilmError) as refused:
        storyteller().tell(story(tmp_path, other), tmp_path / "film")
    assert str(refused.value).splitlines()[1:3] == [
        "  character Ada is new",
        "  shots 1, 2, 3, 4: prompt changed",
    ]
    with pytest.raises(FilmError) as refused:
        storyteller(seed=5).tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    assert str(refused.value).splitlines() == [
        f"{tmp_path}/film holds a film with other settings:",
        "  seed: 0 before, 5 now",
        "add to the command:",
        "  shot=N  to make a take of shot N with these settings",
        "  resume=from_shot:N  to regenerate shots N and later",
        "  output=FOLDER  to make another film",
        "  seed=0  to resume this film with its own settings",
    ]


def test_the_style_of_a_story_begins_every_prompt(tmp_path: Path) -> None:
    teller = storyteller("none")
    film = teller.tell(
        story(tmp_path, FOUR_SHOTS.replace("overview:", "style: Stop-motion\noverview:")), tmp_path / "a"
    )
    assert teller.generator.requests[2].prompt == "Stop-motion: A cat sits on a wall."
    assert teller.generator.encoded_texts[2] == "Stop-motion: A cat sits on a wall."
    assert film.shots[2].prompt == "A cat sits on a wall."


@dataclass(frozen=True)
class MostAlike:
    """A recall policy of a user: the keyframes most like the prompt."""

    capacity: int = 1

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        alike = sorted(keyframes, key=lambda k: float(k.embedding @ shot.text_embedding), reverse=True)
        chosen = {keyframe.id for keyframe in alike[: self.capacity]}
        return [keyframe for keyframe in keyframes if keyframe.id in chosen]


def test_a_policy_of_the_users_own_knows_the_coming_shot(tmp_path: Path) -> None:
    teller = storyteller(recall=MostAlike())
    film = teller.tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    bank = {keyframe.id: keyframe.embedding for keyframe in MemoryBank.load(film.folder)}
    text = teller.embedder.embed_texts(["A cat sits on a wall."])[0].numpy()
    before = [keyframe.id for shot in film.shots[:2] for keyframe in shot.keyframes]
    assert film.shots[2].memory == (max(before, key=lambda id: float(bank[id] @ text)),)


def test_from_shot_regenerates_later_shots_without_stale_memory(film: Path, tmp_path: Path) -> None:
    """The film equals one that was made with the new story from the beginning."""
    changed, again = story(tmp_path, FOUR_SHOTS.replace("on a wall", "on a roof")), storyteller()
    again.tell(changed, film, resume="from_shot:3")
    assert len(again.generator.requests) == 2
    afresh = storyteller().tell(changed, tmp_path / "afresh")
    assert content(film) == content(afresh.folder)


def test_from_shot_with_another_seed_gives_another_shot(film: Path) -> None:
    before = [read_video(film / shot.file) for shot in Film.open(film).shots]
    made = storyteller(seed=50).tell(story(film.parent, FOUR_SHOTS), film, resume="from_shot:4")
    after = [read_video(film / shot.file) for shot in made.shots]
    assert [(a == b).all() for a, b in zip(before, after, strict=True)] == [True, True, True, False]
    assert made.shots[3].seed == 53
    assert made.shots[2].config_hash != made.shots[3].config_hash == made.config_hash


def test_from_shot_refuses_what_it_cannot_keep(film: Path, tmp_path: Path) -> None:
    loaded = story(tmp_path, FOUR_SHOTS)
    with pytest.raises(FilmError, match="holds no film yet"):
        storyteller().tell(loaded, tmp_path / "nothing", resume="from_shot:2")
    larger = replace(MODEL, video=replace(MODEL.video, width=64))
    with pytest.raises(FilmError, match="from_shot:1"):
        storyteller(model=larger).tell(loaded, film, resume="from_shot:3")
    again = storyteller(model=larger).tell(loaded, film, resume="from_shot:1")
    assert read_video(again.video).shape[2] == 64


@pytest.mark.parametrize("resume", ["from_shot:0", "from_shot:5", "from_shot:x", "never", "from_shot"])
def test_resume_is_checked(resume: str) -> None:
    with pytest.raises(ValueError, match="write auto, or from_shot:N with N from 1 to 4"):
        parse_resume(resume, 4)


def test_shots_too_short_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = FOUR_SHOTS.replace("cut: false, negative", "cut: false, frames: 5, negative")
    with pytest.raises(ValueError, match=r"shot 4 \(scene 2, shot 2\) has 5 frames.*mm2v.*at least 9"):
        storyteller("mm2v").tell(story(tmp_path, text), tmp_path / "film")
    assert not (tmp_path / "film").exists()
    assert storyteller("mi2v").tell(story(tmp_path, text), tmp_path / "ok").shots[3].frames == 4


def test_selection_of_a_static_shot_keeps_one_keyframe(tmp_path: Path) -> None:
    """With the published thresholds an untrained model's shots show nothing new after the first."""
    film = storyteller(selector=KeyframeSelector()).tell(story(tmp_path, FOUR_SHOTS), tmp_path / "film")
    assert [len(shot.keyframes) for shot in film.shots] == [1, 0, 0, 0]
    assert all(shot.memory == ("shot01_frame001",) for shot in film.shots[1:])


def test_frames_of_a_character_alone_are_keyframes_of_that_character(tmp_path: Path) -> None:
    loaded = story(
        tmp_path,
        """\
title: Two
overview: They meet.
characters: [{name: Ada}, {name: Bo}]
scenes:
  - shots:
      - {prompt: "Ada waits.", characters: [Ada]}
      - {prompt: "Ada and Bo meet.", characters: [Ada, Bo]}
      - {prompt: "Bo waits.", characters: [Bo]}
""",
    )
    film = storyteller().tell(loaded, tmp_path / "film")
    entries = json.loads((film.folder / "memory.json").read_text())["keyframes"]
    shown = {(entry["shot"], entry["character"]) for entry in entries}
    assert shown == {(1, "Ada"), (2, None), (3, "Bo")}
    teller = storyteller(recall=Relevant(capacity=10, sink=0, relevant=0))
    again = teller.tell(loaded, tmp_path / "by_character")
    assert {id[:6] for id in again.shots[2].memory} == {"shot02"}, "nothing of Ada alone"
