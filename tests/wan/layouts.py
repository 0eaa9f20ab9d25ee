"""Tiny networks of the true classes, written as Wan's original release and ComfyUI's single files have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from storymem.wan.lora_files import original_name

State = dict[str, Tensor]
_PARTS = {"norm1.gamma": "residual.0.gamma", "norm2.gamma": "residual.3.gamma"}
_PARTS |= {
    f"{new}.{it}": f"{old}.{it}"
    for new, old in (("conv1", "residual.2"), ("conv2", "residual.6"), ("conv_shortcut", "shortcut"))
    for it in ("weight", "bias")
}


def original_expert(state: State) -> State:
    """The weights of a transformer under the original network's names."""
    renamed = {}
    for key, tensor in state.items():
        module, _, attribute = key.rpartition(".")
        table = key.endswith("scale_shift_table")
        renamed[original_name(key) if table else f"{original_name(module)}.{attribute}"] = tensor.contiguous()
    return renamed


def original_vae(state: State) -> State:
    """The weights of the VAE under the names of ``Wan2.1_VAE.pth``, or of ``Wan2.2_VAE.pth`` if it is residual."""
    coders, places = ("encoder", "decoder"), range(15)
    ways = [
        f"{coder}.{part}"
        for coder in coders
        for part in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias")
    ]
    ways += [f"{coder}.middle.{n}.{part}" for coder in coders for n in (0, 2) for part in _PARTS.values()]
    attention = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
    ways += [f"{coder}.middle.1.{part}" for coder in coders for part in attention]
    ways += [f"conv{n}.{it}" for n in (1, 2) for it in ("weight", "bias")]
    resample = [f"{part}.{it}" for part in ("resample.1", "time_conv") for it in ("weight", "bias")]
    for direction in ("encoder.downsamples", "decoder.upsamples"):
        ways += [f"{direction}.{n}.{part}" for n in places for part in (*_PARTS.values(), *resample)]
    names = {new: old for old, new in zip(ways, convert_wan_vae_to_diffusers({way: way for way in ways}), strict=True)}
    return {names.get(name) or _nested(name): tensor.contiguous() for name, tensor in state.items()}


def _nested(name: str) -> str:
    match = re.fullmatch(r"(en|de)coder\.(down|up)_blocks\.(\d)\.(?:resnets\.(\d)|(?:down|up)sampler)\.(.+)", name)
    assert match, name
    coder, direction, block, place, part = match.groups()
    place = place or {"down": "2", "up": "3"}[direction]  # after two or three residual blocks
    return f"{coder}coder.{direction}samples.{block}.{direction}samples.{place}.{_PARTS.get(part, part)}"


def original_text_encoder(state: State) -> State:
    """The weights of UMT5 under the names of ``models_t5_umt5-xxl-enc-bf16.pth``."""
    parts = {"layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2"}
    parts |= {f"layer.0.SelfAttention.{it}": f"attn.{it}" for it in "qkvo"}
    parts["layer.0.SelfAttention.relative_attention_bias"] = "pos_embedding.embedding"
    parts |= {
        f"layer.1.DenseReluDense.{a}": f"ffn.{b}" for a, b in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2"))
    }
    renamed = {
        "token_embedding.weight": state["shared.weight"],
        "norm.weight": state["encoder.final_layer_norm.weight"],
    }
    for name, tensor in state.items():
        if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name):
            renamed[f"blocks.{match[1]}.{parts[match[2]]}.weight"] = tensor.contiguous()
    return renamed


def scaled_fp8(state: State, suffix: str = "scale_weight", *, per_row: bool = False) -> State:
    """As published for ComfyUI: linears of blocks in 8 bits with a factor each, and keys of its own."""
    made: State = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for key, tensor in state.items():
        made[key] = tensor.contiguous()
        if "block" in key and key.endswith(".weight") and tensor.ndim == 2 and "bias" not in key:
            largest = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
            made[key] = (tensor / (largest / 448)).to(torch.float8_e4m3fn)
            made[key.removesuffix("weight") + suffix] = largest / 448
            made[key.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
    return made


def write_original(pipe: Any, folder: Path) -> Path:
    """``pipe`` as Wan's original release: a folder for each expert in two shards, pickles, a tokenizer."""
    for inside, expert in zip(("high_noise_model", "low_noise_model"), pipe.experts.values(), strict=True):
        (folder / inside).mkdir(parents=True)
        state, stem = original_expert(expert.state_dict()), "diffusion_pytorch_model"
        shards = {name: f"{stem}-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(state)}
        for shard in set(shards.values()):
            save_file({name: state[name] for name in state if shards[name] == shard}, folder / inside / shard)
        (folder / inside / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    torch.save(original_vae(pipe.vae.state_dict()), folder / "Wan2.1_VAE.pth")
    torch.save(original_text_encoder(pipe.text_encoder.state_dict()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def write_comfyui(pipe: Any, folder: Path, *, fp8: bool) -> dict[str, Path]:
    """``pipe`` as single files; with ``fp8`` experts and text encoder in scaled fp8."""
    folder.mkdir(parents=True, exist_ok=True)
    change = scaled_fp8 if fp8 else dict
    experts = [original_expert(expert.state_dict()) for expert in pipe.experts.values()]
    prefixed = [{f"model.diffusion_model.{key}": it for key, it in change(expert).items()} for expert in experts]
    text = {key: it.contiguous() for key, it in pipe.text_encoder.state_dict().items() if "embed_tokens" not in key}
    files = {
        "high_noise": prefixed[0],
        "low_noise": prefixed[1],
        "vae": original_vae(pipe.vae.state_dict()),
        "text_encoder": change(text) | {"spiece_model": torch.zeros(8, dtype=torch.uint8)},
    }
    for name, state in files.items():
        save_file(state, folder / f"wan2.2_{name}.safetensors")
    return {name: folder / f"wan2.2_{name}.safetensors" for name in files}
