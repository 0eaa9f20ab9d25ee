"""What an adapter says about itself, and the scale at which its low-rank product is added to a weight."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from storymem.wan.lora_files import AdapterFile, json_object
from storymem.wan.lora_layouts import ADAPTED_LINEARS, LinearKeys
from storymem.wan.settings import MemoryMode

#: The published training configuration, which the released files do not carry.
PUBLISHED_RANK = 128
PUBLISHED_ALPHA = 128.0
PUBLISHED_USE_RSLORA = True

#: Key of :class:`AdapterInfo` in the safetensors metadata.
INFO_METADATA = "storymem"
_INFO_VERSION = 1

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What a memory adapter is and how it was trained; travels in the metadata of its safetensors files.

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
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a positive number, not {self.alpha}")
        if self.memory_attention not in ("joint", "cached"):
            raise ValueError(f"memory_attention must be 'joint' or 'cached', not {self.memory_attention!r}")
        if self.rope_stride < 1:
            raise ValueError(f"rope_stride must be at least 1, not {self.rope_stride}")

    def scale(self, rank: int) -> float:
        """The factor of B @ A in a module of the given rank."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_metadata(self) -> dict[str, str]:
        """The entry of the safetensors metadata that :meth:`from_file` reads."""
        return {INFO_METADATA: json.dumps({"version": _INFO_VERSION, **asdict(self)}, sort_keys=True)}

    @classmethod
    def from_file(cls, file: AdapterFile) -> AdapterInfo | None:
        """What ``file`` says about itself; ``None`` if it was not written by :func:`save_memory_lora`.

        Raises:
            ValueError: if the entry is damaged or of a newer version.
        """
        if INFO_METADATA not in file.metadata:
            return None
        where = f"{file.path}, metadata {INFO_METADATA}"
        values = json_object(file.metadata[INFO_METADATA], where)
        version = values.pop("version", None)
        if version != _INFO_VERSION:
            raise ValueError(f"{where} has version {version}; this release of storymem reads version {_INFO_VERSION}")
        unknown = sorted(values.keys() - {known.name for known in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has unknown entries: {', '.join(unknown)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LoraScale:
    """Alpha of every adapted linear, and whether rsLoRA divides it by sqrt(rank) in place of rank."""

    alphas: Mapping[str, float]
    use_rslora: bool


def resolve_scale(
    file: AdapterFile,
    keys: Mapping[str, LinearKeys],
    *,
    prefix: str,
    alpha: float | None,
    use_rslora: bool | None,
) -> LoraScale:
    """The scale a file states; else the one its layout implies or the caller gives; else the published one.

    A ComfyUI file without alphas means scale 1, as ComfyUI reads it.

    Raises:
        ValueError: if the caller's ``alpha`` or ``use_rslora`` contradicts the file.
    """
    stated = _stated_scale(file, keys, prefix)
    if stated is not None:
        differs = alpha is not None and not all(math.isclose(a, alpha, rel_tol=1e-6) for a in stated.alphas.values())
        if differs or use_rslora not in (None, stated.use_rslora):
            asked = f"alpha={alpha}, use_rslora={use_rslora}"
            says = f"alpha={most_common(stated.alphas.values()):g}, use_rslora={stated.use_rslora}"
            raise ValueError(f"{file.path} states {says}, but {asked} was asked for; leave these arguments out")
        return stated
    if any(linear.a.startswith("diffusion_model.") or ".lora_down." in linear.a for linear in keys.values()):
        alphas = {name: float(linear.rank) if alpha is None else alpha for name, linear in keys.items()}
        return LoraScale(alphas=alphas, use_rslora=bool(use_rslora))
    released = all(linear.a.startswith("base_model.model.") for linear in keys.values())
    if not released and (alpha is None or use_rslora is None):
        logger.warning("%s does not state alpha and rsLoRA; the published ones fill in: 128 and true", file.path)
    return LoraScale(
        alphas=dict.fromkeys(keys, PUBLISHED_ALPHA if alpha is None else float(alpha)),
        use_rslora=PUBLISHED_USE_RSLORA if use_rslora is None else use_rslora,
    )


def _stated_scale(file: AdapterFile, keys: Mapping[str, LinearKeys], prefix: str) -> LoraScale | None:
    """From alpha tensors (these mean alpha / rank), else a PEFT configuration, else our own metadata."""
    written = {name: linear.alpha for name, linear in keys.items() if linear.alpha is not None}
    if written:
        numbers = file.tensors(written.values())
        alphas = {name: float(linear.rank) for name, linear in keys.items()}
        return LoraScale(alphas=alphas | {n: numbers[key].item() for n, key in written.items()}, use_rslora=False)
    config = file.peft_config(prefix)
    if config is not None and "lora_alpha" in config:
        special = config.get("alpha_pattern") or {}
        patterns = {name: get_pattern_key(list(special), linear.written) for name, linear in keys.items()}
        alphas = {name: float(special.get(patterns[name], config["lora_alpha"])) for name in keys}
        return LoraScale(alphas=alphas, use_rslora=bool(config.get("use_rslora", False)))
    info = AdapterInfo.from_file(file)
    if info is None:
        return None
    return LoraScale(alphas=dict.fromkeys(keys, info.alpha), use_rslora=info.use_rslora)


def peft_config(ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool) -> dict[str, Any]:
    """Keyword arguments of ``peft.LoraConfig`` for adapted linears of given ranks and alphas."""
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(ADAPTED_LINEARS.values()),
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
    config = peft_config({"": rank}, {"": alpha}, use_rslora)
    return LoraConfig(**config, lora_dropout=dropout)


def most_common(values: Iterable[_T]) -> _T:
    """The value that occurs most often; of equals the first."""
    return Counter(values).most_common(1)[0][0]
