"""Small, untrained scorers of the real classes, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.checkpoint import seeded
from storymem.scorers.clip import ClipScorer
from storymem.scorers.hpsv3 import Hpsv3Scorer
from storymem.scorers.hpsv3_network import Hpsv3Network
from storymem.scorers.viclip import ViclipScorer

CONFIGS = Path(__file__).parents[2] / "configs" / "scorer"
CLIP_CONFIG: dict[str, Any] = yaml.safe_load((CONFIGS / "clip" / "tiny.yaml").read_text())["config"]
VICLIP_CONFIG: dict[str, Any] = yaml.safe_load((CONFIGS / "viclip" / "tiny.yaml").read_text())["config"]

# The special tokens of Qwen2-VL in their order; the reward token comes after them.
QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]

HPSV3_CONFIG = Qwen2VLConfig(
    text_config={
        "vocab_size": 256 + len(QWEN_TOKENS) + 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "initializer_range": 0.125,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    vision_config={
        **{"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        "initializer_range": 0.125,
    },
    image_token_id=256 + QWEN_TOKENS.index("<|image_pad|>"),
    video_token_id=256 + QWEN_TOKENS.index("<|video_pad|>"),
    vision_start_token_id=256 + QWEN_TOKENS.index("<|vision_start|>"),
    vision_end_token_id=256 + QWEN_TOKENS.index("<|vision_end|>"),
)


class TinyHpsv3(Hpsv3Scorer):
    pixels = 16 * 28 * 28


def images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random images in 0..1 that are exact in 8 bits."""
    noise = torch.rand(*shape[:-2], 6, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise.flatten(0, -4), size=shape[-2:], mode="bilinear")
    return (smooth.reshape(shape) * 255).round() / 255


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2-VL's kind of tokenizer with no merges: a token per byte, then its special tokens."""
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


def hpsv3(*, seed: int = 0, dtype: str = "float32", **arguments: Any) -> Hpsv3Scorer:
    network = seeded(seed, lambda: Hpsv3Network(HPSV3_CONFIG))
    return TinyHpsv3(network, byte_tokenizer(), dtype=dtype, **arguments)
