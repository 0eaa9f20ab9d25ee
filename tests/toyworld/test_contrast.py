"""Toy CLIP, ViCLIP and the quality head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn import functional as F

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer, ClipTokenizer
from storymem.scorers.viclip import ViclipScorer
from toyworld.contrast import (
    THRESHOLD,
    auroc,
    build_clip,
    build_viclip,
    contrastive_loss,
    picture_batch,
    quality_frames,
    save_clip,
    save_quality,
    save_viclip,
)
from toyworld.damage import DAMAGES, damage
from toyworld.vocabulary import write_vocabulary
from toyworld.world import story


def test_the_contrastive_loss_is_open_clips() -> None:
    rng = torch.Generator().manual_seed(0)
    pictures, texts = torch.randn(7, 16, generator=rng), torch.randn(7, 16, generator=rng)
    foreign = ClipLoss()(F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1), torch.tensor(12.0))
    torch.testing.assert_close(contrastive_loss(pictures, texts, torch.tensor(12.0)), foreign)


def test_auroc_counts_pairs() -> None:
    scores, labels = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert auroc(scores, labels) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auroc(-scores, labels) == pytest.approx(1 - 3.5 / 4)


def test_pictures_that_are_damaged_say_so_in_their_text() -> None:
    pictures, texts, clean = picture_batch(1, 40)
    assert pictures.shape == (40, 3, 64, 96)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    said = [text.split(".")[0].lower() in DAMAGES for text in texts]
    assert 5 < sum(said) < 30
    assert said == [value == 0 for value in clean.tolist()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_changes_a_frame_visibly_and_keeps_its_form(kind: str) -> None:
    frame = story(1).shots[0].frames[8]
    broken = damage(np.random.default_rng(0), frame, kind)
    assert broken.shape == frame.shape
    assert broken.dtype == np.uint8
    assert np.abs(broken.astype(int) - frame).mean() > 1.5


def test_half_of_the_quality_frames_are_clean() -> None:
    pictures, labels = quality_frames(6, 0)
    assert len(pictures) == 12
    assert labels.tolist() == [1.0] * 6 + [0.0] * 6


def test_clip_and_head_are_read_back_by_the_scorers(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(77, write_vocabulary(tmp_path))
    scorer, head = ClipScorer(build_clip(), tokenizer=tokenizer), nn.Linear(64, 1)
    save_clip(scorer, tmp_path)
    save_quality(head, tmp_path)
    pictures, texts, _ = picture_batch(2, 3)
    again = ClipScorer.from_folder(tmp_path)
    torch.testing.assert_close(again.embed_images(pictures), scorer.embed_images(pictures), atol=5e-3, rtol=0)
    torch.testing.assert_close(again.embed_texts(texts), scorer.embed_texts(texts), atol=5e-3, rtol=0)
    quality = AestheticScorer.from_folder(tmp_path, threshold=THRESHOLD)
    crop = ClipScorer.from_folder(tmp_path, preprocessing="published_aesthetic")
    torch.testing.assert_close(quality.score(pictures), head(crop.embed_images(pictures))[:, 0].detach())


def test_viclip_is_read_back_by_its_scorer(tmp_path: Path) -> None:
    scorer = ViclipScorer(build_viclip(), tokenizer=ClipTokenizer(32, write_vocabulary(tmp_path)))
    save_viclip(scorer, tmp_path)
    clips, texts = torch.rand(2, 17, 3, 64, 96), ["Ada waits on the moon.", "Torn."]
    again = ViclipScorer.from_folder(tmp_path)
    torch.testing.assert_close(again.embed_texts(texts), scorer.embed_texts(texts), atol=5e-3, rtol=0)
    torch.testing.assert_close(again.embed_clips(clips), scorer.embed_clips(clips), atol=5e-3, rtol=0)


def test_a_small_family() -> None:
    """The scorers' share of the 24 MB the toy family may take, in float16."""
    size = sum(p.numel() * 2 for network in (build_clip(), build_viclip()) for p in network.parameters())
    assert size < 1.5e6
