"""LoRA files on disk: which file belongs to which expert, and opening one without reading its weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storymem.wan.lora_layouts import COMPONENTS, Expert
from storymem.weights import MissingWeights, Weights

#: diffusers keeps the PEFT configuration of a LoRA file under this key of the safetensors metadata.
PEFT_METADATA = "lora_adapter_metadata"

_NAMED: dict[Expert, re.Pattern[str]] = {
    "high_noise": re.compile(r"(?<![a-z])high(?:[-_ ]?noise)?(?![a-z])"),
    "low_noise": re.compile(r"(?<![a-z])low(?:[-_ ]?noise)?(?![a-z])"),
}

# Raised by torch on a pickle with forbidden content (the first) or on a damaged one (all of them).
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A LoRA file whose header has been read: the shape of every key, and the metadata; no weights yet."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    unpickled: Mapping[str, Tensor] | None = None

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors of ``keys`` (on the CPU, in the file's dtype)."""
        if self.unpickled is not None:
            return {key: self.unpickled[key] for key in keys}
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    def peft_config(self, prefix: str) -> dict[str, Any] | None:
        """The PEFT configuration, from the file's metadata or from ``adapter_config.json`` beside it.

        Args:
            prefix: what the configuration's names start with in the metadata, as the keys of the expert do
                (``transformer.``), or nothing.
        """
        if PEFT_METADATA in self.metadata:
            config = json_object(self.metadata[PEFT_METADATA], f"{self.path}, metadata {PEFT_METADATA}")
            return {key.removeprefix(prefix): config[key] for key in config if key.startswith(prefix)} or None
        beside = self.path.with_name("adapter_config.json")
        return json_object(beside.read_text(), str(beside)) if beside.is_file() else None


def open_adapter_file(path: Path) -> AdapterFile:
    """Open a ``.safetensors`` or ``.pth`` LoRA file.

    A ``.pth`` file is a pickle and is read with ``weights_only=True``: tensors load, code does not run.

    Raises:
        ValueError: if the file is damaged, or a pickle that holds anything but named tensors.
    """
    if path.suffix == ".pth":
        state = _unpickle(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        return AdapterFile(path=path, shapes=shapes, metadata={}, unpickled=state)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return AdapterFile(path=path, shapes=shapes, metadata=file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); it may be a broken download") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        # Files of the zip format can be mapped, so that only the tensors that are used are read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} was refused: it is damaged or holds more than tensors ({reason}). "
            "Use the .safetensors file in its place."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} does not hold a state dict (key -> tensor), but a {type(state).__name__}")
    return state


def json_object(text: str, where: str) -> dict[str, Any]:
    """Parse ``text`` as a JSON object; anything else is a ``ValueError`` that names ``where``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {text[:40]!r}")
    return value


def find_adapter_files(source: Path, experts: Sequence[Expert], weights: Weights) -> dict[Expert, Path]:
    """The file of each expert: two names that say high and low, two sub-folders, or one file for both.

    Args:
        source: a file, or a folder that holds LoRA files.
        experts: the experts that are wanted; the others' files are not looked for.
        weights: what is being looked for, for the message.

    Raises:
        MissingWeights: if no file is found for an expert.
        ValueError: if more than one file could be meant.
    """
    if source.is_file():
        return dict.fromkeys(experts, source)
    here = _lora_files(source)
    found: dict[Expert, Path] = {}
    for expert in experts:
        candidates = [path for path in here if _NAMED[expert].search(path.stem.lower())]
        for folder in (source / COMPONENTS[expert], source / expert):
            candidates = candidates or _lora_files(folder)
        if not candidates:
            candidates = [path for path in here if not any(name.search(path.stem.lower()) for name in _NAMED.values())]
        if not candidates:
            raise _missing(source, expert, here, weights)
        if len(candidates) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in candidates)
            raise ValueError(f"{source} holds more than one adapter file for the {expert} expert: {names}; keep one")
        found[expert] = candidates[0]
    return found


def _lora_files(folder: Path) -> list[Path]:
    """Adapter files right in ``folder``; a ``.pth`` whose ``.safetensors`` twin is there is left out."""
    safe = sorted(folder.glob("*.safetensors"))
    return safe + sorted(path for path in folder.glob("*.pth") if path.with_suffix(".safetensors") not in safe)


def _missing(source: Path, expert: Expert, here: Sequence[Path], weights: Weights) -> MissingWeights:
    holds = ", ".join(path.name for path in here) or "no adapter file"
    lines = [f"{weights.name}: {source} holds {holds}, so nothing for the {expert} expert."]
    inside = sorted(path.name for path in source.glob("*/") if path.is_dir() and _lora_files(path))
    if inside:
        lines.append(f"  Sub-folders with adapters, of which one can be chosen as subfolder=: {', '.join(inside)}")
    lines.append(f"  wanted: backbone_{expert}.safetensors or .pth, or pytorch_lora_weights.safetensors for both")
    if not weights.is_local:
        lines.append(f"  download: {weights.download_command}")
    return MissingWeights("\n".join(lines))


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file under a temporary name, then rename it: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(on_cpu, unfinished, metadata={"format": "pt", **metadata})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
