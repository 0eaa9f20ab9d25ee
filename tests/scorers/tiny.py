"""Small, untrained scorers of the real classes, and pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.hpsv3 import Hpsv3Scorer
from storymem.scorers.hpsv3_network import Hpsv3Config
from storymem.scorers.viclip import ViclipScorer

CONFIGS = Path(__file__).parents[2] / "configs" / "scorer"
CLIP_CONFIG: dict[str, Any] = yaml.safe_load((CONFIGS / "clip" / "tiny.yaml").read_text())["config"]
VICLIP_CONFIG: dict[str, Any] = yaml.safe_load((CONFIGS / "viclip" / "tiny.yaml").read_text())["config"]

# The special tokens of Qwen2-VL in their order; the reward token comes after them.
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

HPSV3_CONFIG = Hpsv3Config(
    hidden=64,
    intermediate=128,
    layers=2,
    heads=2,
    kv_heads=1,
    mrope_section=[4, 6, 6],
    vocab_size=256 + len(QWEN_TOKENS) + 1,
    max_position=4096,
    vision_depth=1,
    vision_width=64,
    vision_heads=2,
    vision_mlp_ratio=2,
    head_widths=[32, 16],
    vision_start=256 + QWEN_TOKENS.index("<|vision_start|>"),
    vision_end=256 + QWEN_TOKENS.index("<|vision_end|>"),
    image_token=256 + QWEN_TOKENS.index("<|image_pad|>"),
    video_token=256 + QWEN_TOKENS.index("<|video_pad|>"),
    reward_token=256 + len(QWEN_TOKENS),
    pixels=16 * 28 * 28,
)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random pictures in 0..1 that are exact in 8 bits."""
    noise = torch.rand(*shape[:-2], 6, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise.flatten(0, -4), size=shape[-2:], mode="bilinear")
    return (smooth.reshape(shape) * 255).round() / 255


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2-VL's kind of tokenizer with no merges: a token a byte, then its special tokens."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(QWEN_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def clip(**arguments: Any) -> ClipScorer:
    return ClipScorer.from_config(CLIP_CONFIG, **arguments)


def aesthetic(**arguments: Any) -> AestheticScorer:
    return AestheticScorer.from_config(CLIP_CONFIG, **arguments)


def viclip(**arguments: Any) -> ViclipScorer:
    return ViclipScorer.from_config(VICLIP_CONFIG, **arguments)


def hpsv3(**arguments: Any) -> Hpsv3Scorer:
    return Hpsv3Scorer.from_config(HPSV3_CONFIG, byte_tokenizer(), **arguments)
