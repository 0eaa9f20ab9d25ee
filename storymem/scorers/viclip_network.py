"""The ViCLIP network (InternVid, arXiv 2307.06942), with the parameter names of the published checkpoints."""

from __future__ import annotations

from typing import Annotated

import torch
from einops import rearrange
from open_clip.transformer import QuickGELU, TextTransformer, Transformer
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.config import STRICT
from storymem.scorers.checkpoint import Count, Width


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ViclipConfig:
    """Sizes of a ViCLIP network; the defaults are those of L/14.

    Args:
        resolution: side of the square input in pixels.
        patch: side of a patch in pixels.
        width, layers, heads: of the vision tower.
        output_dim: length of the embeddings.
        num_frames: frames of a clip.
        text_width, text_layers, text_heads: of the text tower.
        context_length: tokens of a text, start and end included.
        vocab_size: rows of the token embedding.
    """

    resolution: Annotated[int, Field(ge=1, le=1024)] = 224
    patch: Annotated[int, Field(ge=1, le=256)] = 14
    width: Width = 1024
    layers: Count = 24
    heads: Count = 16
    output_dim: Width = 768
    num_frames: Annotated[int, Field(ge=1, le=256)] = 8
    text_width: Width = 768
    text_layers: Count = 12
    text_heads: Count = 12
    context_length: Annotated[int, Field(ge=3, le=4096)] = 32
    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)] = 49408

    def __post_init__(self) -> None:
        for width, heads in (("width", "heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width}={getattr(self, width)} is not a multiple of {heads}={getattr(self, heads)}")
        if not self.patch <= self.resolution <= 128 * self.patch:
            raise ValueError(f"resolution={self.resolution} is not 1 to 128 times patch={self.patch}")


VICLIP_L_14 = ViclipConfig()
VICLIP_B_16 = ViclipConfig(patch=16, width=768, layers=12, heads=12, output_dim=512, text_width=512, text_heads=8)


class VisionEncoder(nn.Module):
    """Joint space-time attention over all patches of a clip and one class token.

    Every token is used: the original drops nine in ten at random unless it is put into test mode.
    """

    def __init__(self, config: ViclipConfig) -> None:
        super().__init__()
        width, scale = config.width, config.width**-0.5
        self.patch, self.num_frames = config.patch, config.num_frames
        self.conv1 = nn.Conv3d(3, width, (1, config.patch, config.patch), (1, config.patch, config.patch), bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        patches = (config.resolution // config.patch) ** 2
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + patches, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, act_layer=QuickGELU)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.output_dim))

    def forward(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W], normalised, T = ``num_frames`` or 1 -> [B, output_dim], not normalised."""
        batch, frames = video.shape[:2]
        # The kernel spans one frame, so the 3-D convolution is a 2-D one over frames, and much faster.
        patches = F.conv2d(video.flatten(0, 1), self.conv1.weight[:, :, 0], stride=self.patch)
        x = rearrange(patches, "(b t) c h w -> b t (h w) c", b=batch)
        x = x + self.positional_embedding[1:] + self._time(frames)[:, :, None]
        first = (self.class_embedding + self.positional_embedding[0]).expand(batch, 1, -1)
        x = torch.cat([first, rearrange(x, "b t n c -> b (t n) c")], dim=1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj

    def _time(self, frames: int) -> Tensor:
        """Temporal embedding [1, T, width]; a single frame gets the mean of all."""
        if frames == self.num_frames:
            return self.temporal_positional_embedding
        if frames == 1:
            return self.temporal_positional_embedding.mean(dim=1, keepdim=True)
        raise ValueError(f"ViCLIP takes clips of {self.num_frames} frames or of 1; got {frames}")


class Viclip(nn.Module):
    """Both towers. ``temp``, the training temperature, is part of the checkpoint; scores do not use it."""

    def __init__(self, config: ViclipConfig) -> None:
        super().__init__()
        self.config = config
        self.temp = nn.Parameter(torch.tensor(1 / 100.0))
        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            output_dim=config.output_dim,
            act_layer=QuickGELU,
        )
