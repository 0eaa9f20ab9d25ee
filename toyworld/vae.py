"""The toy VAE: `AutoencoderKLWan`, z 16, stride 4-8-8, trained on drawn shots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from PIL import Image
from torch import Tensor

from toyworld.fitting import Run, Schedule, fit
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
FOREGROUND = 3.0  # characters are small in the picture but what the eye looks at


def build_vae() -> AutoencoderKLWan:
    """A fresh VAE in the memory layout that trains fastest on CPUs."""
    vae = AutoencoderKLWan(**ARCHITECTURE)
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
    return levels.permute(0, 2, 3, 4, 1).contiguous().numpy()


def random_shot(rng: np.random.Generator) -> ToyShot:
    """A shot of a random training story."""
    return story(int(rng.integers(0, HELD_OUT)), shots=1).shots[0]


def training_clips(step: int, batch: int, frames: int) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] in -1..1 for a step, and their weights [B, 1, F, H, W]: characters count more."""
    rng = np.random.default_rng([7, step])
    clips, people = [], []
    for _ in range(batch):
        shot = random_shot(rng)
        start = int(rng.integers(0, len(shot.camera) - frames + 1))
        drawn, empty = render_layers(shot, slice(start, start + frames))
        clips.append(drawn)
        people.append(people_mask(drawn, empty))
    weight = 1 + FOREGROUND * torch.from_numpy(np.stack(people)).float()
    return to_video(np.stack(clips)), weight[:, None]


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


def clip_plan(progress: float) -> tuple[int, int]:
    """Batch and frames: single frames first (the causal VAE treats them alone), then longer and longer clips."""
    for until, batch, frames in ((0.12, 8, 1), (0.32, 4, 5), (0.53, 3, 9), (1.1, 2, 17)):
        if progress < until:
            return batch, frames
    raise AssertionError(progress)


def vae_loss(vae: AutoencoderKLWan, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Weighted L1 and squared error, the same for differences of neighbours (edges), and a little KL."""
    video, weight = training_clips(step, *clip_plan(progress))
    is_frozen = not vae.quant_conv.weight.requires_grad
    noise = DENOISER_ERROR * float(torch.rand(())) if is_frozen else 0.0
    with torch.autocast("cpu", torch.bfloat16):
        decoded, kl = reconstruct(vae, video, sample=True, noise=noise)
    error = decoded - video
    mean_weight = weight.mean()
    pixels = (weight * (error.abs() + 2 * error.square())).mean() / mean_weight
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    loss = pixels + 0.5 * edges / mean_weight + KL_WEIGHT * kl
    return loss, {"mse": float(error.detach().square().mean()), "kl": float(kl.detach()), "frames": video.shape[2]}


def held_out_shots(count: int, offset: int = 0) -> list[ToyShot]:
    """One shot each of `count` stories that no training sees."""
    return [story(HELD_OUT + offset + i).shots[i % 8] for i in range(count)]


@torch.no_grad()
def psnr_of(vae: AutoencoderKLWan, shots: list[ToyShot], frames: int = 17) -> tuple[float, npt.NDArray[np.uint8]]:
    """Mean PSNR in dB over shots of whole decoded clips as uint8, and the decoded frames [N, F, H, W, 3]."""
    values, decoded = [], []
    for shot in shots:
        truth = shot.frames[:frames]
        with torch.autocast("cpu", torch.bfloat16):
            video, _ = reconstruct(vae, to_video(truth[None]), sample=False)
        decoded.append(to_frames(video)[0])
        error = np.square(decoded[-1].astype(np.float64) - truth).mean()
        values.append(10 * np.log10(255**2 / max(error, 1e-6)))
    return float(np.mean(values)), np.stack(decoded)


def picture(path: Path, *rows: npt.NDArray[np.uint8]) -> None:
    """Rows of frames [N, H, W, 3] as one picture, doubled in size."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1)).save(path)


def train_vae(
    run: Run, schedule: Schedule, vae: AutoencoderKLWan, *, only_decoder: bool = False, held_out: int = 24
) -> None:
    """Train (or go on training) the VAE; logs the held-out PSNR and draws true above decoded frames.

    only_decoder: keep the encoder, so that latents computed with it stay valid while pictures get sharper.
    """
    torch.manual_seed(0)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not only_decoder)
    shots = held_out_shots(held_out)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        return vae_loss(vae, step, 0.5 + 0.5 * progress if only_decoder else progress)

    def report(step: int) -> None:
        single, _ = psnr_of(vae, shots, 1)
        clip, decoded = psnr_of(vae, shots)
        run.log(step=step, held_out_psnr_frame=single, held_out_psnr_clip=clip)
        truth = np.stack([shot.frames for shot in shots])
        rows = (truth[:8, 8], decoded[:8, 8], truth[-8:, 16], decoded[-8:, 16])
        picture(run.folder / f"decoded_{step:06d}.png", *rows)

    fit(vae, run, schedule, loss, report=report)
