"""Every form in which users have Wan2.2's weights, at true size and without disk; see :mod:`benchmarks.sparse`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, UMT5Config

from benchmarks.layouts import original_expert, original_text_encoder, original_vae
from benchmarks.sparse import Dtype, write_gguf, write_safetensors
from storymem.scorers.hpsv3_network import PUBLISHED, Hpsv3Network
from storymem.wan.components import config_of
from storymem.wan.folders import on_meta
from storymem.wan.lora_files import ADAPTED_LINEARS, original_name
from storymem.wan.settings import ModelSettings
from storymem.wan.spec import COMPONENTS, Expert

FORMS = ("diffusers", "original", "comfyui-bf16", "comfyui-fp8_scaled", "gguf-q4_k", "gguf-q8_0")
#: What ``scale=tiny`` changes: only sizes. Rows are multiples of 256, which K-quants need.
TINY = (
    "model.network.transformer.num_layers=2",
    "model.network.transformer.num_attention_heads=2",
    "model.network.transformer.ffn_dim=512",
    "model.network.transformer.text_dim=64",
    "+model.network.text_encoder={d_model: 64, d_ff: 128, d_kv: 16, num_heads: 4, num_layers: 2, vocab_size: 384}",
    "+model.network.vae={base_dim: 8, decoder_base_dim: 8}",
    *("scorer/clip=tiny", "scorer/quality=tiny", "memory/selector=uniform"),
)
_STEM = "diffusion_pytorch_model.safetensors"
#: Special tokens of Qwen2-VL in the order of their ids, which end with those of images and videos.
_QWEN = (
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
    *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
)
Shapes = dict[str, tuple[int, ...]]


def write_form(form: str, folder: Path, model: ModelSettings) -> list[str]:
    """Write the networks of ``model`` in one of :data:`FORMS`; the settings that name them.

    Args:
        folder: is created.
    """
    networks = {name: _shapes(name, model) for name in ("vae", "text_encoder", *_experts(model).values())}
    tokenizer = folder / ("google/umt5-xxl" if form == "original" else "tokenizer")
    ByT5Tokenizer().save_pretrained(tokenizer)
    write = {"diffusers": _diffusers, "original": _original}.get(form, _single_files)
    return [f"model.weights.source={folder}", *write(folder, model, networks, form)]


def _experts(model: ModelSettings) -> dict[Expert, str]:
    return {expert: COMPONENTS[expert] for expert in model.spec.experts}


def _shapes(name: str, model: ModelSettings) -> Shapes:
    kind = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}.get(name, "WanTransformer3DModel")
    network = on_meta(kind, config_of(model, name), "rehearsal")
    return {key: tuple(it.shape) for key, it in network.state_dict().items() if "embed_tokens" not in key}


def _filled(name: str) -> bool:
    """All but the linears of blocks, which are most of the weights."""
    return not ("block" in name and name.endswith(("weight", "lora_A.weight")) and "norm" not in name)


def _always(dtype: Dtype) -> Callable[[str], Dtype]:
    return lambda _: dtype


def _diffusers(folder: Path, model: ModelSettings, networks: dict[str, Shapes], _: str) -> list[str]:
    """Experts in float32, as published."""
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline", "tokenizer": ["transformers", "ByT5Tokenizer"]}
    for name, shapes in networks.items():
        config, texts = config_of(model, name), name == "text_encoder"
        kind = ("transformers", "UMT5EncoderModel") if texts else ("diffusers", "AutoencoderKLWan")
        index[name] = kind if name in ("vae", "text_encoder") else ("diffusers", "WanTransformer3DModel")
        stem, dtype = ("model.safetensors", "BF16") if texts else (_STEM, "F32")
        write_safetensors(folder / name / stem, shapes, _always(dtype), _writes(name), shard_gb=5)  # type: ignore[arg-type]
        described = UMT5Config(**config).to_dict() if texts else {**config, "_class_name": index[name][1]}
        (folder / name / "config.json").write_text(json.dumps(described))
    (folder / "model_index.json").write_text(json.dumps(index))
    return []


def _writes(name: str) -> Callable[[str], bool]:
    """Which tensors of a component hold numbers: all of the VAE's, whose zeros would make every frame gray."""
    return (lambda _: True) if name == "vae" else _filled


