"""Wan2.2-TI2V-5B: as diffusers runs it, with clean memory before it, from settings to shots and a trained adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor

from storymem.config import build_settings
from storymem.training.objectives.memory import MemoryBatch, MemoryObjective
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.wan.estimate import memory_cache_bytes
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings
from storymem.wan.shots import ShotRequest, WanShotGenerator
from storymem.wan.spec import TI2V_5B
from tests.composing import composed
from tests.wan.tiny import CPU, STEPS, images, settings

HEIGHT, WIDTH, FRAMES = 64, 96, 9
VAE = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 48,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1] * 48,
    "latents_std": [1.1] * 48,
}


def model() -> ModelSettings:
    """The tiny model in the shapes of Wan2.2-TI2V-5B."""
    from dataclasses import asdict

    values = asdict(settings())
    values["network"]["transformer"] |= {"out_channels": 48, "num_layers": 2}
    values["network"]["vae"] = VAE
    values |= {
        "base": "wan2.2-ti2v-5b",
        "video": {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "fps": 8},
        "memory_attention": "cached",
        "has_text_to_video": False,
        "boundary": None,
    }
    return build_settings(ModelSettings, values)


@pytest.fixture(scope="module")
def pipe() -> WanMemoryToVideoPipeline:
    made = load_pipeline(model(), runtime=CPU)
    made.set_progress_bar_config(disable=True)
    return made


def shot(pipe: Any, **changes: Any) -> Tensor:
    arguments = {
        "prompt_embeds": torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1)),
        "negative_prompt_embeds": torch.zeros(1, 16, 32),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipe(**arguments | changes).frames


def stock(pipe: WanMemoryToVideoPipeline, kind: Any) -> Any:
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    made = kind(**parts, expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    return made


def test_text_and_first_frame_are_as_in_diffusers(pipe: WanMemoryToVideoPipeline) -> None:
    (frame,) = images(1, size=(WIDTH, HEIGHT))
    torch.testing.assert_close(shot(pipe), shot(stock(pipe, WanPipeline)), rtol=1e-4, atol=1e-5)
    theirs = shot(stock(pipe, WanImageToVideoPipeline), image=frame)
    torch.testing.assert_close(shot(pipe, first_frame=frame), theirs, rtol=1e-4, atol=1e-5)


def test_given_frames_stay_and_memory_matters(pipe: WanMemoryToVideoPipeline) -> None:
    frames, memory = images(5, size=(WIDTH, HEIGHT)), images(2, seed=3, size=(WIDTH, HEIGHT))
    given = shot(pipe, motion_frames=frames, memory=memory)
    assert given.shape == (1, 48, 3, HEIGHT // 16, WIDTH // 16)
    torch.testing.assert_close(given[0, :, :1], pipe.encode_memory(frames[:1])[0])
    assert not torch.equal(given, shot(pipe, motion_frames=frames))
    unseen = shot(pipe, memory=memory, negative_sees_memory=False)
    assert not torch.equal(unseen, shot(pipe, memory=memory))


@pytest.mark.parametrize("cache", ["cpu", "recompute"])
def test_where_memory_lies_changes_nothing(pipe: WanMemoryToVideoPipeline, cache: str) -> None:
    given = {"memory": images(3, size=(WIDTH, HEIGHT)), "first_frame": images(1, seed=2, size=(WIDTH, HEIGHT))[0]}
    expected = shot(pipe, **given)
    pipe.memory_cache = cache
    try:
        torch.testing.assert_close(shot(pipe, **given), expected, rtol=1e-4, atol=1e-5)
    finally:
        pipe.memory_cache = "device"


def test_settings_that_do_not_fit_are_refused(pipe: WanMemoryToVideoPipeline) -> None:
    with pytest.raises(ValueError, match=r"memory_attention=joint is not for Wan2\.2-TI2V-5B"):
        WanMemoryToVideoPipeline(**pipe.components, expand_timesteps=True)
    with pytest.raises(ValueError, match=r"height must be a positive multiple of 32 for Wan2\.2-TI2V-5B, not 48"):
        shot(pipe, height=48)


def test_a_generator_makes_shots_with_it() -> None:
    made = WanShotGenerator(model=model(), sampler=SamplerSettings(steps=2), runtime=RuntimeSettings(device="cpu"))
    made.prepare(["a fox"], [None])
    given = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    request = {"prompt": "a fox", "negative_prompt": None, "frames": FRAMES, "seed": 0}
    assert made.first(ShotRequest(**request, memory=[], given=given[:0])).shape == (FRAMES, HEIGHT, WIDTH, 3)
    memory = made.encode_keyframes([given[0]])
    assert made.generate(ShotRequest(**request, memory=memory, given=given)).shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_an_adapter_trains_on_what_generation_computes() -> None:
    network: Any = load_pipeline(model(), runtime=CPU, text_encoder=False).transformer
    network.requires_grad_(False)
    network.add_adapter(memory_lora_config(rank=2, alpha=2, dropout=0.0), adapter_name="memory")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 48, 2 + 3, 4, 6, generator=generator)
    batch = MemoryBatch(
        x0=x0,
        noise=noise,
        u=torch.tensor([0.5]),
        condition=None,
        mask=torch.zeros(1, 3, 4, 6),
        text=torch.randn(1, 16, 32, generator=generator),
        memory_frames=2,
        given=1,
        ids=("a",),
    )
    objective = MemoryObjective(
        settings=MemoryObjectiveSettings(memory_weight=0.0), boundary=None, rope_stride=5, memory_attention="cached"
    )
    assert [part.name for part in objective.layout(batch).segments] == ["memory", "given", "video"]
    losses = objective(network, "high_noise", batch)
    losses.total.backward()
    batch.noise[:, :, 2] = 100  # of the frame that is given, which has no loss
    again = objective(network, "high_noise", batch)
    assert again.total.item() == pytest.approx(losses.total.item())
    assert again.sums["loss_video"][0].item() == pytest.approx(losses.sums["loss_video"][0].item())
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in gradients)
    assert max(g.abs().max() for name, g in gradients.items() if "lora_B" in name and g is not None) > 0


def test_every_key_of_an_adapter_of_true_size_fits() -> None:
    config = composed("story=story.yaml", "model=wan2.2-ti2v-5b")
    true = build_settings(ModelSettings, config["model"])
    with torch.device("meta"):
        network = WanTransformer3DModel(**true.transformer)
        network.add_adapter(memory_lora_config(), adapter_name="memory")
    downs = [name for name, _ in network.named_parameters() if ".lora_A." in name]
    assert len(downs) == 30 * 10
    assert true.spec is TI2V_5B
    assert memory_cache_bytes(true, 10) == 30 * 2 * 10 * 22 * 40 * 3072 * 2
