"""Model folders in diffusers' layout, compared by header with the classes that will load them; tensors are not read.

diffusers and transformers fill what a folder lacks with random weights, or fail halfway with a traceback. Here a folder
is refused beforehand, with the names of the file, the component and the tensor.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from transformers import UMT5Config, UMT5EncoderModel

from storymem.config import closest, nearest
from storymem.io import FileError, check_regular, read_json_object
from storymem.wan.spec import COMPONENTS, SPECS, T2V_A14B, Expert, ModelSpec
from storymem.weights import check_tensors, read_header, read_index

#: The library and class of each component in ``model_index.json``.
_CLASSES: dict[str, tuple[str, str]] = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
}
_DIFFUSERS: dict[str, Any] = {"WanTransformer3DModel": WanTransformer3DModel, "AutoencoderKLWan": AutoencoderKLWan}
_NEVER_LOADED = {"scheduler", "image_encoder", "image_processor"}
_EMBEDDINGS = {"shared.weight", "encoder.embed_tokens.weight"}  # one tensor: files have it under either name, or both
_MOST = 1 << 20  # of a number in a component's configuration
_FEWEST_WORDS = 16  # of a tokenizer
# Raised by torch, diffusers and transformers for a configuration that describes no network.
_UNBUILDABLE = (
    *(TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError),
    StrictDataclassError,
)


def check_model(folder: Path, components: Collection[str], *, spec: ModelSpec, setting: str) -> dict[str, Any]:
    """The networks of a folder on the meta device, after a check that all ``components`` are complete and fit together.

    Args:
        components: those that will be loaded, as ``model_index.json`` names them.
        setting: that names the folder, for messages.

    Raises:
        FileNotFoundError, FileError: naming the file, the component and the tensor.
    """
    index = folder / "model_index.json"
    if not index.exists():
        raise FileError(_other_layout(folder, spec.repository, setting))
    entries = read_json_object(index)
    if not str(kind := entries.get("_class_name")).startswith("Wan"):
        raise FileError(f"{index}: _class_name is {kind}, which is not a Wan pipeline")
    for name, entry in entries.items():
        if name in components or (isinstance(entry, list) and entry != [None, None]):
            _check_entry(index, name, entry)
    if absent := sorted(set(components) - entries.keys()):
        raise FileError(f"{index} names no {', '.join(absent)}, which a Wan2.2 model has: use {spec.repository}")
    built = {name: check_component(folder, name) for name in components if name in _CLASSES}
    _check_together(folder, built)
    if "tokenizer" in components:
        tokens = len(load_tokenizer(folder))
        if "text_encoder" in built and tokens > (rows := built["text_encoder"].config.vocab_size):
            raise FileError(f"{folder / 'tokenizer'} has {tokens} tokens, and text_encoder has embeddings of {rows}")
    _check_channels(folder, built, spec, setting)
    return built


def check_text_to_video(folder: Path) -> dict[Expert, Any]:
    """The transformers of the first shot's model, on the meta device; FileError if incomplete or of another task."""
    built = {name: check_component(folder, name) for name in COMPONENTS.values()}
    _check_channels(folder, built, T2V_A14B, "model.text_to_video")
    return {expert: built[name] for expert, name in COMPONENTS.items()}


def check_component(folder: Path, name: str) -> Any:
    """One network of a model folder, on the meta device, after its files were compared with it."""
    part, class_name = _part(folder, name), _CLASSES[name][1]
    config_path = part / "config.json"
    config = read_json_object(config_path)
    if config.get("_class_name", class_name) != class_name:
        raise FileError(f"{config_path} is of {config['_class_name']}, and {name} must be {class_name}")
    if config.get("quantization_config") is not None:
        advice = "use the folder in 16 or 32 bits, with runtime.precision or model.gguf"
        raise FileError(f"{config_path} is of quantised weights, which are not supported: {advice}")
    if (part / "adapter_config.json").exists():  # transformers would load it, and what it names
        raise FileError(f"{part / 'adapter_config.json'}: an adapter does not belong here; remove it")
    where = weights_file(folder, name)
    shapes = _floats(where) if where.suffix == ".safetensors" else _sharded(where)
    network = on_meta(class_name, config, str(config_path), tensors=len(shapes))
    ignored = "|".join(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ["$^"])
    shapes = {key: shape for key, shape in shapes.items() if not re.search(ignored, key)}
    if name == "text_encoder" and (embeddings := [shapes[key] for key in _EMBEDDINGS if key in shapes]):
        shapes = dict.fromkeys(_EMBEDDINGS, embeddings[0]) | shapes
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_tensors(shapes, expected, where=f"{where} does not contain the weights of {name} ({class_name}):")
    return network


