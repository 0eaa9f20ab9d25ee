"""Latents of training shots, computed once: the denoisers never see a pixel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem.wan.conditioning import blank_padded, encode_video, latent_mask
from toyworld.attributes import FRAMES, HEIGHT, WIDTH
from toyworld.vae import to_video
from toyworld.world import ToyShot, people_mask, render_layers, story

SHARD = 250  # shots in one file
BATCH = 5


@dataclass(frozen=True, kw_only=True)
class LatentShots:
    """Shots as the denoisers are trained on them; all latents normalised, float16.

    shots, firsts: [N, 16, 5, 8, 12], the shot, and the condition of its first frame (the frame and then blank).
    blank: [16, 5, 8, 12], the condition without a first frame. people: [N, 5, 8, 12], 1 where characters are.
    prompts: plain, and with looks.
    """

    shots: Tensor
    firsts: Tensor
    blank: Tensor
    people: Tensor
    prompts: list[str]
    described: list[str]


def shot_of_story(seed: int) -> tuple[ToyShot, str]:
    """One shot of a story (some go on from another), and its prompt with looks."""
    index = seed % 2
    return story(seed, shots=2).shots[index], story(seed, shots=2, looks=True).shots[index].prompt


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents [B, 16, T, h, w] of videos, as `storymem.wan` encodes them but in batches and bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return encode_video(vae, video.contiguous(memory_format=torch.channels_last_3d))


def channel_statistics(vae: AutoencoderKLWan, seeds: range) -> tuple[list[float], list[float]]:
    """Mean and deviation of every latent channel over shots, for the VAE's configuration."""
    plain = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for seed in seeds:
            video = to_video(shot_of_story(seed)[0].frames[None])
            plain.append(vae.encode(video).latent_dist.mode().float())
    values = torch.cat(plain).permute(1, 0, 2, 3, 4).flatten(1)
    return values.mean(dim=1).tolist(), values.std(dim=1).tolist()


def make_shard(vae: AutoencoderKLWan, first_seed: int, count: int = SHARD) -> LatentShots:
    """Encode one shot of each of `count` stories."""
    shots, firsts, people, prompts, described = [], [], [], [], []
    for start in range(first_seed, first_seed + count, BATCH):
        drawn = [shot_of_story(seed) for seed in range(start, min(start + BATCH, first_seed + count))]
        video = to_video(np.stack([shot.frames for shot, _ in drawn]))
        blanked = torch.cat([blank_padded(v[:, :1], FRAMES, HEIGHT, WIDTH) for v in video])
        shots.append(encode(vae, video).half())
        firsts.append(encode(vae, blanked).half())
        people += [
            latent_mask(torch.from_numpy(people_mask(*render_layers(shot, slice(None))))).half() for shot, _ in drawn
        ]
        prompts += [shot.prompt for shot, _ in drawn]
        described += [text for _, text in drawn]
    blank = encode(vae, blank_padded(None, FRAMES, HEIGHT, WIDTH))[0].half()
    return LatentShots(
        shots=torch.cat(shots),
        firsts=torch.cat(firsts),
        blank=blank,
        people=torch.stack(people),
        prompts=prompts,
        described=described,
    )


def fill_cache(vae: AutoencoderKLWan, folder: Path, shards: range, *, count: int = SHARD, start: int = 0) -> None:
    """Write the shards that are not there yet, each atomically: shots of the stories from `start` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in shards:
        path = folder / f"{index:04d}.pt"
        if path.exists():
            continue
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(vars(make_shard(vae, start + index * count, count)), part)
        os.replace(part, path)
        print(f"latents {path.name}", flush=True)


def load_cache(folder: Path) -> LatentShots:
    """All shards of a folder as one."""
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise ValueError(f"no latents in {folder}: run the stage `latents` first")
    parts = [torch.load(path, weights_only=True) for path in paths]
    return LatentShots(
        shots=torch.cat([part["shots"] for part in parts]),
        firsts=torch.cat([part["firsts"] for part in parts]),
        blank=parts[0]["blank"],
        people=torch.cat([part["people"] for part in parts]),
        prompts=[prompt for part in parts for prompt in part["prompts"]],
        described=[prompt for part in parts for prompt in part["described"]],
    )
