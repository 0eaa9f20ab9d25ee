"""Folders in diffusers' layout: index, configurations, tokenizer and file names, checked before anything is loaded.

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
from storymem.weights import read_header

#: The class of each network, as ``model_index.json`` names them.
CLASSES: dict[str, str] = {
    **dict.fromkeys(("transformer", "transformer_2"), "WanTransformer3DModel"),
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
_DIFFUSERS: dict[str, Any] = {"WanTransformer3DModel": WanTransformer3DModel, "AutoencoderKLWan": AutoencoderKLWan}
_ENTRIES = {  # of model_index.json: library and class
    **{name: rf"(diffusers|transformers)\.{kind}" for name, kind in CLASSES.items()},
    "tokenizer": r"transformers\.\w*Tokenizer(Fast|sBackend)?",
    **dict.fromkeys(("scheduler", "image_encoder", "image_processor"), r"(diffusers|transformers|storymem)\.\w+"),
}
_MOST = 1 << 20  # of a number in a component's configuration
_FEWEST_WORDS = 16  # of a tokenizer
# Raised by torch, diffusers and transformers for a configuration that describes no network.
_UNBUILDABLE = (
    *(TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError),
    StrictDataclassError,
)


def check_index(folder: Path, names: Collection[str], *, advice: str) -> None:
    """Raise ``FileError`` unless ``model_index.json`` is of a Wan pipeline with the components ``names``."""
    index = folder / "model_index.json"
    if not index.exists():
        raise FileError(f"{_other_layout(folder)}; {advice}")
    entries = read_json_object(index)
    if not str(kind := entries.get("_class_name")).startswith("Wan"):
        raise FileError(f"{index}: _class_name is {kind}, which is not a Wan pipeline")
    for name, entry in entries.items():
        if name in names or (isinstance(entry, list) and entry != [None, None]):
            found = ".".join(map(str, entry)) if isinstance(entry, list) else str(entry)
            if not re.fullmatch(_ENTRIES.get(name, "$^"), found):
                raise FileError(f"{index}: {name} is {found}, which no Wan2.2 model has: {advice}")
    if absent := sorted(set(names) - entries.keys()):
        raise FileError(f"{index} names no {', '.join(absent)}, which a Wan2.2 model has: {advice}")


def read_config(part: Path, class_name: str) -> dict[str, Any]:
    """The configuration of a network in a folder of its own; FileError if it is of another class, or quantised."""
    path = part / "config.json"
    config = read_json_object(path)
    if config.get("_class_name", class_name) != class_name:
        raise FileError(f"{path} is of {config['_class_name']}, and {part.name} must be {class_name}")
    if config.get("quantization_config") is not None:
        advice = "use the folder in 16 or 32 bits, with runtime.precision or model.gguf"
        raise FileError(f"{path} is of quantised weights, which are not supported: {advice}")
    return config


def weights_file(part: Path) -> Path:
    """The safetensors file with a network's weights, or the index of its parts; FileError if there is neither."""
    stem = "model" if part.name == "text_encoder" else "diffusion_pytorch_model"
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


def load_tokenizer(part: Path) -> Any:
    """The tokenizer in a folder of its own.

    transformers makes one without a vocabulary where its files are absent, to which every word is unknown.

    Raises:
        FileNotFoundError, FileError: if it is absent, damaged or without a vocabulary, or would run code of its own.
    """
    files = [check_regular(path) for path in sorted(part.iterdir()) if not (path.name.startswith(".") or path.is_dir())]
    return _loaded_tokenizer(part, tuple((path.name, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=1)
def _loaded_tokenizer(part: Path, files: tuple[tuple[str, int], ...]) -> Any:
    path = part / "tokenizer_config.json"
    config = read_json_object(path) if path.exists() else {}
    kind = str(config.get("tokenizer_class", "T5Tokenizer"))
    if not kind.endswith(("Tokenizer", "TokenizerFast", "TokenizersBackend")):
        raise FileError(f"{path}: tokenizer_class is {kind}, which is not a tokenizer")
    if "auto_map" in config:
        raise FileError(f"{path} would run code (auto_map): use that of the published model")
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
    with torch.device("meta"):
        return build(class_name, json.loads(text))


def build(class_name: str, config: dict[str, Any]) -> Any:
    """A network of a class of :data:`CLASSES`."""
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


def _other_layout(folder: Path) -> str:
    """Why a place without ``model_index.json`` is refused."""
    if folder.is_file() and folder.suffix == ".safetensors":
        read_header(folder)  # for its errors
    what = "a single file"
    if folder.is_dir():
        what = "not a model folder: it contains no model_index.json, and is not in Wan's original layout"
        if not any(path.suffix in (".safetensors", ".gguf") for path in folder.iterdir()):
            return f"{folder} is {what}"
    return f"{folder} is {what}. Files of experts are named by model.gguf, others by model.vae, model.text_encoder"
