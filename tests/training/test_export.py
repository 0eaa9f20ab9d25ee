"""A trained adapter written in every layout makes the film that it makes where it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from storymem.training.method import ExpertTraining
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import Layout, load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import RuntimeSettings
from tests import stories
from tests.training.tiny import run

LAYOUTS = get_args(Layout)


def pipeline() -> WanMemoryToVideoPipeline:
    return load_pipeline(stories.MODEL, runtime=RuntimeSettings(device="cpu"), text_encoder=False)


def latents_of(pipe: WanMemoryToVideoPipeline) -> Tensor:
    """A shot with one memory frame, through both experts."""
    generator = torch.Generator().manual_seed(5)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.randn(1, 16, 16, generator=generator),
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        memory=torch.randn(1, 16, 1, 4, 6, generator=generator),
        output_type="latent",
    ).frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertTraining, Path]:
    """A few steps of both experts, exported in all layouts; no average, so what was trained is what is written."""
    folder = tmp_path_factory.mktemp("run")
    optimizer = {"lr": 0.05, "warmup_steps": 0}
    ready = run(folder, steps=6, export=list(LAYOUTS), optimizer=optimizer)
    ready.trainer.run()
    ready.finish()
    return ready.method, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_film_of_the_trained_experts(trained: tuple[ExpertTraining, Path], layout: str) -> None:
    method, folder = trained
    pipe = pipeline()
    without = latents_of(pipe)
    pipe.transformer = method.experts.transformers["high_noise"].eval()
    pipe.transformer_2 = method.experts.transformers["low_noise"].eval()
    expected = latents_of(pipe)
    assert (expected - without).abs().max() > 0.01
    # The released layout and ComfyUI's state no configuration of PEFT; alpha and rsLoRA come back all the same.
    fresh = pipeline()
    info = load_memory_lora(fresh, folder / layout)
    torch.testing.assert_close(latents_of(fresh), expected, rtol=1e-4, atol=1e-4)
    assert info.rank == 4
    assert info.training["max_memory"] == 2
    assert (info.conditioning, info.rope_stride, info.memory_attention) == ("m2v", 5, "joint")


def test_what_is_exported_is_the_average_if_there_is_one(tmp_path: Path) -> None:
    ready = run(tmp_path, steps=4, expert="high", optimizer={"lr": 0.05, "ema_decay": 0.9, "warmup_steps": 0})
    ready.trainer.run()
    ready.finish()
    average = ready.trainer.average
    assert average is not None
    saved = ready.method.load(tmp_path / "storymem")
    for name, tensor in saved.items():
        assert torch.equal(tensor, average.values[name])
    moved = [name for name, tensor in saved.items() if not torch.equal(tensor, ready.method.parameters[name])]
    assert len(moved) == len(saved)
