"""Samples and loss of systems that denoise several clips, or panels, as one sequence."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storymem.training.objectives.films import FilmSamples
from storymem.training.objectives.flow import noise_level
from storymem.training.objectives.pictures import PictureSamples
from storymem.training.objectives.samples import collate
from storymem.training.objectives.sequence import SequenceBatch, SequenceObjective
from storymem.training.objectives.settings import (
    FilmObjectiveSettings,
    HolocineObjectiveSettings,
    LctObjectiveSettings,
    PicturesObjectiveSettings,
)
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import holocine, scene_and_own_text, single_shot
from tests import stories
from tests.training.tiny import BATCH, MemoryLatents, Recorder, TinyClip, source


class Encoded:
    """Random embeddings by text, and blank images."""

    def text(self, text: str, length: int) -> Tensor:
        return torch.randn(length, 16, generator=torch.Generator().manual_seed(len(text)))

    def blank(self, size: tuple[int, int, int]) -> Tensor:
        return torch.full((16, 1, size[1] // 8, size[2] // 8), 0.25)


def clips(**sizes: int) -> MemoryLatents:
    """Groups of these sizes."""
    return MemoryLatents(
        tuple(
            TinyClip(f"{name}{k}", number, "train", (9, 32, 48), 1, caption=f"Tiles {name}{k}.")
            for number, (name, size) in enumerate(sizes.items())
            for k in range(size)
        )
    )


SPARSE = HolocineObjectiveSettings(sparse=True, max_shots=3)


def films(data: MemoryLatents, settings: FilmObjectiveSettings = SPARSE, **changes: Any) -> FilmSamples:
    batch = replace(BATCH, text_dropout=0.0)
    return FilmSamples(settings, source(data, batch=batch, encodings=Encoded(), **changes))


def test_films_are_neighbours_of_a_group_in_order() -> None:
    data = clips(a=4, b=2, alone=1)
    seen = set()
    for step in range(60):
        plans = films(data).plan(step)
        assert len({len(plan.clips) for plan in plans}) == 1, "one shape a step"
        for plan in plans:
            seen.add(plan.clips)
            assert all(after == before + 1 for before, after in pairwise(plan.clips))
            assert len({data.clips[clip].group for clip in plan.clips}) == 1
    assert seen == {(0, 1), (1, 2), (2, 3), (4, 5), (0, 1, 2), (1, 2, 3)}
    assert films(data).plan(7) == films(data).plan(7) != films(data, seed=1).plan(7)


def test_a_film_holds_its_clips_and_each_shot_reads_the_scene_and_its_caption(tmp_path: Path) -> None:
    data = clips(a=3)
    (tmp_path / "scenes").write_text('{"folder": ".", "caption": "a scene"}')
    samples = films(data, replace(SPARSE, min_shots=3, scenes=str(tmp_path / "scenes")), count=1)
    (plan,) = samples.plan(0)
    sample = samples.read(plan)
    assert torch.equal(sample.x0[0], torch.cat([data.video(clip) for clip in range(3)], dim=1))
    blank = condition_channels(None, data.given(0, 0)[None], 0)
    assert torch.equal(sample.condition, torch.cat([blank] * 3, dim=2))
    text_to_video = asdict(stories.MODEL) | {"base": "wan2.2-t2v-a14b", "has_text_to_video": False}
    assert films(data, model=text_to_video).read(plan).condition is None
    assert torch.equal(sample.mask[0], torch.cat([data.mask(clip) for clip in range(3)]))
    texts = sample.text[0].unflatten(0, (4, 16))
    assert torch.equal(texts[0], Encoded().text("a scene", 16))
    assert torch.equal(texts[1:], torch.stack([data.text(clip) for clip in range(3)]))
    assert sample.layout == holocine([3, 3, 3], scene_and_own_text(3, 16), sparse=True)
    assert [part.text.spans for part in sample.layout.segments if part.text] == [
        ((0, 16), (16 * k, 16 * (k + 1))) for k in (1, 2, 3)
    ]


def test_panels_stand_below_each_other_under_their_joint_caption() -> None:
    data = clips(a=3, b=3)
    settings = PicturesObjectiveSettings(text_tokens=20, panels=0.5)
    batch = replace(BATCH, text_dropout=0.0)
    samples = PictureSamples(settings, source(data, batch=batch, encodings=Encoded(), count=2))
    read = {len(plan.clips): samples.read(plan) for step in range(12) for plan in samples.plan(step)}
    assert read.keys() == {1, 3}
    first = [data.by_id[name] for name in read[3].ids]
    images = [data.video(data.clips.index(clip))[:, :1] for clip in first]
    assert torch.equal(read[3].x0[0], torch.cat(images, dim=2))
    assert read[3].condition.shape == (1, 20, 1, 12, 6)
    assert read[3].text.shape == (1, 20, 16)
    assert read[1].text.shape == (1, 16, 16)
    assert read[3].layout == read[1].layout == single_shot(1)


def film(settings: FilmObjectiveSettings) -> SequenceBatch:
    samples = films(clips(a=2, b=2), replace(settings, max_shots=2), count=2)
    return collate([samples.read(plan) for plan in samples.plan(0)])  # type: ignore[return-value]


def test_every_shot_of_lct_has_a_noise_level_of_its_own() -> None:
    settings, network = LctObjectiveSettings(), Recorder()
    of = film(settings)
    losses = SequenceObjective(settings=settings, boundary=0.9)(network, "high_noise", of)
    x, timestep, text, _ = network.seen
    assert timestep.shape == (2, 2)
    assert len(timestep.unique()) == 4
    for shot in range(2):
        s, frames = timestep[:, shot, None, None, None, None] / 1000, slice(3 * shot, 3 * shot + 3)
        expected = (1 - s) * of.x0[:, :, frames] + s * of.noise[:, :, frames]
        torch.testing.assert_close(x[:, :16, frames], expected)
    assert text.shape == (2, 3 * 16, 16)
    assert losses.total.item() == pytest.approx((of.noise - of.x0).square().mean().item(), rel=1e-5)


def test_the_subject_of_a_film_has_more_weight() -> None:
    settings, network = HolocineObjectiveSettings(mask_weight=3.0), Recorder()
    of = film(settings)
    losses = SequenceObjective(settings=settings, boundary=0.9)(network, "low_noise", of)
    errors = (of.noise - of.x0).square().mean(dim=1)
    weights = 1 + 2 * of.mask
    expected = (errors * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    assert losses.total.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    total, count = losses.sums["loss_video"]
    assert (total / count).item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_logit_normal_levels_lie_in_the_experts_range_and_share_out_the_whole() -> None:
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1].float()
    level = partial(noise_level, u, shift=4.0, normal=(0.3, 1.2))
    high, low = level("high_noise", boundary=0.9), level("low_noise", boundary=0.9)
    whole = level("high_noise", boundary=None)
    assert bool((high >= 0.9).all())
    assert bool((low < 0.9).all())
    share = (whole < 0.9).float().mean()
    for at in (0.2, 0.5, 0.85, 0.95):
        parts = share * (low < at).float().mean() + (1 - share) * (high < at).float().mean()
        assert parts.item() == pytest.approx((whole < at).float().mean().item(), abs=1e-3)
    before = whole / (4 - 3 * whole)  # without the shift
    logits = torch.logit(before[100:-100].double())
    assert logits.mean().item() == pytest.approx(0.3, abs=0.01)
