"""Shots and scores on a card that is not there: nothing is left on another device than the one it is used on.

Group offloading, training and evaluation are beyond fake tensors; ``test_accelerator`` has them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import MemoryMode, Offload, RuntimeSettings
from storymem.wan.shots import ShotRequest, WanShotGenerator
from tests import stories
from tests.devices.fake import CARD, fake_card
from tests.scorers import tiny as scorers
from tests.wan import tiny

WHERE = RuntimeSettings(device="cuda", attention="native")
GIVEN = np.zeros((1, 32, 48, 3), np.uint8)


@pytest.mark.parametrize(("offload", "mode"), [("none", "joint"), ("model", "cached")])
def test_a_generator_makes_shots_there(offload: Offload, mode: MemoryMode) -> None:
    with fake_card():
        made = WanShotGenerator(
            model=replace(stories.MODEL, memory_attention=mode),
            sampler=replace(stories.SAMPLER, negative_sees_memory=mode != "cached"),
            runtime=replace(WHERE, offload=offload, memory_cache="device" if mode == "joint" else "cpu"),
        )
        made.prepare(["a fox"], [None])
        request = ShotRequest(prompt="a fox", negative_prompt=None, frames=9, seed=0, memory=[], given=GIVEN[:0])
        assert made.first(request).shape == (9, 32, 48, 3)
        memory = made.encode_keyframes([GIVEN[0]] * 2)
        assert made.generate(replace(request, memory=memory, given=GIVEN)).shape == (9, 32, 48, 3)
        made.prepare(["a dog"], [None])
        assert (made._pipe is None) == (offload == "model"), "the text encoder takes the place of offloaded experts"


def loaded(offload: Offload) -> WanMemoryToVideoPipeline:
    return load_pipeline(stories.MODEL, runtime=replace(WHERE, offload=offload), text_encoder=False)


@pytest.mark.parametrize("offload", ["none", "model"])
def test_tensors_may_come_from_anywhere(offload: Offload) -> None:
    with fake_card():
        pipe = loaded(offload)
        for device in (torch.device("cpu"), CARD):
            latents = tiny.generate(
                pipe,
                num_inference_steps=2,
                guidance_scale=3.0,
                prompt_embeds=torch.zeros(1, 16, 16, device=device),
                negative_prompt_embeds=torch.zeros(1, 16, 16, device=device),
                memory=torch.zeros(2, 16, 1, *tiny.LATENT, device=device),
                latents=torch.zeros(1, 16, 2 + tiny.SLOTS, *tiny.LATENT, device=device),
            )
            assert latents.device == CARD


@pytest.mark.parametrize("kind", ["clip", "aesthetic", "viclip"])
def test_scorers_compute_there(kind: str) -> None:
    with fake_card():
        scorer = getattr(scorers, kind)(device="cuda")
        for device in (torch.device("cpu"), CARD):
            images, clips = torch.zeros(2, 3, 40, 60, device=device), torch.zeros(2, 8, 3, 40, 60, device=device)
            inputs = {"embed_images": images, "embed_clips": clips, "score": images, "embed_texts": ["a", "b"]}
            results = [getattr(scorer, name)(value) for name, value in inputs.items() if hasattr(scorer, name)]
            assert results
            assert all(result.device.type == "cpu" and len(result) == 2 for result in results)


def test_a_network_left_behind_is_found() -> None:
    """That these tests can fail."""
    with fake_card():
        pipe = loaded("none")
        pipe.transformer.condition_embedder.to("cpu")
        with pytest.raises(RuntimeError, match="device"):
            tiny.generate(pipe, prompt_embeds=torch.zeros(1, 16, 16), guidance_scale=1.0)
