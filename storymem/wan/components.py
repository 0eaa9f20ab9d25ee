"""The networks of a model, wherever each is: a folder in diffusers' layout or in Wan's original one, or a single file.

Everything is compared with its network by header before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from storymem.io import FileError
from storymem.wan.checkpoints import Checkpoint, load_network, names_in
from storymem.wan.folders import CLASSES, build, check_index, load_tokenizer, on_meta, read_config, weights_file
from storymem.wan.gguf import load_gguf
from storymem.wan.places import ORIGINAL_FILES, component_path, original_parts
from storymem.wan.settings import ModelSettings
from storymem.wan.spec import COMPONENTS, SPECS, UMT5_XXL, Expert

_EXPERTS = tuple(COMPONENTS.values())


def config_of(model: ModelSettings, name: str) -> dict[str, Any]:
    """The arguments of a network whose weights come without a configuration."""
    if name in _EXPERTS:
        return model.transformer
    if name == "text_encoder":
        return {**UMT5_XXL, **model.network.text_encoder}
    return dict(model.network.vae)


def _config_and_file(path: Path, name: str, model: ModelSettings) -> tuple[dict[str, Any], Path]:
    """The configuration of a component in ``path``, a folder or a file, and the file or index of its weights."""
    if path.is_dir():
        return read_config(path, CLASSES[name]), weights_file(path)
    return config_of(model, name), path


def check_component(path: Path, name: str, model: ModelSettings, setting: str = "") -> Any:
    """A network on the meta device, after its files were compared with it.

    Args:
        path: its folder in diffusers' layout, or the file or index of its weights.
        name: as ``model_index.json`` names it.
        setting: that names its weights, for messages.

    Raises:
        FileNotFoundError, FileError: naming the file and the tensor.
    """
    (config, file), spec = _config_and_file(path, name, model), model.spec
    if file.suffix == ".gguf" and name not in _EXPERTS:
        raise FileError(
            f"{file} is a GGUF file, from which only experts are read: use a file of another format for {name}"
        )
    where = str(path / "config.json") if path.is_dir() else f"model.network of {name}"
    checkpoint = Checkpoint.open(file)
    network = on_meta(CLASSES[name], config, where, tensors=len(checkpoint.files))
    if name in _EXPERTS and (found := network.config.in_channels) != spec.in_channels:
        known = "".join(f" (as {known.name})" for known in SPECS if known.in_channels == found)
        raise FileError(
            f"{path} takes {found} input channels{known}, and {setting} needs {spec.in_channels} (as {spec.name}): "
            f"use {spec.repository}"
        )
    names_in(checkpoint, network)
    return network


def check_folder(folder: Path, names: Collection[str], model: ModelSettings, setting: str) -> dict[str, Any]:
    """The networks ``names`` of a model folder on the meta device, after a check that all are there and fit together.

    Args:
        folder: in diffusers' layout or in Wan's original one.
        names: also "tokenizer".
        setting: that names the folder, for messages.
    """
    original = original_parts(folder)
    if not original and not set(names) <= set(_EXPERTS):
        check_index(folder, names, advice=model.own_weights(setting))
    parts = original or {name: folder / name for name in names}
    if absent := [name for name in names if name not in parts or not parts[name].exists()]:
        lacking = ", ".join(ORIGINAL_FILES[name] if original else f"{name}/*" for name in absent)
        advice = f"fetch it, or {model.own_weights(setting)}"
        raise FileError(f"{folder} lacks {lacking}: the download is incomplete; {advice}")
    built = {name: check_component(parts[name], name, model, setting) for name in names if name != "tokenizer"}
    _check_together(folder, built)
    if "tokenizer" in names:
        tokens = len(load_tokenizer(parts["tokenizer"]))
        if "text_encoder" in built and tokens > (rows := built["text_encoder"].config.vocab_size):
            raise FileError(f"{parts['tokenizer']} has {tokens} tokens, and text_encoder has embeddings of {rows}")
    return built


def _check_together(folder: Path, built: Mapping[str, Any]) -> None:
    """Refuse components of different models: widths that do not match."""
    vae, text_encoder = built.get("vae"), built.get("text_encoder")
    for transformer in (built[name].config for name in _EXPERTS if name in built):
        widths = []
        if vae is not None:
            widths.append(("latents of vae", vae.config.z_dim, transformer.out_channels))
        if text_encoder is not None:
            widths.append(("embeddings of text_encoder", text_encoder.config.d_model, transformer.text_dim))
        for what, width, taken in widths:
            if width != taken:
                problem = f"the {what} have {width} numbers, and the transformers take {taken}"
                raise FileError(f"{folder}: {problem}: they are of different models")
    if vae is not None:
        means, deviations = vae.config.latents_mean, vae.config.latents_std
        if not len(means) == len(deviations) == vae.config.z_dim or min(deviations) <= 0:
            where = folder / "vae" / "config.json"
            raise FileError(f"{where}: latents_mean and latents_std must be z_dim numbers, the latter above 0")


def random_on_meta(model: ModelSettings, name: str) -> Any:
    """A transformer of a model whose weights are random, on the meta device."""
    return on_meta(CLASSES[name], config_of(model, name), "model.network.transformer")


def expert_on_meta(model: ModelSettings, expert: Expert) -> Any:
    """The transformer that the weights of ``model`` are for, on the meta device, after a check by header."""
    name = COMPONENTS[expert]
    if model.weights is None:
        return random_on_meta(model, name)
    return check_component(component_path(model, name), name, model, "model.weights")


def load_component(model: ModelSettings, name: str, *, eight_bits: bool = False) -> Any:
    """One network of ``model``, or its tokenizer, on the CPU; its files were checked.

    Args:
        name: as ``model_index.json`` names it.
        eight_bits: see :func:`storymem.wan.checkpoints.load_network`; for transformers.

    Raises:
        NotFiniteError: for weights that are NaN, infinite or too large.
    """
    path = component_path(model, name)
    if name == "tokenizer":
        return load_tokenizer(path)
    config, file = _config_and_file(path, name, model)
    dtype = getattr(torch, model.vae_dtype if name == "vae" else model.dtype)
    if file.suffix == ".gguf":
        return load_gguf(file, config, dtype)
    narrow = eight_bits and name in _EXPERTS
    return load_network(lambda: build(CLASSES[name], config), Checkpoint.open(file), dtype, eight_bits=narrow)
