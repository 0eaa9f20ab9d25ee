"""The columns of the benchmark, against a plain reading of their definitions, frame by frame and pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Dinov2Config, Dinov2Model

from storymem.evaluation.metric import Metric, Scores, weights_sha256
from storymem.evaluation.metrics import AestheticQuality, Appearance, ViclipScores
from storymem.scorers.clip import ClipScorer
from storymem.scorers.dinov2 import Dinov2Embedder
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer
from storymem.story import Story, load_story
from storymem.weights import MissingWeights
from tests.evaluation import small
from tests.scorers import tiny

LENGTHS = (9, 17, 12)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path)[0]


@cache
def viclip() -> ViclipScorer:
    return tiny.viclip()


@cache
def clip() -> ClipScorer:
    return tiny.clip()


def shots() -> list[np.ndarray]:
    return [small.frames(number, length) for number, length in enumerate(LENGTHS)]


def scores(metric: Metric, story: Story, videos: Sequence[np.ndarray | None]) -> Scores:
    film = small.film_info(story, [None if video is None else len(video) for video in videos])
    seen = [
        None if video is None else metric.measure_shot(shot, video, film)
        for shot, video in zip(story.shots, videos, strict=True)
    ]
    return metric.compute(seen, film)


def cosine(a: Tensor, b: Tensor) -> float:
    return cosine_similarity(a.double(), b.double(), dim=-1).item()


def clip_of(scorer: ViclipScorer, frames: np.ndarray) -> Tensor:
    """The embedding of a whole clip, from which the scorer chooses its frames itself."""
    return scorer.embed_clips(as_images(frames)[None])[0]


def test_aesthetic_quality_is_the_mean_over_frames_then_shots(story: Story) -> None:
    scorer = tiny.aesthetic(batch_size=4)
    per_shot = [
        math.fsum(scorer.score(as_images(frame[None])).item() for frame in video) / len(video) / 10 for video in shots()
    ]
    found = scores(AestheticQuality(scorer), story, shots())
    assert found.shots["aesthetic_quality"] == pytest.approx(per_shot, abs=1e-6)
    assert found.columns["aesthetic_quality"] == pytest.approx(sum(per_shot) / 3, abs=1e-6)


def test_the_four_viclip_columns(story: Story) -> None:
    scorer = viclip()
    found = scores(ViclipScores(scorer, top_pairs=2), story, shots())
    texts = {text: scorer.embed_texts([text])[0] for text in (story.overview, *(s.prompt for s in story.shots))}
    clips = [clip_of(scorer, video) for video in shots()]
    prompts = [texts[shot.prompt] for shot in story.shots]
    following = [cosine(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    pairs = {(i, j): cosine(clips[i], clips[j]) for i, j in combinations(range(3), 2)}
    alike = sorted(pairs, key=lambda pair: -cosine(prompts[pair[0]], prompts[pair[1]]))[:2]
    film = clip_of(scorer, np.concatenate(shots()))
    expected = {
        "prompt_following_global": cosine(film, texts[story.overview]),
        "prompt_following_shot": sum(following) / 3,
        "consistency_overall": sum(pairs.values()) / 3,
        "consistency_top10": sum(pairs[pair] for pair in alike) / 2,
        "consistency_same_character": sum(pairs.values()) / 3,  # Ada is in every shot
    }
    assert found.columns == pytest.approx(expected, abs=1e-6)
    assert {(i, j) for i, j, _ in found.pairs["consistency_top10"]} == set(alike)
    assert [value for *_, value in found.pairs["consistency_overall"]] == pytest.approx(list(pairs.values()), abs=1e-6)
    assert found.shots["prompt_following_shot"] == pytest.approx(following, abs=1e-6)


def test_the_other_rule_takes_the_pairs_of_most_similar_shots(story: Story) -> None:
    found = scores(ViclipScores(viclip(), top_pairs=2, top_rule="shots"), story, shots())
    values = sorted((value for *_, value in found.pairs["consistency_overall"] if value is not None), reverse=True)
    assert found.columns["consistency_top10"] == pytest.approx(sum(values[:2]) / 2)
    assert found.columns["consistency_top10"] >= found.columns["consistency_overall"]  # type: ignore[operator]


def test_all_pairs_count_if_there_are_fewer_than_ten(story: Story) -> None:
    found = scores(ViclipScores(viclip()), story, shots())
    assert found.columns["consistency_top10"] == pytest.approx(found.columns["consistency_overall"])


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(small.TWO_SHOTS.replace("A dog runs by.", "A dog " + "runs and " * 20 + "rests."))
    found = scores(ViclipScores(viclip()), load_story(tmp_path / "s.yaml"), [small.frames(0), small.frames(1)])
    assert (found.details["texts"], found.details["texts_truncated"]) == (3, 1)


def test_identity_and_steadiness_are_means_over_pairs_of_frames(story: Story) -> None:
    embedder = clip()
    found = scores(Appearance(embedder, frames=3), story, shots())
    # The middles of three equal parts of 9, 17 and 12 frames.
    chosen_frames = [
        video[list(chosen)] for video, chosen in zip(shots(), [(1, 4, 7), (2, 7, 13), (1, 5, 9)], strict=True)
    ]
    rows = [[embedder.embed_images(as_images(frame[None]))[0] for frame in video] for video in chosen_frames]
    steady = [np.mean([cosine(a, b) for a, b in combinations(video, 2)]) for video in rows]
    ada = [np.mean([cosine(a, b) for a in rows[i] for b in rows[j]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.shots["intra_shot_consistency"] == pytest.approx(steady, abs=1e-6)
    assert found.columns["identity_consistency"] == pytest.approx(np.mean(ada), abs=1e-6)
    assert list(found.details["characters"]) == ["Ada"], "Ben is in one shot only"
    assert [value for *_, value in found.pairs["identity_consistency"]] == pytest.approx(ada, abs=1e-6)


def test_a_still_shot_is_wholly_steady(story: Story) -> None:
    still = [np.repeat(small.frames(0)[:1], 9, axis=0)] * 3
    found = scores(Appearance(clip(), frames=4), story, still)
    assert found.columns == pytest.approx({"identity_consistency": 1.0, "intra_shot_consistency": 1.0}, abs=1e-6)


@pytest.mark.parametrize("name", ["aesthetic", "viclip", "identity"])
def test_the_batch_size_does_not_matter(name: str, story: Story) -> None:
    one, many = (scores(small.metrics(size)[name], story, shots()) for size in (1, 64))
    assert one.columns == pytest.approx(many.columns, abs=1e-6)
    for column, pairs in one.pairs.items():
        assert [value for *_, value in pairs] == pytest.approx([value for *_, value in many.pairs[column]], abs=1e-6)


def test_shots_of_several_sizes(story: Story) -> None:
    videos = [*shots()[:2], small.frames(7, 9)[:, :, :32]]
    found = scores(ViclipScores(viclip()), story, videos)
    alone = scores(ViclipScores(viclip()), story, shots())
    assert found.pairs["consistency_overall"][0] == pytest.approx(alone.pairs["consistency_overall"][0], abs=1e-6)
    assert found.columns["prompt_following_global"] is None
    assert "differ in size" in found.reasons["prompt_following_global"]


@pytest.mark.parametrize("name", ["aesthetic", "viclip", "identity"])
def test_a_missing_shot_is_never_averaged_away(name: str, story: Story) -> None:
    metric = small.metrics()[name]
    whole, holed = scores(metric, story, shots()), scores(metric, story, [shots()[0], None, shots()[2]])
    assert set(holed.columns.values()) <= {None, holed.columns.get("consistency_top10")}
    for column in holed.columns:
        if holed.columns[column] is None:
            assert holed.reasons[column] == "missing: shot 2 (scene 1, shot 2)"
    for column, values in holed.shots.items():
        assert values[1] is None
        assert [values[0], values[2]] == pytest.approx([whole.shots[column][0], whole.shots[column][2]], abs=1e-6)
    for pairs in holed.pairs.values():
        assert all((value is None) == (1 in (i, j)) for i, j, value in pairs)


def test_what_a_story_does_not_have_is_not_missing(tmp_path: Path) -> None:
    text = 'title: T\noverview: O.\nscenes: [{shots: [{prompt: "A dog."}]}]\n'
    (tmp_path / "one.yaml").write_text(text)
    story = load_story(tmp_path / "one.yaml")
    identity = scores(Appearance(clip()), story, [small.frames(0)])
    assert identity.undefined == ("identity_consistency",)
    assert identity.reasons == {"identity_consistency": "no character is listed in two shots"}
    following = scores(ViclipScores(viclip()), story, [small.frames(0)])
    assert set(following.undefined) == {f"consistency_{of}" for of in ("overall", "top10", "same_character")}
    assert following.columns["prompt_following_shot"] is not None
    single = scores(Appearance(clip()), story, [small.frames(0, 1)])
    assert single.reasons["intra_shot_consistency"] == "a shot has a single frame"


def test_settings_name_the_rules_and_the_weights() -> None:
    settings = {name: metric.settings() for name, metric in small.metrics().items()}
    assert settings["viclip"]["top_rule"] == "prompts"
    assert settings["viclip"]["frames"] == "8, as in VBench"
    assert len({found["weights_sha256"] for found in settings.values()}) == 3
    assert ViclipScores(tiny.viclip(seed=1)).settings() != ViclipScores(viclip()).settings()
    scorer = tiny.aesthetic()
    before = AestheticQuality(scorer).settings()
    scorer.head.weight.data[0, 0] += 1  # type: ignore[union-attr, operator, index]
    assert AestheticQuality(scorer).settings() != before, "the head's weights count too"


def test_weights_are_hashed_by_name_shape_and_value() -> None:
    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    two.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(two)
    assert weights_sha256(one) != weights_sha256(one.half())
    assert weights_sha256(two) != weights_sha256(torch.nn.Sequential(two))


def test_faulty_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="write prompts or shots"):
        ViclipScores(viclip(), top_rule="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        ViclipScores(viclip(), top_pairs=0)
    with pytest.raises(ValueError, match="at least 2"):
        Appearance(clip(), frames=1)


def test_dinov2_can_take_clips_place(tmp_path: Path, story: Story) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    network = Dinov2Model(Dinov2Config(**sizes)).eval()
    network.save_pretrained(tmp_path / "dino")
    embedder = Dinov2Embedder.from_pretrained(str(tmp_path / "dino"), resolution=28)
    embedded = embedder.embed_images(as_images(shots()[0]))
    assert embedded.norm(dim=-1).tolist() == pytest.approx([1.0] * 9, abs=1e-5)
    found = scores(Appearance(embedder), story, shots())
    assert 0 < found.columns["identity_consistency"] < 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        Dinov2Embedder(network, resolution=30)
    with pytest.raises(MissingWeights, match="DINOv2"):
        Dinov2Embedder.from_pretrained(str(tmp_path / "nowhere"))
