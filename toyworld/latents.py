"""Latents of training stories, computed once and stored in files: the base model never sees a pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem.io import replacing
from storymem.wan.conditioning import blank_padded, encode_video, latent_mask
from toyworld.attributes import FRAMES, HEIGHT, WIDTH
from toyworld.vae import to_video
from toyworld.world import people_mask, render_layers, story

SHARD = 32  # stories in one file of about 7 MB
KEYFRAMES = 2  # of each shot, as memory of later ones
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class LatentStories:
    """The shots of whole stories, in order; latents are normalised and in float16.

    Args:
        shots: [N, 16, 5, 8, 12].
        people: where characters are, [N, 5, 8, 12] in 0..1.
        keyframes: frames of each shot, encoded alone, [N, 2, 16, 8, 12].
        key_people: where characters are in them, [N, 2, 8, 12].
        firsts: condition of the shots that begin with a given frame, [K, 16, 5, 8, 12].
        first_of: [N], the row of `firsts`, or -1.
        blank: condition without a given frame, [16, 5, 8, 12].
        number: [N], of the shot in its story, from 0.
        characters: [N], how many the story has.
        prompts: as films have them.
        described: the same with looks.
    """

    shots: Tensor
    people: Tensor
    keyframes: Tensor
    key_people: Tensor
    firsts: Tensor
    first_of: Tensor
    blank: Tensor
    number: Tensor
    characters: Tensor
    prompts: list[str]
    described: list[str]

    def to(self, device: torch.device) -> LatentStories:
        """The same with its latents on another device; what rows are drawn by stays on the CPU."""
        moved = ("shots", "people", "keyframes", "key_people", "firsts", "first_of", "blank")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents [B, 16, T, h, w] of videos, as `storymem.wan` encodes them but in batches and bfloat16."""
    with torch.autocast(vae.device.type, torch.bfloat16):
        parts = [
            encode_video(vae, part.contiguous(memory_format=torch.channels_last_3d)) for part in video.split(BATCH)
        ]
    return torch.cat(parts).half().cpu()


@torch.no_grad()
def channel_statistics(vae: AutoencoderKLWan, seeds: range) -> dict[str, list[float]]:
    """Mean and deviation of every latent channel over the shots of some stories, for the VAE's configuration."""
    shots = [shot for seed in seeds for shot in story(seed, shots=2).shots]
    videos = to_video(np.stack([shot.frames for shot in shots])).to(vae.device)
    plain = torch.cat([vae.encode(part).latent_dist.mode().float() for part in videos.split(BATCH)])
    values = plain.transpose(0, 1).flatten(1)
    return {"latents_mean": values.mean(dim=1).tolist(), "latents_std": values.std(dim=1).tolist()}


def encode_stories(vae: AutoencoderKLWan, seeds: range) -> LatentStories:
    """Draw and encode all shots of some stories."""
    rng = np.random.default_rng([17, seeds.start])
    stories = [story(seed) for seed in seeds]
    shots = [shot for one in stories for shot in one.shots]
    described = [shot.prompt for seed in seeds for shot in story(seed, looks=True).shots]
    drawn = [render_layers(shot, slice(None)) for shot in shots]
    masks = [torch.from_numpy(people_mask(*layers)) for layers in drawn]
    videos = to_video(np.stack([frames for frames, _ in drawn]))
    chosen = torch.from_numpy(np.sort(rng.integers(FRAMES, size=(len(shots), KEYFRAMES)), axis=1))
    keys = torch.stack([video[:, at] for video, at in zip(videos, chosen, strict=True)]).transpose(1, 2)
    of_keys = [latent_mask(mask[[at]])[0] for mask, ats in zip(masks, chosen.tolist(), strict=True) for at in ats]
    joined = torch.tensor([not shot.cut for shot in shots])
    blanked = [blank_padded(video[:, :1], FRAMES, HEIGHT, WIDTH) for video in videos[joined]]
    return LatentStories(
        shots=encode(vae, videos),
        people=torch.stack([latent_mask(mask) for mask in masks]).half(),
        keyframes=encode(vae, keys.flatten(0, 1)[:, :, None])[:, :, 0].unflatten(0, (-1, KEYFRAMES)),
        key_people=torch.stack(of_keys).half().unflatten(0, (-1, KEYFRAMES)),
        firsts=encode(vae, torch.cat([*blanked, blank_padded(None, FRAMES, HEIGHT, WIDTH)]))[:-1],
        first_of=torch.where(joined, joined.cumsum(0) - 1, -1),
        blank=encode(vae, blank_padded(None, FRAMES, HEIGHT, WIDTH))[0],
        number=torch.arange(len(shots)) % (len(shots) // len(seeds)),
        characters=torch.tensor([len(one.cast) for one in stories for _ in one.shots]),
        prompts=[shot.prompt for shot in shots],
        described=described,
    )


def fill_cache(
    vae: AutoencoderKLWan, folder: Path, shards: range, *, stories: int = SHARD, start: int = 0
) -> Iterator[Path]:
    """Write the shards that are not there yet, each whole or not at all: the stories from `start` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in shards:
        path = folder / f"{index:04d}.pt"
        if not path.exists():
            first = start + index * stories
            encoded = encode_stories(vae, range(first, first + stories))
            with replacing(path) as partial:
                torch.save(vars(encoded), partial)
        yield path


def load_cache(folder: Path) -> LatentStories:
    """All shards of a folder as one."""
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise ValueError(f"no latents in {folder}: run the stage `latents` first")
    parts = [LatentStories(**torch.load(path, weights_only=True)) for path in paths]
    offsets = np.cumsum([0, *(len(part.firsts) for part in parts)])
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("shots", "people", "keyframes", "key_people", "firsts", "number", "characters")
    }
    rows = [
        torch.where(part.first_of >= 0, part.first_of + int(k), -1) for part, k in zip(parts, offsets, strict=False)
    ]
    return LatentStories(
        **joined,
        first_of=torch.cat(rows),
        blank=parts[0].blank,
        prompts=[prompt for part in parts for prompt in part.prompts],
        described=[prompt for part in parts for prompt in part.described],
    )
