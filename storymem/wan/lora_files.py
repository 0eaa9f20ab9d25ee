"""LoRA files on disk: which belongs to which expert, what one says of itself, and opening it without its weights."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from storymem.io import FileError, check_regular, parse_json, read_json_object
from storymem.wan.names import ADAPTED_LINEARS, COMPONENTS, Expert
from storymem.wan.settings import MemoryMode
from storymem.weights import MissingWeights, Weights, check_values, read_header

#: The published training configuration, which the released files do not carry.
PUBLISHED_RANK = 128
PUBLISHED_ALPHA = 128.0
PUBLISHED_USE_RSLORA = True

#: Keys of a file's metadata: diffusers' for a PEFT configuration, and ours for :class:`AdapterInfo`.
PEFT_METADATA = "lora_adapter_metadata"
INFO_METADATA = "storymem"
_INFO_VERSION = 1
_MOST = 1e6  # of a rank or an alpha

T = TypeVar("T")

# Raised by torch on a pickle with forbidden content (the first) or on a damaged one (all of them).
_UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, LookupError, ValueError),
    *(TypeError, AttributeError, AssertionError, struct.error),
)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What a memory adapter is and how it was trained; travels in the metadata of its files.

    Args:
        rank: rank of the low-rank matrices; the most common one where modules differ.
        alpha: W + scale * B @ A with scale = alpha / sqrt(rank) under rsLoRA, else alpha / rank.
        use_rslora: which of the two.
        memory_attention: the memory mode it was trained for: ``joint``, the published one (memory slots are
            denoised with the video), or ``cached`` (memory slots are clean and look only at memory).
        rope_stride: S, the step between the temporal positions of memory slots.
        conditioning: beyond memory, what it was trained to continue from: ``m2v``, ``mi2v``, ``mm2v``;
            ``None`` if the file does not say.
        training: free notes on the training run, anything that JSON can hold.
    """

    rank: int = PUBLISHED_RANK
    alpha: float = PUBLISHED_ALPHA
    use_rslora: bool = PUBLISHED_USE_RSLORA
    memory_attention: MemoryMode = "joint"
    rope_stride: int = 5
    conditioning: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("rank", "rope_stride"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MOST:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not is_scale_number(self.alpha):
            raise ValueError(f"alpha must be a positive number, not {self.alpha!r}")
        if self.memory_attention not in ("joint", "cached"):
            raise ValueError(f"memory_attention must be 'joint' or 'cached', not {self.memory_attention!r}")
        for name, kind in (("use_rslora", bool), ("conditioning", str | None), ("training", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}")

    def scale(self, rank: int) -> float:
        """The factor of B @ A in a module of the given rank."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_metadata(self) -> dict[str, str]:
        """The entry of a file's metadata that :meth:`from_file` reads."""
        return {INFO_METADATA: json.dumps({"version": _INFO_VERSION, **asdict(self)}, sort_keys=True)}

    @classmethod
    def from_file(cls, file: AdapterFile) -> AdapterInfo | None:
        """What ``file`` says about itself; ``None`` if :func:`save_memory_lora` did not write it.

        Raises:
            ValueError: if the entry is damaged or of a newer version.
        """
        where = f"{file.path}, metadata {INFO_METADATA}"
        values = file.json_metadata(INFO_METADATA)
        if values is None:
            return None
        version = values.pop("version", None)
        if version != _INFO_VERSION:
            raise FileError(f"{where} has version {version}; this release of storymem reads version {_INFO_VERSION}")
        if unknown := sorted(values.keys() - {known.name for known in fields(cls)}):
            raise FileError(f"{where} has unknown entries: {', '.join(unknown)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise FileError(f"{where}: {error}") from None


def is_scale_number(value: Any) -> bool:
    """Whether ``value`` can be an alpha."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST


def most_common(values: Iterable[T]) -> T:
    """The value that occurs most often; of equals the first."""
    return Counter(values).most_common(1)[0][0]


def peft_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool, targets: Sequence[str] = ()
) -> dict[str, Any]:
    """Keyword arguments of ``peft.LoraConfig`` for modules of given ranks and alphas; ``targets``: if not the ten."""
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(targets or ADAPTED_LINEARS.values()),
        "bias": "none",
    }


def memory_lora_config(
    rank: int = PUBLISHED_RANK,
    alpha: float = PUBLISHED_ALPHA,
    use_rslora: bool = PUBLISHED_USE_RSLORA,
    dropout: float = 0.05,
) -> LoraConfig:
    """The PEFT configuration for training a memory adapter, by default the published one.

    It adapts q, k, v and o of self- and cross-attention and both linears of the feed-forward network of every
    block, and nothing else; for ``WanTransformer3DModel.add_adapter``.
    """
    return LoraConfig(**peft_config({"": rank}, {"": alpha}, use_rslora), lora_dropout=dropout)


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A LoRA file whose header has been read: the shape of every key, and the metadata; no weights yet."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    unpickled: Mapping[str, Tensor] | None = None

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors of ``keys`` (on the CPU, in the file's dtype).

        Raises:
            NotFiniteError: if one of them is NaN, infinite or too large to be a weight.
        """
        if self.unpickled is not None:
            found = {key: self.unpickled[key] for key in keys}
        else:
            with safe_open(self.path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in keys}
        check_values(found.items(), self.path)
        return found

    def json_metadata(self, key: str) -> dict[str, Any] | None:
        """The JSON object under ``key`` of the metadata; None if there is no such key."""
        if key not in self.metadata:
            return None
        where = f"{self.path}, metadata {key}"
        value = parse_json(self.metadata[key], where)
        if not isinstance(value, dict):
            raise FileError(f"{where} must be a JSON object, not {self.metadata[key][:40]!r}")
        return value

    def peft_config(self, prefix: str) -> tuple[dict[str, Any], str] | None:
        """The PEFT configuration and where it stands: the metadata, or ``adapter_config.json`` beside the file.

        Args:
            prefix: what the configuration's names start with in the metadata, as the keys of the expert do
                (``transformer.``), or nothing.
        """
        config, where = self.json_metadata(PEFT_METADATA), f"{self.path}, metadata {PEFT_METADATA}"
        if config is not None:
            config = {key.removeprefix(prefix): config[key] for key in config if key.startswith(prefix)}
        elif (beside := self.path.with_name("adapter_config.json")).exists():
            config, where = read_json_object(beside), str(beside)
        return (config, where) if config else None


def open_adapter_file(path: Path) -> AdapterFile:
    """Open a ``.safetensors`` or ``.pth`` LoRA file.

    A ``.pth`` file is a pickle and is read with ``weights_only=True``: tensors load, code does not run.

    Raises:
        ValueError: if the file is damaged, or a pickle that holds anything but named tensors.
    """
    if path.suffix != ".pth":
        header = read_header(path)
        return AdapterFile(path=path, shapes=header.shapes, metadata=header.metadata)
    check_regular(path)
    try:
        # Files of the zip format can be mapped, so that only the tensors that are used are read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(
            f"{path} was refused: it is damaged or holds more than tensors ({reason}). "
            "Use the .safetensors file in its place."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise FileError(f"{path} does not hold a state dict (key -> tensor), but a {type(state).__name__}")
    said = getattr(state, "_metadata", {})  # where state dicts keep versions, and our own files their description
    metadata = {key: value for key, value in said.items() if isinstance(value, str)}
    return AdapterFile(
        path=path, shapes={k: tuple(v.shape) for k, v in state.items()}, metadata=metadata, unpickled=state
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


# Words that say the expert, those that say it best first.
_NAMES: list[dict[Expert, set[str]]] = [
    {"high_noise": {"highnoise"}, "low_noise": {"lownoise"}},
    {"high_noise": {"high"}, "low_noise": {"low"}},
    {"high_noise": {"h", "hn"}, "low_noise": {"l", "ln"}},
]


def expert_named(name: str, *, by_letter: bool = False) -> Expert | None:
    """The expert that a file's or folder's name says: ``x_high_noise``, ``x-HighNoise``, ``x_HIGH``; None if neither.

    Args:
        name: without suffix.
        by_letter: whether H and L (or HN and LN) alone count.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    said = {*words, *(first + second for first, second in pairwise(words))}
    for names in _NAMES if by_letter else _NAMES[:2]:
        found = [expert for expert, ways in names.items() if ways & said]
        if found:
            return found[0] if len(found) == 1 else None
    return None


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
    if not source.is_dir():
        return dict.fromkeys(experts, check_regular(source))
    here = _lora_files(source)
    named = {path: expert_named(path.stem) for path in here}
    if not any(named.values()):
        by_letter = {path: expert_named(path.stem, by_letter=True) for path in here}
        named = by_letter if set(COMPONENTS) <= set(by_letter.values()) else named
    folders = {path: expert_named(path.name) for path in sorted(source.iterdir()) if path.is_dir()}
    found: dict[Expert, Path] = {}
    for expert in experts:
        candidates = [path for path, says in named.items() if says == expert]
        if not candidates:
            inside = [path for path, says in folders.items() if says == expert or path.name == COMPONENTS[expert]]
            candidates = [file for folder in inside for file in _lora_files(folder)]
        if not candidates and not any(named.values()):
            candidates = here
        if not candidates:
            raise _missing(source, expert, here, weights)
        if len(candidates) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in candidates)
            raise ValueError(
                f"{source} holds more than one adapter file for the {expert} expert: {names}; keep one for each "
                "expert, with high_noise and low_noise in their names"
            )
        found[expert] = candidates[0]
    return found


def _lora_files(folder: Path) -> list[Path]:
    """Adapter files right in ``folder``; a ``.pth`` whose ``.safetensors`` twin is there is left out."""
    safe = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
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
