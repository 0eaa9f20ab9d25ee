"""The networks of a model, wherever each is: a folder in diffusers' layout or in Wan's original one, or a single file.

The one place that knows these layouts. Everything is compared with its network by header before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from storymem.io import FileError, read_json_object
from storymem.wan.checkpoints import Checkpoint, load_network, names_in
from storymem.wan.folders import check_component, load_tokenizer, on_meta, tokenizer_in, weights_file
from storymem.wan.gguf import check_gguf_file, load_gguf
from storymem.wan.settings import ModelSettings
from storymem.wan.sources import ORIGINAL_FILES, component_path, original_parts
from storymem.wan.spec import COMPONENTS, UMT5_XXL, Expert, ModelSpec
from storymem.weights import check_values

_EXPERTS = tuple(COMPONENTS.values())


def config_of(model: ModelSettings, name: str, spec: ModelSpec) -> dict[str, Any]:
    """The arguments of a network whose weights come without a configuration."""
    if name in _EXPERTS:
        return {**model.network.transformer, "in_channels": spec.in_channels}
    if name == "text_encoder":
        return {**UMT5_XXL, **model.network.text_encoder}
    return dict(model.network.vae)


_CLASSES = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}


def check_file(path: Path, name: str, model: ModelSettings, spec: ModelSpec) -> Any:
    """The network of a component on the meta device, after its file was compared with it; FileError if it differs."""
    class_name = _CLASSES.get(name, "WanTransformer3DModel")
    network = on_meta(class_name, config_of(model, name, spec), f"model.network of {name}")
    if path.suffix == ".gguf" and name in _EXPERTS:
        check_gguf_file(path, network)
    else:
        names_in(Checkpoint.open(path), network)
    return network


def expert_on_meta(model: ModelSettings, expert: Expert) -> Any:
    """The transformer that the weights of ``model`` are for, on the meta device, after a check by header."""
    name = COMPONENTS[expert]
    if model.weights is None:
        return on_meta("WanTransformer3DModel", config_of(model, name, model.spec), "model.network.transformer")
    path = component_path(model, name)
    return check_file(path, name, model, model.spec) if path.is_file() else check_component(path.parent, name)


# Loading


def load_component(model: ModelSettings, name: str, *, by_text: bool = False, eight_bits: bool | None = None) -> Any:
    """One network of ``model``, or its tokenizer, on the CPU; its files were checked.

    Args:
        name: as ``model_index.json`` names it.
        by_text: of the text-to-video model.
        eight_bits: see :func:`storymem.wan.checkpoints.load_network`; for transformers.

    Raises:
        NotFiniteError: for weights that are NaN, infinite or too large.
    """
    spec, dtype = model.text_spec if by_text else model.spec, getattr(torch, model.dtype)
    path = component_path(model, name, by_text=by_text)
    if name == "tokenizer":
        return load_tokenizer(path.parent) if (path.parent / "model_index.json").exists() else tokenizer_in(path)
    if path.is_file():
        return _from_file(path, name, model, spec, eight_bits)
    if name in _EXPERTS:
        config = read_json_object(path / "config.json")
        return _transformer(config, weights_file(path.parent, name), dtype, eight_bits)
    kind = AutoencoderKLWan if name == "vae" else UMT5EncoderModel
    dtype = getattr(torch, model.vae_dtype) if name == "vae" else dtype
    network = kind.from_pretrained(path, dtype=dtype, use_safetensors=True)
    check_values(network.named_parameters(), weights_file(path.parent, name))
    return network.eval()


def _from_file(path: Path, name: str, model: ModelSettings, spec: ModelSpec, eight_bits: bool | None) -> Any:
    config, dtype = config_of(model, name, spec), getattr(torch, model.dtype)
    if name in _EXPERTS:
        return (
            load_gguf(path, config, dtype) if path.suffix == ".gguf" else _transformer(config, path, dtype, eight_bits)
        )
    if name == "vae":
        vae_dtype = getattr(torch, model.vae_dtype)
        return load_network(lambda: AutoencoderKLWan.from_config(config), Checkpoint.open(path), vae_dtype)
    return load_network(lambda: UMT5EncoderModel(UMT5Config.from_dict(config)), Checkpoint.open(path), dtype)


def _transformer(config: Mapping[str, Any], path: Path, dtype: torch.dtype, eight_bits: bool | None) -> Any:
    def build() -> Any:
        return WanTransformer3DModel.from_config(config)

    return load_network(build, Checkpoint.open(path), dtype, eight_bits=eight_bits)


def check_original(folder: Path, names: Collection[str], model: ModelSettings, spec: ModelSpec) -> dict[str, Any]:
    """As :func:`storymem.wan.folders.check_model`, for a folder in Wan's original layout."""
    found = original_parts(folder)
    if absent := sorted(set(names) - found.keys()):
        lacking = ", ".join(f"{name} ({ORIGINAL_FILES[name]})" for name in absent)
        raise FileError(
            f"{folder} is in Wan's original layout, and lacks {lacking}: fetch it, or use {spec.repository}"
        )
    if "tokenizer" in names:
        tokenizer_in(found["tokenizer"])
    return {name: check_file(found[name], name, model, spec) for name in names if name != "tokenizer"}
