"""The toy VAE: `AutoencoderKLWan`, z 16, stride 4-8-8, trained on drawn shots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from toyworld.attributes import FRAMES
from toyworld.world import HELD_OUT, ToyShot, people_mask, render_layers, story

ARCHITECTURE = {
    "z_dim": 16,
    "base_dim": 16,
    "decoder_base_dim": 20,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    # As in Wan2.2's small VAE, pixels are first folded 2x2: the costly full-size layers fall away.
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}

KL_WEIGHT = 2e-3  # enough that a denoiser's small errors stay small when decoded
DENOISER_ERROR = 0.15  # of a latent channel's deviation; the decoder learns to overlook what a denoiser gets wrong
CLIPS = ((8, 1), (4, 5), (2, 17))  # how many clips of how many frames a step has
FOREGROUND = 3.0  # weight of characters, above that of the place


def build_vae(folder: Path | None = None) -> AutoencoderKLWan:
    """A fresh VAE, or that of a folder, in the memory layout that trains fastest on CPUs."""
    vae = (
        AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
        if folder
        else AutoencoderKLWan(**ARCHITECTURE)
    )
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return vae


def to_video(frames: npt.NDArray[np.uint8]) -> Tensor:
    """Frames uint8 [B, F, H, W, 3] to a video [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: Tensor) -> npt.NDArray[np.uint8]:
    """A video [B, 3, F, H, W] in -1..1 to frames uint8 [B, F, H, W, 3]."""
    levels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def training_clips(rng: torch.Generator, batch: int, frames: int) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] in -1..1, and their weights [B, 1, F, H, W]: characters count more."""
    seeds = torch.randint(HELD_OUT, (batch,), generator=rng).tolist()
    starts = torch.randint(FRAMES - frames + 1, (batch,), generator=rng).tolist()
    shots = [story(seed, shots=2).shots[seed % 2] for seed in seeds]
    drawn = [render_layers(shot, slice(at, at + frames)) for shot, at in zip(shots, starts, strict=True)]
    people = np.stack([people_mask(*layers) for layers in drawn])
    return to_video(np.stack([clip for clip, _ in drawn])), 1 + FOREGROUND * torch.from_numpy(people).float()[:, None]


def reconstruct(vae: AutoencoderKLWan, video: Tensor, *, sample: bool, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The video as decoded, unclamped so that gradients stay alive, and the mean KL per latent value.

    noise: added to the latents, relative to each channel's deviation.
    """
    trains_encoder = vae.quant_conv.weight.requires_grad and torch.is_grad_enabled()
    with torch.set_grad_enabled(trains_encoder):
        posterior = vae.encode(video.contiguous(memory_format=torch.channels_last_3d)).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp() if sample else mean
    if noise:
        latents = latents + noise * latents.std(dim=(0, 2, 3, 4), keepdim=True) * torch.randn_like(latents)
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents.to(posterior.mean.dtype))
    parts = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        part = hidden[:, :, i : i + 1]
        parts.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    decoded = unpatchify(torch.cat(parts, dim=2), vae.config.patch_size).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return decoded, kl


def vae_loss(vae: AutoencoderKLWan, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Weighted L1 and squared error, the same for differences of neighbours (edges), and a little KL.

    Clips of one frame (the causal VAE treats the first frame alone), of five and of all seventeen take turns.
    """
    batch, frames = CLIPS[int(torch.randint(len(CLIPS), (), generator=rng))]
    video, weight = (x.to(vae.device) for x in training_clips(rng, batch, frames))
    is_frozen = not vae.quant_conv.weight.requires_grad
    noise = DENOISER_ERROR * float(torch.rand((), generator=rng)) if is_frozen else 0.0
    decoded, kl = reconstruct(vae, video, sample=True, noise=noise)
    error = decoded - video
    mean_weight = weight.mean()
    pixels = (weight * (error.abs() + 2 * error.square())).mean() / mean_weight
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    loss = pixels + 0.5 * edges / mean_weight + KL_WEIGHT * kl
    return loss, {"mse": float(error.detach().square().mean()), "kl": float(kl.detach()), "frames": frames}


@torch.no_grad()
def decoded(vae: AutoencoderKLWan, shot: ToyShot) -> tuple[npt.NDArray[np.uint8], float]:
    """The frames of a shot after encoding and decoding, uint8 [17, 64, 96, 3], and their PSNR in dB."""
    with torch.autocast(vae.device.type, torch.bfloat16):
        video, _ = reconstruct(vae, to_video(shot.frames[None]).to(vae.device), sample=False)
    frames = to_frames(video)[0]
    error = np.square(frames.astype(np.float64) - shot.frames).mean()
    return frames, float(10 * np.log10(255**2 / max(error, 1e-6)))
