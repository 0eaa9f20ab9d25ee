"""What a memory-to-video network is told besides the text: 20 condition channels beside the 16 noisy ones.

All functions are pure and work on tensors, so generation and training build the same condition. Letters as in the
paper: M memory frames, F video frames, T = (F - 1) / 4 + 1 latent frames, S the RoPE stride of the memory.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from torch.nn import functional as F

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
MASK_CHANNELS = 4
MOTION_FRAMES = 5


def latent_frames(frames: int) -> int:
    """T for F video frames (F = 4n + 1); 0 for none.

    Raises:
        ValueError: if F is not 4n + 1.
    """
    if frames == 0:
        return 0
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        below = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        raise ValueError(
            f"a shot has 4n + 1 frames, not {frames}: the nearest are {below} and {below + TEMPORAL_STRIDE}"
        )
    return (frames - 1) // TEMPORAL_STRIDE + 1


def normalise_latents(latents: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """VAE latents [B, 16, T, h, w] to zero mean and unit deviation per channel."""
    mean, std = _channel_statistics(vae, latents)
    return (latents - mean) * (1.0 / std)


def denormalise_latents(latents: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The inverse of :func:`normalise_latents`."""
    mean, std = _channel_statistics(vae, latents)
    return latents * std + mean


def _channel_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(like.device, like.dtype)
    std = torch.tensor(vae.config.latents_std).view(shape).to(like.device, like.dtype)
    return mean, std


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents [B, 16, T, h, w], float32, of a video [B, 3, F, H, W] in -1..1.

    The mode of the posterior is taken, as in the published code, so that a frame always has the same latents.
    """
    video = video.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    latents = vae.encode(video).latent_dist.mode().float()
    return normalise_latents(latents, vae)


def encode_frames(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Normalised latents [M, 16, 1, h, w] of pictures [M, 3, H, W] in -1..1, each encoded alone.

    One at a time: together they would be a video to the causal VAE, and the peak memory of one frame is small.
    """
    return torch.cat([encode_video(vae, frame[None, :, None]) for frame in frames])


@torch.no_grad()
def decode_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The video [B, 3, F, H, W] in -1..1 of normalised latents [B, 16, T, h, w]."""
    latents = latents.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    return vae.decode(denormalise_latents(latents, vae), return_dict=False)[0]


def blank_padded(given: Tensor | None, frames: int, height: int, width: int) -> Tensor:
    """The video that conditions a shot: ``given`` frames [3, n, H, W] first, zeros (mid-grey) after.

    Returns [1, 3, F, H, W] in -1..1.
    """
    video = torch.zeros(1, 3, frames, height, width)
    if given is not None:
        video[0, :, : given.shape[1]] = given
    return video


def condition_mask(memory_frames: int, video_slots: int, given_slots: int, height: int, width: int) -> Tensor:
    """Mask channels [1, 4, M + T, h, w]: 1 where the condition latents are to be believed.

    Args:
        memory_frames: M; memory slots are always believed.
        video_slots: T.
        given_slots: latent frames of the shot that are given: 0 (M2V), 1 (first frame, MI2V) or 2 (five motion
            frames, MM2V).
        height: h, in latent pixels.
        width: w, in latent pixels.
    """
    mask = torch.zeros(1, MASK_CHANNELS, memory_frames + video_slots, height, width)
    mask[:, :, : memory_frames + given_slots] = 1.0
    return mask


def latent_mask(mask: Tensor) -> Tensor:
    """A mask of pixels [F, H, W] for the latents of those frames: [T, h, w], the largest value in each latent's reach.

    As the causal VAE divides time: the first frame alone, then four at a time.
    """
    first, rest = mask[:1, None].float(), mask[1:, None].float()
    parts = [F.max_pool2d(first, SPATIAL_STRIDE)[:, 0]]
    if len(rest):
        coarse = F.max_pool2d(rest, SPATIAL_STRIDE)[:, 0]
        parts.append(coarse.unflatten(0, (-1, TEMPORAL_STRIDE)).amax(dim=1))
    return torch.cat(parts)


def memory_condition(memory: Tensor | None, video: Tensor, given_slots: int) -> Tensor:
    """The condition [B, 20, M + T, h, w]: mask and latents, memory slots first.

    Args:
        memory: normalised one-frame latents [B, 16, M, h, w], or None for no memory.
        video: normalised latents [B, 16, T, h, w] of the blank-padded video.
        given_slots: see :func:`condition_mask`.
    """
    latents = video if memory is None else torch.cat([memory.to(video), video], dim=2)
    batch, _, slots, height, width = latents.shape
    mask = condition_mask(slots - video.shape[2], video.shape[2], given_slots, height, width)
    return torch.cat([mask.to(latents).expand(batch, -1, -1, -1, -1), latents], dim=1)
