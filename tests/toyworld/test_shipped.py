"""The models that come with the package, and how their figures are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from benchmarks.toy import (
    FILTER,
    GUIDANCE,
    NEGATIVE_SEES_MEMORY,
    STEPS,
    Report,
    agreement,
    chance_of_look,
    held_out_shots,
    interval,
    memory_of,
    shares,
)
from storymem.scorers.clip import VOCABULARY_FILE, ClipTokenizer
from storymem.wan.loading import load_pipeline
from storymem.wan.settings import RuntimeSettings
from tests.composing import composed, generate_settings
from toyworld import WEIGHTS
from toyworld.attributes import UNKNOWN
from toyworld.base import MEMORY, SINK
from toyworld.contrast import write_vocabulary
from toyworld.damage import DAMAGES
from toyworld.world import HELD_OUT, story


def test_the_default_model_takes_part_of_a_shot_from_memory() -> None:
    settings = generate_settings()
    pipe = load_pipeline(settings.model, runtime=RuntimeSettings(device="cpu"), sampler=settings.sampler)
    pipe.set_progress_bar_config(disable=True)

    def latents(*memory: tuple[int, int, int]) -> torch.Tensor:
        return pipe(
            "Ada waits in the desert at noon. Close-up.",
            negative_prompt="",
            height=64,
            width=96,
            num_frames=17,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=settings.model.network.text_tokens,
            memory=[Image.new("RGB", (96, 64), colour) for colour in memory],
            output_type="latent",
        ).frames

    red, blue, none = latents((200, 30, 30)), latents((30, 30, 200)), latents()
    assert red.shape == none.shape == (1, 16, 5, 8, 12)
    assert (red - none).abs().mean() > 0.01
    assert (red - blue).abs().mean() > 0.01


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 24e6


def pieces(tokenizer: ClipTokenizer, text: str) -> list[str]:
    inner = tokenizer._tokenizer
    return [inner.decoder[i] for i in inner.encode(text)]


@pytest.mark.parametrize("name", ["clip", "viclip", "written again"])
def test_vocabularies_cut_sentences_of_the_world_as_clip_does_and_read_others(name: str, tmp_path: Path) -> None:
    small = write_vocabulary(tmp_path) if name == "written again" else WEIGHTS / name / VOCABULARY_FILE
    ours, clip = ClipTokenizer(77, small), ClipTokenizer(77)
    for seed in range(HELD_OUT, HELD_OUT + 20):
        for text in [shot.prompt for shot in story(seed, looks=True).shots]:
            assert pieces(ours, text) == pieces(clip, text)
    text = "a tired astronaut repairs the antenna under a violet sky"
    assert "".join(pieces(ours, text)).replace("</w>", " ").strip() == text
    assert ours.vocab_size < 2000


def test_what_is_measured_is_what_the_embedded_model_does() -> None:
    config = composed("story=story.yaml")
    sampler, recall = config["sampler"], instantiate(config["memory"]["recall"])
    assert (sampler["guidance"], sampler["negative_sees_memory"]) == (GUIDANCE, NEGATIVE_SEES_MEMORY)
    assert (sampler["steps"], config["scorer"]["quality"]["threshold"]) == (STEPS, FILTER)
    assert (recall.capacity, recall.sink) == (MEMORY, SINK)


def test_a_drawn_memory_is_of_shots_before() -> None:
    memory = memory_of(story(HELD_OUT + 3), 7)
    assert (len(memory), memory[0].size) == (MEMORY, (96, 64))


def test_right_answers_are_counted_part_by_part() -> None:
    seen = held_out_shots(1)[0].seen(3)
    assert all(right for _, right in agreement(seen, seen))
    assert ("place", False) in agreement(seen, replace(seen, place=UNKNOWN)), "unknown is no right answer"
    assert "place" not in dict(agreement(replace(seen, place=UNKNOWN), seen)), "and no question"
    missed = agreement(seen, replace(seen, looks=()))
    assert [right for name, right in missed if name == "hat"] == [False] * len(seen.looks)
    assert shares([("hat", True), ("hat", False), ("place", True)]) == {"hat": pytest.approx(0.5), "place": 1.0}
    low, high = interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.5 < high < 0.62
    assert chance_of_look() == pytest.approx((1 / 4 + 1 / 7 + 1 / 5 + 1 / 4) / 4)


def test_the_filter_keeps_more_of_what_is_made_than_of_what_is_damaged(tmp_path: Path) -> None:
    found = Report(WEIGHTS, count=8, steps=6).measure("filter")
    assert found["frames"] == 2 * 3
    assert found["by_damage"].keys() == set(DAMAGES)
    assert found["kept"] > 1 - found["refused_of_damaged"]
    with pytest.raises(FileNotFoundError, match=r"give the one that storymem train wrote"):
        Report(WEIGHTS, adapter=tmp_path / "nothing")
