"""Names of weights as Wan's original release and ComfyUI's single files have them, for tests and rehearsals.

Values may be tensors or anything else.
"""

from __future__ import annotations

import re
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from storymem.wan.lora_files import original_name

State = dict[str, Any]
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
        renamed[original_name(key) if table else f"{original_name(module)}.{attribute}"] = tensor
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
    return {names.get(name) or _nested(name): tensor for name, tensor in state.items()}


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
            renamed[f"blocks.{match[1]}.{parts[match[2]]}.weight"] = tensor
    return renamed