def _original(folder: Path, model: ModelSettings, networks: dict[str, Shapes], _: str) -> list[str]:
    names = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
    for expert, name in _experts(model).items():
        inside = names[expert] if len(_experts(model)) > 1 else "."
        path = folder / inside / _STEM
        write_safetensors(path, original_expert(networks[name]), _always("F32"), _filled, shard_gb=10)
    shapes = {
        f"Wan2.{'2' if model.spec.clean_frames else '1'}_VAE.pth": (original_vae(networks["vae"]), torch.float32),
        "models_t5_umt5-xxl-enc-bf16.pth": (original_text_encoder(networks["text_encoder"]), torch.bfloat16),
    }
    for file, (tensors, dtype) in shapes.items():
        state = {key: torch.empty(shape, dtype=dtype) for key, shape in tensors.items()}  # memory is never touched
        with torch.serialization.skip_data():
            torch.save(state, folder / file)
    return []


def _single_files(folder: Path, model: ModelSettings, networks: dict[str, Shapes], form: str) -> list[str]:
    fp8, kind = form.endswith("fp8_scaled"), form.rpartition("-")[2].upper()
    paths = {}
    for expert, name in _experts(model).items():
        shapes = original_expert(networks[name])
        if form.startswith("gguf"):
            paths[expert] = folder / f"wan2.2_{expert}_{kind}.gguf"
            write_gguf(paths[expert], shapes, partial(_gguf_type, kind, shapes), _filled)
        else:
            paths[expert] = folder / f"wan2.2_{expert}_14B_{form.partition('-')[2]}.safetensors"
            _comfyui(paths[expert], shapes, fp8=fp8)
    text = networks["text_encoder"] | {"spiece_model": (8,)}
    _comfyui(folder / "umt5_xxl.safetensors", text, fp8=not form.endswith("bf16"))  # beside GGUF files as well
    vae = original_vae(networks["vae"])
    write_safetensors(folder / "wan_vae.safetensors", vae, _always("BF16"), lambda _: True)
    files = ", ".join(f"{expert}: {path}" for expert, path in paths.items())
    return [
        f"model.gguf={{{files}}}",
        f"model.vae={folder / 'wan_vae.safetensors'}",
        f"model.text_encoder={folder / 'umt5_xxl.safetensors'}",
    ]


def _gguf_type(kind: str, shapes: Shapes, key: str) -> str:
    """Few bits for the linears of blocks only."""
    if len(shapes[key]) == 2 and key.startswith("blocks."):
        return kind
    return "F32" if len(shapes[key]) == 1 or "modulation" in key else "F16"


def _comfyui(path: Path, shapes: Shapes, *, fp8: bool) -> None:
    small = {key for key, shape in shapes.items() if fp8 and "block" in key and len(shape) == 2 and _is_linear(key)}
    factors = {f"{key.removesuffix('weight')}scale_weight": (1,) for key in small}

    def dtype_of(name: str) -> Dtype:
        if name == "spiece_model":
            return "U8"
        return "F8_E4M3" if name in small else "F32" if name in factors else "BF16"

    def filled(name: str) -> bool:
        return name in factors or (_filled(name) and name != "spiece_model")

    extra: Shapes = {"scaled_fp8": (2,)} if fp8 else {}
    write_safetensors(
        path, shapes | factors | extra, lambda it: "F8_E4M3" if it == "scaled_fp8" else dtype_of(it), filled
    )


def _is_linear(key: str) -> bool:
    return key.endswith(".weight") and "relative_attention_bias" not in key


