"""What a network is given besides the text: condition channels or clean frames, memory first.

All functions are pure and work on tensors, so generation and training build the same condition. Letters as in the
paper: M memory frames, F video frames, T latent frames of video, z latent channels.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from einops import rearrange, reduce
from torch import Tensor

from storymem.wan.spec import A14B, ModelSpec

MOTION_FRAMES = 5


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents [B, z, T, h, w], float32, of a video [B, 3, F, H, W] in -1..1.

    The mode of the posterior is taken, as in the published code, so that a frame always has the same latents.
    """
    video = video.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    latents = vae.encode(video).latent_dist.mode().float()
    mean, std = _statistics(vae, latents)
    return (latents - mean) * (1.0 / std)


def encode_frames(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Normalised latents [M, z, 1, h, w] of images [M, 3, H, W] in -1..1, each encoded alone.

    One at a time: together they would be a video to the causal VAE, and the peak VRAM of one frame is small.
    """
    return torch.cat([encode_video(vae, frame[None, :, None]) for frame in frames])


@torch.no_grad()
def decode_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The video [B, 3, F, H, W] in -1..1 of normalised latents [B, z, T, h, w]."""
    latents = latents.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    mean, std = _statistics(vae, latents)
    return vae.decode(latents * std + mean, return_dict=False)[0]


def blank_padded(given: Tensor | None, frames: int, height: int, width: int) -> Tensor:
    """The video that conditions a shot: ``given`` frames [3, n, H, W] first, zeros (mid-grey) after.

    Returns [1, 3, F, H, W] in -1..1.
    """
    video = torch.zeros(1, 3, frames, height, width)
    if given is not None:
        video[0, :, : given.shape[1]] = given
    return video


def condition_channels(memory: Tensor | None, video: Tensor, given: int, spec: ModelSpec = A14B) -> Tensor:
    """The condition [B, mask + z, M + T, h, w]: mask, then clean latents; memory frames first.

    The mask is 1 where the clean latents are given: in memory frames and in the first ``given`` latent frames.

    Args:
        memory: normalised one-frame latents [B, z, M, h, w], or None for no memory.
        video: normalised latents [B, z, T, h, w] of the blank-padded video.
        given: latent frames of the shot that are given: 0 (M2V), 1 (first frame, MI2V) or 2 (five frames, MM2V).
        spec: the base model; it must have condition channels.
    """
    latents = video if memory is None else torch.cat([memory.to(video), video], dim=2)
    mask = torch.zeros_like(latents[:, : spec.mask_channels])
    mask[:, :, : latents.shape[2] - video.shape[2] + given] = 1.0
    return torch.cat([mask, latents], dim=1)


def model_input(latents: Tensor, condition: Tensor | None) -> Tensor:
    """What a network sees: latents [B, z, N, h, w] with the condition's channels, where the base model has them."""
    if condition is None:
        return latents
    return torch.cat([latents, condition.to(latents).expand(latents.shape[0], -1, -1, -1, -1)], dim=1)


def memory_input(memory: Tensor, spec: ModelSpec = A14B) -> Tensor:
    """What a network sees of clean memory frames [B, z, M, h, w]."""
    if not spec.condition_channels:
        return memory
    return model_input(memory, condition_channels(memory, memory[:, :, :0], 0, spec))


def latent_mask(mask: Tensor, spec: ModelSpec = A14B) -> Tensor:
    """A mask of pixels [F, H, W] for the latents of those frames: [T, h, w], the largest value in each latent's reach.

    As the causal VAE divides time: the first frame alone, then ``temporal_stride`` at a time.
    """
    side, stride = spec.spatial_stride, spec.temporal_stride
    coarse = reduce(mask.float(), "f (h p) (w q) -> f h w", "max", p=side, q=side)
    return torch.cat([coarse[:1], rearrange(coarse[1:], "(t s) h w -> t s h w", s=stride).amax(dim=1)])
