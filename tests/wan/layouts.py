"""Tiny networks of the true classes, written as Wan's original release and ComfyUI's single files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.layouts import original_expert, original_text_encoder, original_vae

State = dict[str, Tensor]


def scaled_fp8(state: State, suffix: str = "scale_weight", *, per_row: bool = False) -> State:
    """As published for ComfyUI: linears of blocks in 8 bits with a factor each, and keys of its own."""
    made: State = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for key, tensor in state.items():
        made[key] = tensor
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
    text = {key: it for key, it in pipe.text_encoder.state_dict().items() if "embed_tokens" not in key}
    files = {
        "high_noise": prefixed[0],
        "low_noise": prefixed[1],
        "vae": original_vae(pipe.vae.state_dict()),
        "text_encoder": change(text) | {"spiece_model": torch.zeros(8, dtype=torch.uint8)},
    }
    for name, state in files.items():
        save_file(state, folder / f"wan2.2_{name}.safetensors")
    return {name: folder / f"wan2.2_{name}.safetensors" for name in files}
