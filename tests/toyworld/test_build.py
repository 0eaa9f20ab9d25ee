"""The recipe runs from nothing to a folder that loads by the ordinary door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.viclip import ViclipScorer
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from toyworld.build import STAGES, Recipe
from toyworld.contrast import THRESHOLD
from toyworld.text import TEXT_TOKENS


def test_the_stages_are_in_the_order_in_which_they_need_each_other() -> None:
    order = list(STAGES)
    for before, after in [
        ("text", "text_encoder"),
        ("text_encoder", "base"),
        ("vae", "latents"),
        ("latents", "base"),
        ("vae", "decoder"),
    ]:
        assert order.index(before) < order.index(after)
    for before, after in [("base", "high"), ("base", "low"), ("clip", "quality"), ("quality", "save")]:
        assert order.index(before) < order.index(after)


@pytest.mark.slow
def test_every_stage_runs_and_the_result_makes_a_shot(tmp_path: Path) -> None:
    recipe = Recipe(work=tmp_path / "work", weights=tmp_path / "weights", quick=True)
    for stage in STAGES.values():
        stage(recipe)
    pipe = WanMemoryToVideoPipeline.from_pretrained(recipe.weights, torch_dtype=torch.float32)
    keyframe = Image.new("RGB", (96, 64), (200, 120, 40))
    frames = pipe(
        "Ada waits on the moon at night. Wide shot.",
        negative_prompt="",
        height=64,
        width=96,
        num_frames=17,
        num_inference_steps=2,
        memory=[keyframe],
        max_sequence_length=TEXT_TOKENS,
    ).frames
    assert frames.shape == (1, 17, 64, 96, 3)
    assert AestheticScorer.from_folder(recipe.weights / "clip", threshold=THRESHOLD).score(
        torch.rand(1, 3, 64, 96)
    ).shape == (1,)
    assert ViclipScorer.from_folder(recipe.weights / "viclip").embed_texts(["Ada waits."]).shape == (1, 64)
    size = sum(path.stat().st_size for path in recipe.weights.rglob("*") if path.is_file())
    assert size <= 24e6
    assert list((recipe.work / "base").glob("samples_*.png"))
    figures = json.loads((recipe.work / "report.json").read_text())
    assert set(figures) == {"vae", "text", "joints", "memory", "filter", "scorers"}
