"""Model folders in diffusers' layout, checked by header against the classes that will load them; no weight is read.

diffusers and transformers fill what a folder lacks with random weights, or fail halfway with a traceback. Here a folder
is refused beforehand, with the names of the file, the component and the tensor.
"""

from __future__ import annotations

import difflib
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

from storymem.config import nearest
from storymem.io import FileError, check_regular, read_json_object
from storymem.wan.spec import SPECS, ModelSpec
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
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_EMBEDDINGS = {"shared.weight", "encoder.embed_tokens.weight"}  # one tensor: files hold it under either name, or both
_LARGEST_INT, _LONGEST_LIST = 1 << 20, 1 << 10  # in a component's configuration
_FEWEST_WORDS = 16  # of a tokenizer
_ORIGINAL_LAYOUT = ("high_noise_model", "low_noise_model", "*umt5*.pth", "*umt5*.safetensors", "Wan2.*_VAE.*")
_COMFYUI_LAYOUT = ("split_files", "diffusion_models", "unet", "text_encoders")

# Raised by torch, diffusers and transformers for a configuration that describes no network.
_UNBUILDABLE = (
    *(TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError),
    StrictDataclassError,
)


def check_model(folder: Path, components: Collection[str], *, repository: str, setting: str) -> dict[str, Any]:
    """Raise unless a folder holds all that a pipeline needs, complete and in the shapes of its configurations.

    Args:
        folder: with ``model_index.json``.
        components: those that will be loaded: some of ``transformer``, ``transformer_2``, ``vae``, ``text_encoder``,
            ``tokenizer``.
        repository: what to name in place of a folder in another layout.
        setting: that names the folder, for messages.

    Returns:
        The components that are networks, on the meta device.

    Raises:
        FileNotFoundError, FileError: naming the file, the component and the tensor.
    """
    index = folder / "model_index.json"
    if not index.exists():
        raise FileError(_other_layout(folder, repository, setting))
    entries = read_json_object(index)
    if not str(kind := entries.get("_class_name")).startswith("Wan"):
        raise FileError(f"{index}: _class_name is {kind}, which is not a Wan pipeline")
    for name, entry in entries.items():
        _check_entry(index, name, entry, needed=name in components)
    if absent := sorted(set(components) - entries.keys()):
        raise FileError(f"{index} names no {', '.join(absent)}, which a Wan2.2 model has: use {repository}")
    built = {name: check_component(folder, name) for name in components if name in _CLASSES}
    _check_together(folder, built)
    if "tokenizer" in components:
        tokens = len(load_tokenizer(folder))
        if "text_encoder" in built and tokens > (rows := built["text_encoder"].config.vocab_size):
            raise FileError(f"{folder / 'tokenizer'} knows {tokens} tokens, and text_encoder has embeddings of {rows}")
    return built


def check_component(folder: Path, name: str) -> Any:
    """One network of a model folder, on the meta device, after its files were compared with it."""
    part = folder / name
    if not part.is_dir():
        raise FileError(f"{folder} has no folder {name}: the download is incomplete; fetch {name}/* again")
    config_path, class_name = part / "config.json", _CLASSES[name][1]
    config = read_json_object(config_path)
    if config.get("_class_name", class_name) != class_name:
        raise FileError(f"{config_path} is of {config['_class_name']}, and {name} must be {class_name}")
    if config.get("quantization_config") is not None:
        advice = "use the folder in 16 or 32 bits, with runtime.precision or model.gguf"
        raise FileError(f"{config_path} is of quantised weights, which are not read: {advice}")
    if (part / "adapter_config.json").exists():  # transformers would load it, and what it names
        raise FileError(f"{part / 'adapter_config.json'}: an adapter does not belong here; remove it")
    where = weights_file(folder, name)
    shapes = _floats(where) if where.suffix == ".safetensors" else _sharded(where)
    network = _build(class_name, config, tensors=len(shapes), where=str(config_path))
    ignored = "|".join(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ["$^"])
    shapes = {key: shape for key, shape in shapes.items() if not re.search(ignored, key)}
    if name == "text_encoder" and (held := [shapes[key] for key in _EMBEDDINGS if key in shapes]):
        shapes = dict.fromkeys(_EMBEDDINGS, held[0]) | shapes
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_tensors(shapes, expected, where=f"{where} does not hold the weights of {name} ({class_name}):")
    return network