# Adapters and scorers


def write_adapters(folder: Path, model: ModelSettings) -> list[str]:
    """The released memory adapter and Lightning's, and the settings that name them."""
    layers, shapes = model.network.transformer["num_layers"], _shapes("transformer", model)
    linears = [f"blocks.{layer}.{inside}" for layer in range(layers) for inside in ADAPTED_LINEARS]

    def lora(rank: int, prefix: str, down: str, up: str) -> Shapes:
        found: Shapes = {}
        for name in linears:
            out, inside = shapes[f"{name}.weight"]
            found[f"{prefix}{original_name(name)}.{down}.weight"] = (rank, inside)
            found[f"{prefix}{original_name(name)}.{up}.weight"] = (out, rank)
        return found

    released, steps = folder / "memory" / "Wan2.2-MI2V-A14B", folder / "lightning" / "lora"
    for expert in _experts(model):
        memory = lora(128, "base_model.model.", "lora_A", "lora_B")
        write_safetensors(released / f"backbone_{expert}.safetensors", memory, _always("F32"), lambda _: False)
        lightning = lora(64, "diffusion_model.", "lora_down", "lora_up")
        write_safetensors(steps / f"{expert}_model.safetensors", lightning, _always("BF16"), lambda _: False)
    return [
        f"model.adapter.weights.source={folder / 'memory'}",
        "sampler=lightning",
        f"sampler.adapter.weights={{name: Lightning, source: {steps}}}",
    ]


def write_scorers(folder: Path, quality: str) -> list[str]:
    """CLIP ViT-B/32 for the choice of keyframes, and the quality filter: "hpsv3", or "laion-v1" on CLIP ViT-L/14."""
    clip = f"scorer.clip.source={_clip('ViT-B-32-quickgelu', folder)}"
    if quality == "hpsv3":
        return [clip, *_hpsv3(folder)]
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.full((1,), 5.0)}, folder / "head.pth")
    return [
        clip,
        "scorer/quality=laion-v1",
        f"scorer.quality.clip_source={_clip('ViT-L-14-quickgelu', folder)}",
        f"scorer.quality.source={folder / 'head.pth'}",
    ]


def _clip(name: str, folder: Path) -> Path:
    with torch.device("meta"):
        network = open_clip.CLIP(**open_clip.get_model_config(name))
    shapes = {key: tuple(it.shape) for key, it in network.state_dict().items() if key != "attn_mask"}
    path = folder / name / "open_clip_model.safetensors"
    write_safetensors(path, shapes, _always("F32"), lambda _: True)  # in full: embeddings of zeros are refused
    return path


def _hpsv3(folder: Path) -> list[str]:
    """HPSv3 under its published names, and a tokenizer with the ids of Qwen2-VL's special tokens."""
    with torch.device("meta"):
        network = Hpsv3Network(PUBLISHED)
    shapes: Shapes = {}
    for key, tensor in network.state_dict().items():
        visual = key.startswith("model.visual.")
        shapes[key.removeprefix("model.") if visual else key.replace("language_model.", "")] = tuple(tensor.shape)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    path = folder / "hpsv3" / "HPSv3.safetensors"
    write_safetensors(
        path, shapes, lambda it: "F32" if "rm_head" in it else "BF16", lambda it: "norm" in it or "rm_head" in it
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"unused {n}" for n in range(PUBLISHED.image_token_id + 2 - len(_QWEN) - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([f"<|{name}|>" for name in _QWEN])
    tokenizer.save(str(path.with_name("tokenizer.json")))
    return ["scorer/quality=hpsv3", f"scorer.quality.source={path}", f"scorer.quality.tokenizer_source={path.parent}"]


def on_disk(folder: Path) -> tuple[int, int]:
    """Bytes that the files in a folder seem to have, and that they take."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(it.st_size for it in stats), sum(it.st_blocks * 512 for it in stats)
