"""Toy CLIP and ViCLIP, trained contrastively on the world, and the quality head on CLIP's embeddings."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.scorers.clip import VOCABULARY_FILE, ClipScorer, ClipTokenizer
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop_in_bytes, normalise, squash
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer, middle_frames
from storymem.scorers.viclip_network import Viclip, ViclipConfig
from toyworld.attributes import FRAMES
from toyworld.damage import DAMAGES, damage
from toyworld.text import world_sentences
from toyworld.world import HELD_OUT, ToyShot, render, story

SIDE = 64
TEXT = {"width": 16, "heads": 2, "layers": 2}


def clip_config(vocabulary: int) -> dict[str, Any]:
    """The sizes of CLIP, as open_clip takes them."""
    return {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 4, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": vocabulary, **TEXT},
    }


def viclip_config(vocabulary: int) -> ViclipConfig:
    """The sizes of ViCLIP."""
    vision = {"resolution": SIDE, "patch": 16, "width": 64, "layers": 4, "heads": 4, "output_dim": 64}
    return ViclipConfig(**vision, **{f"text_{name}": size for name, size in TEXT.items()}, vocab_size=vocabulary)


COMMON = 1000  # CLIP's first merges, of which ordinary words are made
STORIES = 300  # enough that every word occurs
PROBE_SCALE = 10.0
DAMAGED = 0.4  # of CLIP's images, with the damage in their text
LOOKS = 0.75  # of shots in training have looks in their text, so that embeddings depend on the characters
THRESHOLD = 5.0  # of the quality head: a drawn frame that scores less is more likely damaged than clean


@cache
def merges() -> tuple[tuple[str, str], ...]:
    """The merges of the towers' vocabulary, in CLIP's order: the first ones and all parts of the world's words.

    With an embedding for each of CLIP's 48,894 merges these small networks would be little else. Sentences of the
    world get the same tokens as with CLIP's own vocabulary, other texts more and shorter ones.
    """
    clip = open_clip.SimpleTokenizer()
    texts = " ".join([*world_sentences(STORIES), *DAMAGES]).lower()
    words = {f"{word}</w>" for word in clip.pat.findall(texts)}
    ranked = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)
    every_word = " ".join(words)
    return tuple(pair for rank, pair in enumerate(ranked) if rank < COMMON or "".join(pair) in every_word)


def write_vocabulary(folder: Path) -> Path:
    """Write the vocabulary beside a model's weights, as open_clip's `SimpleTokenizer` and our scorers read it."""
    path = folder / VOCABULARY_FILE
    lines = ["merges of CLIP's vocabulary", *(" ".join(pair) for pair in merges())]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return path


def draw_shots(rng: torch.Generator, count: int, start: int = 0) -> list[ToyShot]:
    """Shots at random; every second has place and time of the one before it, so that the characters matter."""
    seeds = (start + torch.randint(HELD_OUT // 2, (count,), generator=rng)).tolist()
    looks = (torch.rand(count, generator=rng) < LOOKS).tolist()
    shots: list[ToyShot] = []
    for i, (seed, described) in enumerate(zip(seeds, looks, strict=True)):
        where = (shots[-1].place, shots[-1].time) if i % 2 else None
        shots.append(story(seed, shots=2, looks=described, where=where).shots[seed % 2])
    return shots


def draw_images(rng: torch.Generator, count: int, start: int = 0) -> tuple[Tensor, list[str], Tensor]:
    """Frames [N, 3, 64, 96] in 0..1, their texts, and 1 for clean ones [N]; texts of damaged ones name the damage."""
    frames, texts, clean = [], [], []
    numbers = np.random.default_rng(int(torch.randint(2**31, (), generator=rng)))
    for shot in draw_shots(rng, count, start):
        at, text = int(numbers.integers(FRAMES)), shot.prompt
        frame = render(shot, slice(at, at + 1))[0]
        clean.append(float(numbers.random() >= DAMAGED))
        if not clean[-1]:
            kind = str(numbers.choice(DAMAGES))
            frame, text = damage(numbers, frame, kind), f"{kind.capitalize()}. {text}"
        frames.append(frame)
        texts.append(text)
    return as_images(np.stack(frames)), texts, torch.tensor(clean)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over a batch of pairs."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


class ClipTraining(nn.Module):
    """CLIP and a linear probe of its unit-length image embeddings for damage, which is thrown away afterwards.

    A contrastive loss alone leaves fine damage nearly invisible; the probe makes the embeddings hold what the
    quality head needs.
    """

    def __init__(self, tokenizer: ClipTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.network = open_clip.CLIP(**clip_config(tokenizer.vocab_size))
        self.probe = nn.Linear(self.network.text_projection.shape[1], 1)

    def loss(self, rng: torch.Generator, size: int = 64) -> tuple[Tensor, dict[str, float]]:
        """The contrastive loss and the probe's cross-entropy, under one of both published preprocessings."""
        images, texts, clean = draw_images(rng, size)
        prepare = squash if torch.rand((), generator=rng) < 0.5 else crop_in_bytes
        device = self.probe.weight.device
        pixels = normalise(prepare(images, SIDE), CLIP_MEAN, CLIP_STD).to(device)
        seen = self.network.encode_image(pixels).float()
        read = self.network.encode_text(self.tokenizer(texts).to(device)).float()
        pairs = contrastive_loss(seen, read, self.network.logit_scale.exp().clamp(max=100))
        logits = PROBE_SCALE * self.probe(F.normalize(seen, dim=-1))[:, 0]
        damaged = F.binary_cross_entropy_with_logits(logits.float(), clean.to(device))
        return pairs + damaged, {"pairs": float(pairs.detach()), "damage": float(damaged.detach())}