def check_channels(folder: Path, built: Mapping[str, Any], spec: ModelSpec, *, setting: str) -> None:
    """Raise FileError unless the transformers take the input channels of a base model."""
    kinds = {known.in_channels: f" (as {known.name})" for known in SPECS}
    for name in ("transformer", "transformer_2"):
        if name in built and (found := built[name].config.in_channels) != spec.in_channels:
            raise FileError(
                f"{folder / name} takes {found} input channels{kinds.get(found, '')}, and {setting} needs "
                f"{spec.in_channels} (as {spec.name}): use {spec.repository}"
            )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    transformers makes one without a vocabulary where its files are absent, to which every word is unknown.

    Raises:
        FileNotFoundError, FileError: if it is absent, damaged or without a vocabulary, or would run code of its own.
    """
    part = folder / "tokenizer"
    if not part.is_dir():
        raise FileError(f"{folder} has no folder tokenizer: the download is incomplete; fetch tokenizer/* again")
    kind = read_json_object(folder / "model_index.json")["tokenizer"][1]
    files = [check_regular(path) for path in sorted(part.iterdir()) if not (path.name.startswith(".") or path.is_dir())]
    return _loaded_tokenizer(part, kind, tuple((path.name, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=1)
def _loaded_tokenizer(part: Path, kind: str, files: tuple[tuple[str, int], ...]) -> Any:
    if ("tokenizer_config.json" in dict(files)) and "auto_map" in read_json_object(part / "tokenizer_config.json"):
        raise FileError(f"{part / 'tokenizer_config.json'} would run code (auto_map): use that of the published model")
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(part, local_files_only=True, trust_remote_code=False)
        words = sum(not (token.startswith("<") and token.endswith(">")) for token in tokenizer.get_vocab())
    except Exception as error:  # the tokenizers library raises nothing more special
        raise FileError(f"{part} holds no readable {kind} ({_said(error)}): fetch tokenizer/* again") from None
    if words < _FEWEST_WORDS:
        raise FileError(f"{part} holds no vocabulary: fetch tokenizer/* again")
    return tokenizer


def on_meta(class_name: str, config: Mapping[str, Any], where: str) -> Any:
    """A network of a configuration, without room for its weights. It is shared: leave it as it is.

    Raises:
        FileError: if ``config``, which stands in ``where``, describes none.
    """
    text = json.dumps(config, sort_keys=True)
    try:
        if class_name != "UMT5EncoderModel":
            arguments = {key: value for key, value in config.items() if not key.startswith("_")}
            _schema(class_name).model_validate_json(json.dumps(arguments))
        return _built(class_name, text)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise FileError(f"{where}: unknown key {key!r}{nearest(key, _schema(class_name).model_fields)}") from None
        raise FileError(f"{where}: {key}={problem['input']!r}: {problem['msg'].lower()}") from None
    except _UNBUILDABLE as error:
        raise FileError(f"{where} does not describe a network that can be built: {_said(error)}") from None


@lru_cache(maxsize=8)
def _built(class_name: str, text: str) -> Any:
    config = json.loads(text)
    with torch.device("meta"):
        if class_name == "UMT5EncoderModel":
            return UMT5EncoderModel(UMT5Config.from_dict(config))
        return _DIFFUSERS[class_name].from_config(config)


@cache
def _schema(class_name: str) -> type[BaseModel]:
    """The types of the arguments of a class of diffusers, to hold JSON against."""
    made = _DIFFUSERS[class_name].__init__
    parameters = inspect.signature(made).parameters
    hints = typing.get_type_hints(made)
    fields: dict[str, Any] = {name: (hints[name], p.default) for name, p in parameters.items() if name != "self"}
    return create_model(class_name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _said(error: Exception) -> str:
    """An error of a library in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_entry(index: Path, name: str, entry: Any, *, needed: bool) -> None:
    """Refuse what is not Wan's in ``model_index.json``: diffusers would import whatever it names."""
    if not isinstance(entry, list) and name not in _CLASSES and not needed:
        return
    if entry == [None, None] and not needed:
        return
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


