"""Toy CLIP and ViCLIP, trained contrastively on the world, and the quality head on CLIP's embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.scorers.clip import ClipScorer, ClipTokenizer
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop_in_bytes, normalise, squash
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer, middle_frames
from storymem.scorers.viclip_network import Viclip, ViclipConfig
from toyworld.attributes import FRAMES
from toyworld.damage import DAMAGES, damage
from toyworld.fitting import Run, Schedule, fit
from toyworld.vocabulary import VOCABULARY, write_vocabulary
from toyworld.world import HELD_OUT, ToyShot, render, story

SIDE = 64
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 4, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2},
}
VICLIP_CONFIG = ViclipConfig(
    resolution=SIDE,
    patch=16,
    width=64,
    layers=4,
    heads=4,
    output_dim=64,
    text_width=16,
    text_layers=2,
    text_heads=2,
    vocab_size=VOCABULARY,
)
PROBE_SCALE = 10.0
DAMAGED = 0.4  # of CLIP's pictures, with the damage in their text
THRESHOLD = 5.0  # of the quality head: a drawn frame that scores less is more likely damaged than clean


def _shots(step: int, count: int, start: int = 0) -> list[tuple[ToyShot, str]]:
    """Shots for a step, half of them with looks in their text."""
    rng = np.random.default_rng([11, step])
    seeds = start + rng.integers(0, HELD_OUT, size=count)
    return [_shot(int(seed), looks=bool(rng.random() < 0.5)) for seed in seeds]


def _shot(seed: int, *, looks: bool) -> tuple[ToyShot, str]:
    shot = story(seed, shots=2, looks=looks).shots[seed % 2]
    return shot, shot.prompt


def picture_batch(step: int, count: int, start: int = 0) -> tuple[Tensor, list[str], Tensor]:
    """Pictures [N, 3, 64, 96] in 0..1, their texts, and 1 for clean ones [N]; damaged ones say so in the text."""
    rng = np.random.default_rng([12, step])
    pictures, texts, clean = [], [], []
    for shot, text in _shots(step, count, start):
        at = int(rng.integers(FRAMES))
        frame = render(shot, slice(at, at + 1))[0]
        clean.append(float(rng.random() >= DAMAGED))
        if not clean[-1]:
            kind = str(rng.choice(DAMAGES))
            frame, text = damage(rng, frame, kind), f"{kind.capitalize()}. {text}"
        pictures.append(frame)
        texts.append(text)
    return as_images(np.stack(pictures)), texts, torch.tensor(clean)


def contrastive_loss(pictures: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over a batch of pairs."""
    logits = scale * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def build_clip() -> open_clip.CLIP:
    """A fresh CLIP."""
    torch.manual_seed(1)
    return open_clip.CLIP(**json.loads(json.dumps(CLIP_CONFIG)))


def build_viclip() -> Viclip:
    """A fresh ViCLIP."""
    torch.manual_seed(2)
    network = Viclip(VICLIP_CONFIG)
    nn.init.normal_(network.vision_encoder.temporal_positional_embedding, std=0.05)
    return network


class ClipTraining(nn.Module):
    """CLIP and a linear probe of its unit-length picture embeddings for damage, which is thrown away afterwards.

    A contrastive loss alone leaves fine damage nearly invisible; the probe makes the embeddings keep what the
    quality head needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = build_clip()
        self.probe = nn.Linear(CLIP_CONFIG["embed_dim"], 1)

    def forward(self, pixels: Tensor, ids: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and the probe's cross-entropy."""
        with torch.autocast("cpu", torch.bfloat16):
            seen, said = self.network.encode_image(pixels), self.network.encode_text(ids)
        pairs = contrastive_loss(seen.float(), said.float(), self.network.logit_scale.exp().clamp(max=100))
        logits = PROBE_SCALE * self.probe(F.normalize(seen.float(), dim=-1))[:, 0]
        return pairs, F.binary_cross_entropy_with_logits(logits, clean)


def train_clip(
    run: Run, schedule: Schedule, training: ClipTraining, *, size: int = 64, held_out: int = 100
) -> ClipScorer:
    """Train CLIP; both published preprocessings are shown to it in turn."""
    network = training.network
    tokenizer = ClipTokenizer(network.context_length, write_vocabulary(run.folder))

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        pictures, texts, clean = picture_batch(step, size)
        prepare = squash if step % 2 else crop_in_bytes
        pixels = normalise(prepare(pictures, SIDE), CLIP_MEAN, CLIP_STD)
        pairs, damage_loss = training(pixels, tokenizer(texts), clean)
        return pairs + damage_loss, {"pairs": float(pairs.detach()), "damage": float(damage_loss.detach())}

    scorer = ClipScorer(network, tokenizer=tokenizer)

    def report(step: int) -> None:
        run.log(step=step, place_and_time_top1=place_and_time_top1(scorer, held_out))

    training.requires_grad_(True).train()
    fit(training, run, schedule, loss, report=report)
    return scorer


