"""Adapters for tests: small experts, the matrices of an adapter, and what both compute together."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LAYOUTS = ["storymem", "released", "diffusers", "comfyui"]
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40}
A14B = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
OTHERS = {"in_channels": 36, "out_channels": 16, "text_dim": 24, "freq_dim": 32}
# The published names, written out here once more: what the original network calls the ten linears of a block.
ORIGINAL = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
ADAPTED = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ffn.net.0.proj", "ffn.net.2"]
TO_DIFFUSERS = dict(zip(ORIGINAL, ADAPTED, strict=True))


def expert(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**TINY, **OTHERS).eval()


def pipeline(transformer: nn.Module | None, transformer_2: nn.Module | None) -> WanImageToVideoPipeline:
    others = dict.fromkeys(["tokenizer", "text_encoder", "vae", "scheduler", "image_processor", "image_encoder"])
    return WanImageToVideoPipeline(**others, transformer=transformer, transformer_2=transformer_2)


@torch.no_grad()
def outputs(pipe: WanImageToVideoPipeline) -> Tensor:
    """What both experts compute for one fixed input."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 36, 2, 4, 4, generator=generator)
    text = torch.randn(1, 5, 24, generator=generator)
    experts = [x for x in (pipe.transformer, pipe.transformer_2) if x is not None]
    return torch.stack([x(latents, torch.tensor([500.0]), text, return_dict=False)[0] for x in experts])


def released_state(seed: int, rank: int = 4, blocks: int = 2, dim: int = 24, ffn: int = 40) -> dict[str, Tensor]:
    """An adapter under the released files' keys, for the tiny transformer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(blocks):
        for name in ORIGINAL:
            inside = ffn if name == "ffn.2" else dim
            outside = ffn if name == "ffn.0" else dim
            key = f"base_model.model.blocks.{block}.{name}"
            state[f"{key}.lora_A.weight"] = 0.3 * torch.randn(rank, inside, generator=generator)
            state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outside, rank, generator=generator)
    return state


def write_pair(folder: Path, high: dict[str, Tensor], low: dict[str, Tensor], stem: str = "backbone_") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(high, folder / f"{stem}high_noise.safetensors")
    save_file(low, folder / f"{stem}low_noise.safetensors")
    return folder


def merged(pipe: WanImageToVideoPipeline, folder: Path, scale: float) -> WanImageToVideoPipeline:
    """W + scale * B @ A, done on plain transformers."""
    for transformer, noise in ((pipe.transformer, "high"), (pipe.transformer_2, "low")):
        state = load_file(folder / f"backbone_{noise}_noise.safetensors")
        for key in [key for key in state if ".lora_A." in key]:
            block, linear = re.findall(r"blocks\.(\d+)\.(.+)\.lora_A", key)[0]
            weight = transformer.get_submodule(f"blocks.{block}.{TO_DIFFUSERS[linear]}").weight
            weight.data += scale * state[key.replace("lora_A", "lora_B")] @ state[key]
    return pipe


def plain() -> WanImageToVideoPipeline:
    return pipeline(expert(1), expert(2))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 2e-6 * b.norm())


def diffusers_state(seed: int) -> dict[str, Tensor]:
    state = {}
    for key, tensor in released_state(seed).items():
        block, name, matrix = re.findall(r"blocks\.(\d+)\.(.+)\.(lora_[AB]\.weight)", key)[0]
        state[f"blocks.{block}.{TO_DIFFUSERS[name]}.{matrix}"] = tensor
    return state