def build_viclip(vocabulary: int) -> Viclip:
    """A fresh ViCLIP."""
    network = Viclip(viclip_config(vocabulary))
    nn.init.normal_(network.vision_encoder.temporal_positional_embedding, std=0.05)
    return network


def viclip_loss(
    network: Viclip, tokenizer: ClipTokenizer, rng: torch.Generator, size: int = 32
) -> tuple[Tensor, dict[str, float]]:
    """The contrastive loss of shots, of eight frames each, as the scorer chooses and crops them."""
    shots, frames = draw_shots(rng, size), middle_frames(FRAMES, network.config.num_frames)
    clips = as_images(np.stack([shot.frames[frames] for shot in shots]))
    pixels = normalise(crop_in_bytes(clips.flatten(0, 1), SIDE), CLIP_MEAN, CLIP_STD).to(network.temp.device)
    seen = network.vision_encoder(pixels.unflatten(0, clips.shape[:2]))
    read = network.text_encoder(tokenizer([shot.prompt for shot in shots]).to(network.temp.device))
    return contrastive_loss(seen.float(), read.float(), 1 / network.temp.clamp(min=0.01)), {}


def top1(scorer: ClipScorer | ViclipScorer, count: int) -> float:
    """Share of held-out shots whose nearest prompt, among those of all, has their place and time, and for ViCLIP their
    action."""
    shots = [story(HELD_OUT + i).shots[i % 8] for i in range(count)]
    prompts = scorer.embed_texts([shot.prompt for shot in shots])
    parts: tuple[str, ...] = ("place", "time")
    if isinstance(scorer, ClipScorer):
        seen = scorer.embed_images(as_images(np.concatenate([render(shot, slice(8, 9)) for shot in shots])))
    else:
        parts += ("action",)
        seen = scorer.embed_clips(as_images(np.stack([shot.frames for shot in shots])))
    best = [shots[i] for i in (seen @ prompts.T).argmax(dim=1).tolist()]
    same = [all(getattr(a, p) == getattr(b, p) for p in parts) for a, b in zip(shots, best, strict=True)]
    return float(np.mean(same))


def save_clip(network: open_clip.CLIP, folder: Path) -> None:
    """Write the model into a folder, which holds its vocabulary, in open_clip's layout, weights in float16."""
    config = {
        "model_cfg": clip_config(int(network.vocab_size)),
        "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _save_half(network, folder / "open_clip_model.safetensors")


def save_viclip(scorer: ViclipScorer, folder: Path) -> None:
    """Write sizes and weights (float16) as `ViclipScorer.from_folder` reads them."""
    scorer.save(folder)
    _save_half(scorer.network, folder / "model.safetensors")


def _save_half(network: nn.Module, path: Path) -> None:
    save_file({name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}, path)


def quality_frames(count: int, start: int) -> tuple[Tensor, Tensor]:
    """As many clean as damaged frames [2 N, 3, 64, 96] in 0..1, and 1 for clean, 0 for damaged [2 N]."""
    rng, numbers = torch.Generator().manual_seed(start % 2**31), np.random.default_rng([13, start])
    clean = np.stack([shot.frames[int(numbers.integers(FRAMES))] for shot in draw_shots(rng, count, start)])
    other = [shot.frames[int(numbers.integers(FRAMES))] for shot in draw_shots(rng, count, start)]
    broken = np.stack([damage(numbers, frame, DAMAGES[i % len(DAMAGES)]) for i, frame in enumerate(other)])
    return as_images(np.concatenate([clean, broken])), torch.cat([torch.ones(count), torch.zeros(count)])


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a clean frame scores above a damaged one (ties count half)."""
    clean, broken = scores[labels == 1].numpy(), scores[labels == 0].numpy()
    return float(mannwhitneyu(clean, broken).statistic / (len(clean) * len(broken)))


def train_quality(folder: Path, *, count: int = 1500) -> None:
    """Fit the head, a linear layer as LAION's, beside its CLIP model by logistic regression; 5 means as likely clean
    as not."""
    scorer = ClipScorer.from_folder(folder, preprocessing="published_aesthetic")
    images, labels = quality_frames(count, 0)
    embeddings = scorer.embed_images(images)
    head = nn.Linear(scorer.dim, 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(head(embeddings)[:, 0], labels)
        value = value + 1e-5 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    state = {"weight": head.weight.detach(), "bias": head.bias.detach() + THRESHOLD}
    save_file(state, folder / "aesthetic_head.safetensors")