def place_and_time_top1(scorer: ClipScorer, count: int) -> float:
    """Share of held-out frames whose nearest sentence, among those of all the shots, has their place and time."""
    shots = [story(HELD_OUT + i).shots[i % 8] for i in range(count)]
    frames = np.concatenate([render(shot, slice(8, 9)) for shot in shots])
    scores = scorer.embed_images(as_images(frames)) @ scorer.embed_texts([shot.prompt for shot in shots]).T
    best = [shots[i] for i in scores.argmax(dim=1).tolist()]
    return float(np.mean([(a.place, a.time) == (b.place, b.time) for a, b in zip(shots, best, strict=True)]))


def save_clip(scorer: ClipScorer, folder: Path) -> None:
    """Write the model as a folder in open_clip's layout, weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in scorer.network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def train_viclip(run: Run, schedule: Schedule, *, size: int = 32, held_out: int = 64) -> ViclipScorer:
    """Train ViCLIP on eight frames of each shot, as the profile "vbench" chooses and crops them."""
    network = build_viclip()
    tokenizer = ClipTokenizer(VICLIP_CONFIG.context_length, write_vocabulary(run.folder))
    frames = middle_frames(FRAMES, VICLIP_CONFIG.num_frames)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        pairs = _shots(step, size)
        clips = as_images(np.stack([shot.frames[frames] for shot, _ in pairs]))
        pixels = normalise(crop_in_bytes(clips.flatten(0, 1), SIDE), CLIP_MEAN, CLIP_STD)
        with torch.autocast("cpu", torch.bfloat16):
            seen = network.vision_encoder(pixels.unflatten(0, clips.shape[:2]))
            said = network.text_encoder(tokenizer([text for _, text in pairs]))
        return contrastive_loss(seen.float(), said.float(), 1 / network.temp.clamp(min=0.01)), {}

    scorer = ViclipScorer(network, tokenizer=tokenizer)

    def report(step: int) -> None:
        run.log(step=step, place_time_action_top1=clip_top1(scorer, held_out))

    network.requires_grad_(True).train()
    fit(network, run, schedule, loss, report=report)
    return scorer


def save_viclip(scorer: ViclipScorer, folder: Path) -> None:
    """Write sizes, vocabulary and weights (float16) as `ViclipScorer.from_folder` reads them."""
    scorer.save(folder)
    write_vocabulary(folder)
    state = {name: value.half().contiguous() for name, value in scorer.network.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def clip_top1(scorer: ViclipScorer, count: int) -> float:
    """Share of held-out shots whose nearest sentence has their place, time and action."""
    shots = [story(HELD_OUT + i).shots[i % 8] for i in range(count)]
    clips = as_images(np.stack([shot.frames for shot in shots]))
    scores = scorer.embed_clips(clips) @ scorer.embed_texts([shot.prompt for shot in shots]).T
    best = [shots[i] for i in scores.argmax(dim=1).tolist()]
    same = [(a.place, a.time, a.action) == (b.place, b.time, b.action) for a, b in zip(shots, best, strict=True)]
    return float(np.mean(same))


def quality_frames(count: int, start: int) -> tuple[Tensor, Tensor]:
    """As many clean as damaged pictures [2 N, 3, 64, 96] in 0..1, and 1 for clean, 0 for damaged [2 N]."""
    rng = np.random.default_rng([13, start])
    clean = np.stack([shot.frames[int(rng.integers(FRAMES))] for shot, _ in _shots(start, count, start)])
    other = [shot.frames[int(rng.integers(FRAMES))] for shot, _ in _shots(start + 1, count, start)]
    broken = np.stack([damage(rng, frame, DAMAGES[i % len(DAMAGES)]) for i, frame in enumerate(other)])
    labels = torch.cat([torch.ones(count), torch.zeros(count)])
    return as_images(np.concatenate([clean, broken])), labels


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a clean frame scores above a damaged one (ties count half)."""
    clean, broken = scores[labels == 1], scores[labels == 0]
    above = (clean[:, None] > broken[None]).float() + 0.5 * (clean[:, None] == broken[None]).float()
    return float(above.mean())


def train_quality(run: Run, clip_folder: Path, *, count: int = 1500, held_out: int = 400) -> nn.Linear:
    """Logistic regression on CLIP's embeddings: one linear layer, as LAION's; 5 means as likely clean as not."""
    scorer = ClipScorer.from_folder(clip_folder, preprocessing="published_aesthetic")
    pictures, labels = quality_frames(count, 0)
    embeddings = scorer.embed_images(pictures)
    head = nn.Linear(scorer.dim, 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(head(embeddings)[:, 0], labels)
        value = value + 1e-5 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        head.bias.add_(THRESHOLD)
    unseen, truth = quality_frames(held_out, HELD_OUT)
    with torch.no_grad():
        scores = head(scorer.embed_images(unseen))[:, 0]
    run.log(auroc=auroc(scores, truth), passed=float((scores[truth == 1] >= THRESHOLD).float().mean()))
    return head


def save_quality(head: nn.Linear, folder: Path) -> None:
    """Write the head beside its CLIP model."""
    state = {"weight": head.weight.detach().contiguous(), "bias": head.bias.detach().contiguous()}
    save_file(state, folder / "aesthetic_head.safetensors")