def weights_file(folder: Path, name: str) -> Path:
    """The safetensors file with a component's weights, or the index of its parts; FileError if there is neither."""
    part, stem = folder / name, "model" if name == "text_encoder" else "diffusion_pytorch_model"
    single, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise FileError(f"{part} holds both {single.name} and {index.name}: keep the one that belongs there")
    if single.exists() or index.exists():
        return single if single.exists() else index
    pickles = sorted(path.name for path in part.iterdir() if path.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    others = sorted(path.name for path in part.glob("*.safetensors") if path.exists())
    has = f" ({', '.join(pickles)} is a pickle, which is not read)" if pickles else ""
    has += f" ({', '.join(others)} has another name)" if others else ""
    raise FileError(f"{part} holds neither {single.name} nor {index.name}{has}: fetch the safetensors files")


def _sharded(index: Path) -> dict[str, tuple[int, ...]]:
    files = read_index(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(files.values())):
        path, named = index.with_name(shard), {name for name, file in files.items() if file == shard}
        held = _floats(path)
        if differ := sorted(held.keys() ^ named):
            verb = "lacks" if differ[0] in named else "holds"
            raise FileError(f"{path} {verb} {differ[0]}, against {index.name}: they are of different downloads")
        shapes |= held
    return shapes


def _floats(path: Path) -> dict[str, tuple[int, ...]]:
    header = read_header(path)
    for name, dtype in header.dtypes.items():
        if dtype not in _FLOATS:
            raise FileError(f"{path}: {name} is {dtype}, and weights are floating-point numbers")
    return header.shapes


def _build(class_name: str, config: Mapping[str, Any], *, tensors: int, where: str) -> Any:
    """A network on the meta device, from a configuration that may hold anything."""
    _check_numbers(config, where)
    for key in ("num_layers", "num_res_blocks"):
        if isinstance(config.get(key), int) and config[key] > tensors:
            raise FileError(f"{where}: {key}={config[key]}, and the weights are {tensors} tensors in all")
    if class_name == "UMT5EncoderModel":
        if config.get("model_type") != "umt5":
            raise FileError(f"{where}: model_type is {config.get('model_type')!r}, and must be 'umt5'")
        known = set(UMT5Config().to_dict())
        for key in config.keys() - known:  # others are free
            if meant := difflib.get_close_matches(key, known - config.keys(), n=1, cutoff=0.8):
                raise FileError(f"{where}: unknown key {key!r}; did you mean {meant[0]!r}?")
    return on_meta(class_name, config, where)


def _check_numbers(value: Any, where: str, key: str = "") -> None:
    """Refuse whole numbers and lists of a size that no configuration has, before anything is built from them."""
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise FileError(f"{where}: {key} is a number of {value.bit_length()} bits, larger than any network's")
    if isinstance(value, list) and len(value) > _LONGEST_LIST:
        raise FileError(f"{where}: {key} is a list of {len(value)} entries, longer than any network's")
    if isinstance(value, list | Mapping):
        for name, item in value.items() if isinstance(value, Mapping) else ((key, item) for item in value):
            _check_numbers(item, where, name)


def _check_together(folder: Path, built: Mapping[str, Any]) -> None:
    """Refuse components of different models: widths that do not meet."""
    vae, text_encoder = built.get("vae"), built.get("text_encoder")
    for transformer in (built[name] for name in ("transformer", "transformer_2") if name in built):
        takes = transformer.config
        if vae is not None and vae.config.z_dim != takes.out_channels:
            made = f"vae makes latents of {vae.config.z_dim} channels, and the transformers take {takes.out_channels}"
            raise FileError(f"{folder}: {made}: they are of different models")
        if text_encoder is not None and text_encoder.config.d_model != takes.text_dim:
            made = f"text_encoder makes {text_encoder.config.d_model} numbers a token"
            raise FileError(
                f"{folder}: {made}, and the transformers take {takes.text_dim}: they are of different models"
            )
    if vae is not None:
        means, deviations = vae.config.latents_mean, vae.config.latents_std
        if not len(means) == len(deviations) == vae.config.z_dim or min(deviations) <= 0:
            where = folder / "vae" / "config.json"
            raise FileError(f"{where}: latents_mean and latents_std must be z_dim numbers, the latter above 0")


def _other_layout(folder: Path, repository: str, setting: str) -> str:
    """Why a place without ``model_index.json`` is not read, and what to use."""
    if not folder.is_dir():
        if folder.suffix == ".safetensors":
            read_header(folder)  # which says what is wrong with it
        what = f"{folder} is a single file" + (", for model.gguf" if folder.suffix == ".gguf" else "")
    elif any(any(folder.glob(pattern)) for pattern in _ORIGINAL_LAYOUT):
        what = f"{folder} is in the original Wan layout (it holds no model_index.json)"
    elif any((folder / name).is_dir() for name in _COMFYUI_LAYOUT):
        what = f"{folder} is in ComfyUI's layout (it holds no model_index.json)"
    else:
        what = f"{folder} holds no model_index.json: it is not a model, or its download is incomplete"
    return f"{what}. StoryMem reads diffusers' layout: hf download {repository}, and {setting}.source={repository}"