def weights_file(folder: Path, name: str) -> Path:
    """The safetensors file with a component's weights, or the index of its parts; FileError if there is neither."""
    part, stem = folder / name, "model" if name == "text_encoder" else "diffusion_pytorch_model"
    single, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise FileError(f"{part} contains both {single.name} and {index.name}: keep the one that belongs there")
    if single.exists() or index.exists():
        return single if single.exists() else index
    pickles = sorted(path.name for path in part.iterdir() if path.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    others = sorted(path.name for path in part.glob("*.safetensors") if path.exists())
    has = f" ({', '.join(pickles)} is a pickle, which is not supported)" if pickles else ""
    has += f" ({', '.join(others)} has another name)" if others else ""
    raise FileError(f"{part} contains neither {single.name} nor {index.name}{has}: fetch the safetensors files")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    transformers makes one without a vocabulary where its files are absent, to which every word is unknown.

    Raises:
        FileNotFoundError, FileError: if it is absent, damaged or without a vocabulary, or would run code of its own.
    """
    return tokenizer_in(_part(folder, "tokenizer"), read_json_object(folder / "model_index.json")["tokenizer"][1])


def tokenizer_in(part: Path, kind: str = "") -> Any:
    """The tokenizer in a folder of its own; as :func:`load_tokenizer`.

    Args:
        kind: its class; empty: as its configuration states, else T5's.
    """
    config = part / "tokenizer_config.json"
    kind = kind or str((read_json_object(config) if config.exists() else {}).get("tokenizer_class", "T5TokenizerFast"))
    if not kind.endswith(("Tokenizer", "TokenizerFast")):
        raise FileError(f"{config}: tokenizer_class is {kind}, which is not a tokenizer")
    files = [check_regular(path) for path in sorted(part.iterdir()) if not (path.name.startswith(".") or path.is_dir())]
    return _loaded_tokenizer(part, kind, tuple((path.name, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=1)
def _loaded_tokenizer(part: Path, kind: str, files: tuple[tuple[str, int], ...]) -> Any:
    config = part / "tokenizer_config.json"
    if config.exists() and "auto_map" in read_json_object(config):
        raise FileError(f"{config} would run code (auto_map): use that of the published model")
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(part, local_files_only=True, trust_remote_code=False)
        words = sum(not (token.startswith("<") and token.endswith(">")) for token in tokenizer.get_vocab())
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise FileError(f"{part} contains no readable {kind} ({_one_line(error)}): fetch tokenizer/* again") from None
    if words < _FEWEST_WORDS:
        raise FileError(f"{part} contains no vocabulary: fetch tokenizer/* again")
    return tokenizer


# Networks without weights


def on_meta(class_name: str, config: Mapping[str, Any], where: str, *, tensors: int = 1 << 16) -> Any:
    """A network on the meta device. It is shared: do not change it.

    Args:
        class_name: ``WanTransformer3DModel``, ``AutoencoderKLWan`` or ``UMT5EncoderModel``.
        config: of any content.
        where: it is from, for the message.
        tensors: in the file of its weights, which has at least one per layer.

    Raises:
        FileError: if ``config`` does not describe such a network.
    """
    for key, value in config.items():  # before anything is built from it
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > _MOST:
                raise FileError(f"{where}: {key} is a number of {number.bit_length()} bits, larger than any network's")
        count = value if key in ("num_layers", "num_res_blocks") else len(value) if isinstance(value, list) else 0
        if isinstance(count, int) and count > max(tensors, 64):
            raise FileError(f"{where}: {key} is of {count} layers, and its weights are {tensors} tensors")
    try:
        if class_name == "UMT5EncoderModel":
            _check_umt5(config, where)
        else:
            arguments = {key: value for key, value in config.items() if not key.startswith("_")}
            _schema(class_name).model_validate_json(json.dumps(arguments))
        return _built(class_name, json.dumps(config, sort_keys=True))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise FileError(f"{where}: unknown key {key!r}{nearest(key, _schema(class_name).model_fields)}") from None
        raise FileError(f"{where}: {key}={problem['input']!r}: {problem['msg'].lower()}") from None
    except FileError:
        raise
    except _UNBUILDABLE as error:
        raise FileError(f"{where} does not describe a network that can be built: {_one_line(error)}") from None


def _check_umt5(config: Mapping[str, Any], where: str) -> None:
    """transformers takes any key, so one is refused only if it resembles a known key that is absent."""
    if config.get("model_type") != "umt5":
        raise FileError(f"{where}: model_type is {config.get('model_type')!r}, and must be 'umt5'")
    known = set(UMT5Config().to_dict())
    for key in config.keys() - known:
        if meant := closest(key, known - config.keys(), cutoff=0.8):
            raise FileError(f"{where}: unknown key {key!r}; did you mean {meant!r}?")


@lru_cache(maxsize=8)
def _built(class_name: str, text: str) -> Any:
    config = json.loads(text)
    with torch.device("meta"):
        if class_name == "UMT5EncoderModel":
            return UMT5EncoderModel(UMT5Config.from_dict(config))
        return _DIFFUSERS[class_name].from_config(config)


@cache
def _schema(class_name: str) -> type[BaseModel]:
    """The types of the arguments of a class of diffusers, which checks none."""
    initializer = _DIFFUSERS[class_name].__init__
    parameters = inspect.signature(initializer).parameters
    hints = typing.get_type_hints(initializer)
    fields: dict[str, Any] = {name: (hints[name], p.default) for name, p in parameters.items() if name != "self"}
    return create_model(class_name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Parts of a folder


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise FileError(f"{folder} has no folder {name}: the download is incomplete; fetch {name}/* again")
    return folder / name


def _check_entry(index: Path, name: str, entry: Any) -> None:
    """Refuse what is not Wan's in ``model_index.json``: diffusers would import whatever it names."""
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise FileError(f"{index}: {name} must be [library, class], not {entry!r}")
    library, kind = entry
    if name == "tokenizer":
        fits, wanted = library == "transformers" and kind.endswith(("Tokenizer", "TokenizerFast")), "a tokenizer"
    elif name in _CLASSES:
        fits, wanted = (library, kind) == _CLASSES[name], ".".join(_CLASSES[name])
    else:
        fits = name in _NEVER_LOADED and library in ("diffusers", "transformers", "storymem")
        wanted = "left out, as Wan2.2 has no such component"
    if not fits:
        raise FileError(f"{index}: {name} is {library}.{kind}, and must be {wanted}")


def _sharded(index: Path) -> dict[str, tuple[int, ...]]:
    files = read_index(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(files.values())):
        path, named = index.with_name(shard), {name for name, file in files.items() if file == shard}
        inside = _floats(path)
        if differ := sorted(inside.keys() ^ named):
            verb = "lacks" if differ[0] in named else "has"
            raise FileError(f"{path} {verb} {differ[0]}, unlike {index.name}: they are of different downloads")
        shapes |= inside
    return shapes


def _floats(path: Path) -> dict[str, tuple[int, ...]]:
    header = read_header(path)
    for name, dtype in header.dtypes.items():
        if not dtype.startswith(("F", "BF")):
            raise FileError(f"{path}: {name} is {dtype}, and weights are floating-point numbers")
    return header.shapes


def _check_together(folder: Path, built: Mapping[str, Any]) -> None:
    """Refuse components of different models: widths that do not match."""
    vae, text_encoder = built.get("vae"), built.get("text_encoder")
    for transformer in (built[name] for name in COMPONENTS.values() if name in built):
        takes = transformer.config
        widths = []
        if vae is not None:
            widths.append(("latents of vae", vae.config.z_dim, takes.out_channels))
        if text_encoder is not None:
            widths.append(("embeddings of text_encoder", text_encoder.config.d_model, takes.text_dim))
        for what, width, taken in widths:
            if width != taken:
                problem = f"the {what} have {width} numbers, and the transformers take {taken}"
                raise FileError(f"{folder}: {problem}: they are of different models")
    if vae is not None:
        means, deviations = vae.config.latents_mean, vae.config.latents_std
        if not len(means) == len(deviations) == vae.config.z_dim or min(deviations) <= 0:
            where = folder / "vae" / "config.json"
            raise FileError(f"{where}: latents_mean and latents_std must be z_dim numbers, the latter above 0")


def _check_channels(folder: Path, built: Mapping[str, Any], spec: ModelSpec, setting: str) -> None:
    kinds = {known.in_channels: f" (as {known.name})" for known in SPECS}
    for name in COMPONENTS.values():
        if name in built and (found := built[name].config.in_channels) != spec.in_channels:
            raise FileError(
                f"{folder / name} takes {found} input channels{kinds.get(found, '')}, and {setting} needs "
                f"{spec.in_channels} (as {spec.name}): use {spec.repository}"
            )


def _other_layout(folder: Path, repository: str, setting: str) -> str:
    """Why a place without ``model_index.json`` is refused, and what to use."""
    what = f"{folder} contains no model_index.json, and is not in Wan's original layout: it is incomplete"
    if not folder.is_dir():
        if folder.suffix == ".safetensors":
            read_header(folder)  # for its errors
        what = f"{folder} is a single file: experts are named by model.gguf, others by model.vae, model.text_encoder"
    return f"{what}. Or use the whole model: hf download {repository}, and {setting}.source={repository}"
