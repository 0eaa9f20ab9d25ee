"""Consistent self-attention: who reads whom, on Stable Diffusion XL and on Wan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storymem.methods.long_prompts import encode_long_prompts
from storymem.methods.sharing import Sharing, SharingSettings, shots_read
from storymem.methods.storydiffusion import StableDiffusion, StoryDiffusionImages
from storymem.story import Story, load_story
from storymem.wan.settings import RuntimeSettings
from tests.evaluation.test_methods import generate
from tests.methods import tiny

SETTINGS = {"weights": {"name": "SDXL", "source": "x/y"}, "steps": 4, "height": 32, "width": 32, "batch": 3}
ALWAYS = {"plain_steps": 1, "probability": 1.0, "late_probability": 1.0}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    (tmp_path / "s.yaml").write_text(
        """\
title: T
overview: O.
style: ink
characters: [{name: ann, description: a tall fox.}, {name: bob}, {name: cid}]
scenes:
  - shots:
      - {prompt: a hill.}
      - {prompt: "ann runs, annes [ann].", characters: [ann]}
      - {prompt: bob runs., characters: [bob]}
      - {prompt: ann sits., characters: [ann]}
      - {prompt: ann and bob., characters: [ann, bob]}
      - {prompt: ann and cid., characters: [ann, cid]}
      - {prompt: ann naps., characters: [ann]}
"""
    )
    return load_story(tmp_path / "s.yaml")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


def maker(pipe: Any, **changed: Any) -> StoryDiffusionImages:
    settings = {**SETTINGS, "sharing": ALWAYS, **changed}
    method = StoryDiffusionImages(generate={**generate(), "seed": 3}, storydiffusion=settings)
    method.painter = StableDiffusion(RuntimeSettings(device="cpu"), pipe=pipe)
    return method


def images(one: StoryDiffusionImages, story: Story, folder: Path) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for group in one.plan(story, folder):
        found = one.make(group, {})
        made |= {name: found[name] for name in group.names}
    return made


def test_id_shots_are_those_that_show_a_character_alone_first(story: Story) -> None:
    assert shots_read(story, SharingSettings()) == [(), (3,), (), (1,), (1, 2, 3), (1, 3), (1, 3)]
    first = SharingSettings(choose="first", id_images=2)
    assert shots_read(story, first) == [(1,), (0,), *[(0, 1)] * 5]


def test_a_row_reads_what_its_id_rows_show_and_nothing_else(pipe: Any, story: Story, tmp_path: Path) -> None:
    plain = images(maker(pipe, sharing={**ALWAYS, "rate": 0.0}), story, tmp_path)
    shared = images(maker(pipe), story, tmp_path)
    alone = images(maker(pipe, sharing={**ALWAYS, "probability": 0.0, "late_probability": 0.0}), story, tmp_path)
    assert list(plain) == ["01_02", "01_03", "01_04", "01_06", "01_01", "01_05", "01_07"]
    assert all(np.abs(plain[name].astype(int) - alone[name]).max() <= 1 for name in plain), "no token is kept"
    unlike = {name for name in plain if np.abs(shared[name].astype(int) - plain[name]).max() > 1}
    assert unlike == {"01_02", "01_04", "01_05", "01_06", "01_07"}, "not the hill, nor bob's only id image"
    again = images(maker(pipe), story, tmp_path)
    assert all((shared[name] == again[name]).all() for name in shared), "the same for the same seed"
    everywhere = images(maker(pipe, everywhere=True), story, tmp_path)
    assert (everywhere["01_02"] != shared["01_02"]).any()
    plans = [maker(pipe, batch=batch).plan(story, tmp_path) for batch in (5, 16)]
    assert [len(groups) for groups in plans] == [3, 1]
    small, large = (images(maker(pipe, batch=batch), story, tmp_path) for batch in (5, 16))
    assert all(np.abs(small[name].astype(int) - large[name]).max() <= 1 for name in large), "batches do not matter"
    with pytest.raises(ValueError, match="has 4 id images, which every batch contains: raise"):
        maker(pipe, batch=4).check(story)


def test_masks_are_shared_by_layers_and_drawn_again_each_step() -> None:
    sharing = Sharing(SharingSettings(), [(1,), (0,)], seed=1)
    assert not sharing.applies("up_blocks.0")
    sharing.step = 1
    kept = sharing.kept(0, 1000)
    assert 400 < len(kept) < 600
    assert torch.equal(kept, sharing.kept(0, 1000))
    assert not torch.equal(kept, sharing.kept(1, 1000)[: len(kept)])
    gates = {True: 0, False: 0}
    for layer in range(1000):
        gates[sharing.applies(f"layer {layer}")] += 1
    assert 650 < gates[True] < 750
    sharing.step = 2
    assert not torch.equal(kept[:400], sharing.kept(0, 1000)[:400])
    query = torch.randn(4, 6, 2, 4)
    with pytest.raises(ValueError, match="a batch of 3 is not one of 2 shots"):
        sharing.attention(query[:3], query[:3], query[:3], lambda q, k, v: q)
    lengths = []
    sharing.attention(query, query, query, lambda q, k, v: (lengths.append(k.shape[1]), q)[1])
    assert lengths == [6 + len(sharing.kept(1, 6)), 6 + len(sharing.kept(0, 6))], "both passes of guidance alike"


def test_prompts_have_descriptions_for_names_and_may_be_long(pipe: Any, story: Story) -> None:
    one = maker(pipe, template="{prompt}, best")
    assert one.prompt(story, story.shots[1]) == "ink: a tall fox runs, annes a tall fox., best"
    short = ["a fox", ""]
    embeds, pooled = encode_long_prompts(pipe, short)
    expected = pipe.encode_prompt(short, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, expected[0])
    torch.testing.assert_close(pooled, expected[2])
    long, _ = encode_long_prompts(pipe, ["a" * 75 + "b" * 10, "c"])
    assert long.shape == (2, 154, 32)
    assert not torch.equal(long[0, 77:], long[1, 77:]), "what follows 75 tokens is read"
