"""The models that come with the package."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from storymem.scorers.clip import VOCABULARY_FILE
from storymem.wan.loading import load_pipeline
from storymem.wan.settings import RuntimeSettings
from tests.composing import generate_settings
from toyworld.build import WEIGHTS, Recipe, adapter
from toyworld.report import chance_of_look, memory_mode, remembered
from toyworld.vocabulary import write_vocabulary
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


def test_the_shipped_adapter_says_what_it_is_for_and_keeps_saying_it(tmp_path: Path) -> None:
    assert memory_mode(WEIGHTS / "adapter") == generate_settings().model.memory_attention
    adapter(Recipe(work=tmp_path, weights=tmp_path / "weights", adapter=WEIGHTS / "adapter"))
    assert memory_mode(tmp_path / "weights" / "adapter") == memory_mode(WEIGHTS / "adapter")
    with safe_open(tmp_path / "weights" / "adapter" / "high_noise.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 24e6


@pytest.mark.parametrize("scorer", ["clip", "viclip"])
def test_the_shipped_vocabulary_is_the_recipe_s(scorer: str, tmp_path: Path) -> None:
    shipped, made = WEIGHTS / scorer / VOCABULARY_FILE, write_vocabulary(tmp_path)
    assert gzip.decompress(shipped.read_bytes()) == gzip.decompress(made.read_bytes())


def test_a_drawn_memory_is_of_shots_before_and_fits_the_adapter() -> None:
    told = story(HELD_OUT + 3)
    memory = remembered(told, 5)
    assert len(memory) == min(6, sum(shot.cut for shot in told.shots[:5]))
    assert memory[0].size == (96, 64)


def test_chance_is_that_of_the_worlds_looks() -> None:
    assert chance_of_look() == pytest.approx((1 / 4 + 1 / 7 + 1 / 5 + 1 / 4) / 4)
