"""LoRA files: which file is for which expert, what a key stands for, what a file states about itself, and writing.

Every layout in circulation names the same modules in its own way:

=========  =======================================  ==========================================================
layout     files written                            a key
=========  =======================================  ==========================================================
storymem   {high,low}_noise.safetensors             blocks.0.attn1.to_q.lora_A.weight
released   backbone_{high,low}_noise.safetensors    base_model.model.blocks.0.self_attn.q.lora_A.weight
diffusers  pytorch_lora_weights.safetensors         transformer.blocks.0.attn1.to_q.lora_A.weight
comfyui    memory_{high,low}_noise.safetensors      diffusion_model.blocks.0.self_attn.q.lora_down.weight
kohya      (read only)                              lora_unet_blocks_0_self_attn_q.lora_down.weight
DiffSynth  (read only)                              pipe.dit.blocks.0.self_attn.q.lora_A.default.weight
Memento    (read only)                              high_noise_model.base_model.model.blocks.0.self_attn.q...
=========  =======================================  ==========================================================

Files of ``storymem`` and ``released`` may also hold a :class:`storymem.wan.keyframe_query.KeyframeQuery`, under names
that begin with ``keyframe_query.``; Memento's files do.

``storymem`` and ``diffusers`` store A and B as trained, and alpha and rsLoRA in the metadata; ``load_lora_adapter`` of
diffusers reads both. Readers of ``released`` ignore metadata and take alpha = rank with rsLoRA, so B is rescaled to
that, and each file is also written as ``.pth``, which the published code opens. ComfyUI knows alpha / rank only, so its
alpha is chosen to give the true scale. diffusers' converters of the other layouts are not used: they drop ``.diff`` of
norms, and fail where a linear has no adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft.utils.other import get_pattern_key
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from torch import Tensor

from storymem.config import STRICT, ConfigError, build_settings, check_bounds
from storymem.io import FileError, check_regular, parse_json, read_json_object, replacing
from storymem.wan.checkpoints import Checkpoint
from storymem.wan.settings import MemoryMode
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import MissingWeights, Weights

Layout = Literal["storymem", "released", "diffusers", "comfyui"]
Part = Literal["A", "B", "bias", "alpha", "diff", "diff_b"]
Parts = dict[str, dict[Part, str]]  # diffusers' name of a module -> part -> key in the file

#: The linears of a block that a memory adapter changes.
ADAPTED_LINEARS = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")]
ADAPTED_LINEARS += ["ffn.net.0.proj", "ffn.net.2"]
#: Key of a file's metadata under which diffusers stores a PEFT configuration.
PEFT_METADATA = "lora_adapter_metadata"
_INFO_METADATA, _INFO_VERSION = "storymem", 1
#: Of the names of a KeyframeQuery's tensors.
QUERY_PREFIX = "keyframe_query."
_RELEASED_PREFIX = "base_model.model."
_ALPHA_METADATA = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
_QUERY = re.compile(r"(?:(?:high|low)_noise_model\.)?(?:base_model\.model\.)?keyframe_query\.(?P<name>.+)")
_MOST = 1e6  # of a rank or an alpha

_ORIGINAL = {  # diffusers' name of a part -> the original one
    **{"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"},
    **{"net.0.proj": "0", "net.2": "2", "norm2": "norm3", "scale_shift_table": "modulation"},
    **{f"condition_embedder.text_embedder.linear_{n}": f"text_embedding.{2 * n - 2}" for n in (1, 2)},
    **{f"condition_embedder.time_embedder.linear_{n}": f"time_embedding.{2 * n - 2}" for n in (1, 2)},
    **{"condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head"},
}
_PARTS = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _ORIGINAL))})(?![^.])")
_KEY = re.compile(
    r"(?:(?P<component>transformer|transformer_2)\.)?"
    r"(?:(?:high|low)_noise_model\.)?(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|pipe\.|dit\.|model\.)*"
    r"(?:lora_unet_+|lora_transformer_+|lycoris_+)?"
    r"(?P<module>.+?)\."
    r"(?:(?P<A>lora_A|lora_down|lora\.down)(?:\.(?!weight$)[^.]+)?\.weight"
    r"|(?:lora_B|lora_up|lora\.up)(?:\.(?!weight$|bias$)[^.]+)?\.(?:(?P<B>weight)|(?P<bias>bias))"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<table>diff_m))"
)


# Keys


class Key(NamedTuple):
    """A key of a LoRA file: the expert's component in its prefix, the module as spelled there, and its part."""

    component: str | None
    module: str
    part: Part


def parse_key(key: str) -> Key | None:
    """A key in any layout; None if it is not of that form."""
    if (match := _KEY.fullmatch(key)) is None:
        return None
    if match["table"]:  # of shifts and scales
        return Key(match["component"], f"{match['module']}.modulation", "diff")
    return Key(match["component"], match["module"], next(part for part in get_args(Part) if match[part]))


def original_name(name: str) -> str:
    """The name of a module or table in the original network: ``blocks.0.attn1.to_q`` -> ``blocks.0.self_attn.q``."""
    if name == "scale_shift_table":
        return "head.modulation"
    return _PARTS.sub(lambda match: _ORIGINAL[match[0]], name)


# Description


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterInfo:
    """What a memory adapter is and how it was trained; stored in the metadata of its files.

    Args:
        rank: of the low-rank matrices; the most common one where modules differ.
        alpha: W + scale * B @ A with scale = alpha / sqrt(rank) under rsLoRA, else alpha / rank.
        use_rslora: which of the two.
        memory_attention: the layout it was trained for; see :mod:`storymem.wan.segments`.
        rope_stride: S, the distance between memory frames on the temporal axis.
        conditioning: beyond memory, what it was trained to continue from: ``m2v``, ``mi2v``, ``mm2v``; None: unknown.
        objective: the system that it was trained for: "memory" is StoryMem.
        training: notes on the training run, any JSON.
    """

    rank: int = 128
    alpha: float = 128.0
    use_rslora: bool = True
    memory_attention: MemoryMode = "joint"
    rope_stride: int = 5
    conditioning: str | None = None
    objective: str = "memory"
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_bounds(self, rank=(1, _MOST), alpha=(1 / _MOST, _MOST), rope_stride=(1, _MOST))

    def scale(self, rank: int) -> float:
        """The factor of B @ A in a module of ``rank``."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)


#: The published training configuration, which the released files do not contain.
PUBLISHED = AdapterInfo()


def peft_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool, targets: Sequence[str] = ADAPTED_LINEARS
) -> dict[str, Any]:
    """Arguments of ``peft.LoraConfig`` for modules of given ranks and alphas."""
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(targets),
        "bias": "none",
    }


# Reading


class LoraFile:
    """A ``.safetensors`` or ``.pth`` file; FileError if it is damaged or contains anything but named tensors.

    Attributes:
        shapes: of all tensors but those of a KeyframeQuery, by key.
        query: keys of the tensors of a KeyframeQuery by their names in it; empty if there is none.
        query_shapes: of these, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._checkpoint = path, Checkpoint.open(path)
        shapes, _, self.metadata = self._checkpoint.header
        self.query = {match["name"]: key for key in shapes if (match := _QUERY.fullmatch(key))}
        self.query_shapes = {name: shapes[key] for name, key in self.query.items()}
        self.shapes = {key: shape for key, shape in shapes.items() if key not in self.query.values()}

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``keys``, on the CPU in the file's dtype; NotFiniteError if one is NaN or far too large."""
        return self._checkpoint.tensors(keys)

    @property
    def info(self) -> AdapterInfo | None:
        """Its description; None if this package did not write it, FileError if it is damaged or of a newer version."""
        where = f"{self.path}, metadata {_INFO_METADATA}"
        if (values := self._json(_INFO_METADATA)) is None:
            return None
        if (version := values.pop("version", None)) != _INFO_VERSION:
            raise FileError(f"{where} has version {version}; this release of storymem reads version {_INFO_VERSION}")
        try:
            return build_settings(AdapterInfo, values)
        except ConfigError as error:
            raise FileError(f"{where}: {error}") from None

    def scale_config(self, prefix: str) -> tuple[dict[str, Any], str] | None:
        """The scale that the file states, as a PEFT configuration, and where it is stated.

        Read from a PEFT configuration (in the metadata, or in ``adapter_config.json`` beside the file), our own
        description, or single entries of the metadata; names may have the ``prefix`` of the expert's keys.
        """
        config, where = self._json(PEFT_METADATA), f"{self.path}, metadata {PEFT_METADATA}"
        if config is not None:
            config = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        elif (beside := self.path.with_name("adapter_config.json")).exists():
            config, where = read_json_object(beside), str(beside)
        if config and (config.get("use_dora") or config.get("peft_type", "LORA") != "LORA"):
            raise FileError(f"{where} is not that of a plain LoRA, the only kind of adapter that is supported")
        if config and "lora_alpha" in config:
            return config, where
        if (info := self.info) is not None:
            return {"lora_alpha": info.alpha, "use_rslora": info.use_rslora}, "its metadata"
        entries = {key.removeprefix(prefix): value for key, value in self.metadata.items()}
        for name in _ALPHA_METADATA:
            try:
                alpha = float(entries.get(name, ""))
            except ValueError:  # "", "None", "Dynamic"
                continue
            use_rslora = entries.get("use_rslora", "").lower() in ("true", "1")
            return {"lora_alpha": alpha, "use_rslora": use_rslora}, f"its metadata {name}"
        return None

    def _json(self, key: str) -> dict[str, Any] | None:
        if key not in self.metadata:
            return None
        where = f"{self.path}, metadata {key}"
        value = parse_json(self.metadata[key], where)
        if not isinstance(value, dict):
            raise FileError(f"{where} must be a JSON object, not {self.metadata[key][:40]!r}")
        return value


# Scale


class Scale(NamedTuple):
    """Alpha of every module with A and B, whether rsLoRA is used, and where this is from."""

    alphas: dict[str, float]
    use_rslora: bool
    source: str


UNKNOWN_SCALE = "the file states no alpha, so it is taken to be the rank"


def resolve_scale(
    file: LoraFile, lora: Parts, prefix: str, *, alpha: float | None, use_rslora: bool | None, memory: bool
) -> Scale:
    """The scale that a file states; else the caller's; else alpha = rank, which is scale 1.

    Memory adapters in the released layout have the published scale.
    """
    if (stated := _stated_scale(file, lora, prefix)) is not None:
        differs = alpha is not None and not all(math.isclose(a, alpha, rel_tol=1e-6) for a in stated.alphas.values())
        if differs or use_rslora not in (None, stated.use_rslora):
            states = f"alpha={next(iter(stated.alphas.values()), 1):g}, use_rslora={stated.use_rslora}"
            given = f"alpha={alpha}, use_rslora={use_rslora}"
            raise ValueError(f"{file.path} states {states}, which contradicts {given}: leave these arguments out")
        return stated
    released = memory and all(_RELEASED_PREFIX in parts["A"] for parts in lora.values())
    use_rslora = (released and PUBLISHED.use_rslora) if use_rslora is None else use_rslora
    if alpha is not None:
        return Scale(dict.fromkeys(lora, float(alpha)), use_rslora, "from the settings")
    if released:
        return Scale(dict.fromkeys(lora, PUBLISHED.alpha), use_rslora, "as published")
    return Scale(ranks_of(file, lora), use_rslora, UNKNOWN_SCALE)


def _stated_scale(file: LoraFile, lora: Parts, prefix: str) -> Scale | None:
    """From alpha tensors, which mean alpha / rank, else from a configuration."""
    if keys := {name: parts["alpha"] for name, parts in lora.items() if "alpha" in parts}:
        tensors = file.tensors(keys.values())
        alphas = {name: _alpha(tensors[key].item(), f"{file.path}: {key}") for name, key in keys.items()}
        return Scale(ranks_of(file, lora) | alphas, False, "from its alphas")
    if (found := file.scale_config(prefix)) is None:
        return None
    config, where = found
    patterns, use_rslora = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
    if not isinstance(patterns, dict) or not isinstance(use_rslora, bool):
        raise FileError(f"{where}: alpha_pattern must be an object, and use_rslora true or false")
    modules = {name: read.module for name, parts in lora.items() if (read := parse_key(parts["A"]))}
    try:
        pattern = {name: get_pattern_key(list(patterns), module) for name, module in modules.items()}
    except re.error as error:
        raise FileError(f"{where}: alpha_pattern contains an invalid expression: {error}") from None
    found_alphas = {name: patterns.get(pattern[name], config["lora_alpha"]) for name in lora}
    alphas = {name: _alpha(value, f"{where}: lora_alpha") for name, value in found_alphas.items()}
    return Scale(alphas, use_rslora, f"from {where}")


def ranks_of(file: LoraFile, lora: Parts) -> dict[str, float]:
    """The rank of every module with A and B."""
    return {name: float(file.shapes[parts["A"]][0]) for name, parts in lora.items()}


def _alpha(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        raise FileError(f"{where} must be a positive number, not {value!r}")
    return float(value)


# Which file


def expert_named(name: str, *, by_letter: bool = False) -> Expert | None:
    """The expert in the name of a file or folder: ``x_high_noise``, ``x-HighNoise``, ``x_HIGH``; by letter ``x_H``."""
    words = "_".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()
    ways = [("high_?noise", "low_?noise"), ("high", "low"), ("hn?", "ln?")]  # from the clearest on
    for pair in ways if by_letter else ways[:2]:
        found = [it for it, way in zip(COMPONENTS, pair, strict=True) if re.search(rf"(?:^|_){way}(?:_|$)", words)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def find_lora_files(source: Path, experts: Sequence[Expert], weights: Weights) -> dict[Expert, Path]:
    """The file of each of ``experts`` in ``source``, a file or folder: by two names, two sub-folders, or one for both.

    Raises:
        MissingWeights: if there is no file for an expert; ``weights`` is named in the message.
        ValueError: if there are several.
    """
    if not source.is_dir():
        return dict.fromkeys(experts, check_regular(source))
    here = _files_in(source)
    names = {path: expert_named(path.stem) for path in here}
    if not any(names.values()):
        letters = {path: expert_named(path.stem, by_letter=True) for path in here}
        names = letters if {*COMPONENTS} <= {*letters.values()} else names
    folders = {path: files for path in sorted(source.iterdir()) if path.is_dir() and (files := _files_in(path))}
    found: dict[Expert, Path] = {}
    for expert in experts:
        own = [path for path in folders if expert_named(path.name) == expert or path.name == COMPONENTS[expert]]
        candidates = [path for path, name in names.items() if name == expert]
        candidates = candidates or [file for folder in own for file in folders[folder]]
        candidates = candidates or (here if not any(names.values()) else [])
        if len(candidates) > 1:
            several = ", ".join(str(path.relative_to(source)) for path in candidates)
            raise ValueError(
                f"{source} holds more than one adapter file for the {expert} expert: {several}; keep one for each "
                "expert, with high_noise and low_noise in their names"
            )
        if not candidates:
            holds = ", ".join(path.name for path in here) or "no adapter file"
            inside = ", ".join(path.name for path in folders)
            lines = {
                f"{weights.name}: {source} holds {holds}, so nothing for the {expert} expert.": True,
                f"  Sub-folders with adapters, of which one can be chosen as subfolder=: {inside}": inside,
                f"  wanted: backbone_{expert}.safetensors or .pth, or pytorch_lora_weights.safetensors for both": True,
                f"  download: {weights.download_command}": not weights.is_local,
            }
            raise MissingWeights("\n".join(line for line, applies in lines.items() if applies))
        found[expert] = candidates[0]
    return found


def _files_in(folder: Path) -> list[Path]:
    """LoRA files directly in ``folder``, without those ``.pth`` that are there as ``.safetensors`` too."""
    safe = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return safe + sorted(path for path in folder.glob("*.pth") if path.with_suffix(".safetensors") not in safe)


# Writing


class _Form(NamedTuple):
    """How a layout is written: names of files, prefix of keys, the original network's names or diffusers', matrices."""

    file: str
    prefix: str
    original: bool
    matrices: Mapping[str, str]


_AB, _DOWN_UP = {"A": "lora_A", "B": "lora_B"}, {"A": "lora_down", "B": "lora_up"}
_FORMS: dict[Layout, _Form] = {
    "storymem": _Form("{expert}.safetensors", "", False, _AB),
    "released": _Form("backbone_{expert}.safetensors", _RELEASED_PREFIX, True, _AB),
    "diffusers": _Form("pytorch_lora_weights.safetensors", "{component}.", False, _AB),
    "comfyui": _Form("memory_{expert}.safetensors", "diffusion_model.", True, _DOWN_UP),
}


def write_memory_lora(
    states: Mapping[Expert, Mapping[str, Tensor]],
    folder: str | Path,
    *,
    info: AdapterInfo,
    layout: Layout = "storymem",
) -> list[Path]:
    """Write the weights of an adapter; returns the safetensors files written.

    Args:
        states: for each expert, ``blocks.0.attn1.to_q.lora_A.weight`` ... -> tensor, and ``keyframe_query.queries`` ...
            where there is a KeyframeQuery.
        folder: created if absent.
        info: the scale of these weights, and what else the metadata contains.
        layout: one of those in the module's table.
    """
    if layout not in _FORMS:
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    form, stated = _FORMS[layout], info
    if layout == "comfyui":
        stated = replace(info, alpha=info.scale(info.rank) * info.rank, use_rslora=False)
    elif layout == "released":
        stated = replace(info, alpha=float(info.rank), use_rslora=True)
    tensors: dict[Path, dict[str, Tensor]] = {}
    configs: dict[Path, dict[str, Any]] = {}
    for expert, state in states.items():
        path = Path(folder) / form.file.format(expert=expert)
        written, config = tensors.setdefault(path, {}), configs.setdefault(path, {})
        prefix, ranks = form.prefix.format(component=COMPONENTS[expert]), {}
        for key, tensor in state.items():
            if key.startswith(QUERY_PREFIX):
                written[prefix + key] = tensor.detach().cpu().contiguous()
                continue
            name, part = key.removesuffix(".weight").rsplit(".lora_", 1)
            module = prefix + (original_name(name) if form.original else name)
            ranks[name] = rank = tensor.shape[0 if part == "A" else 1]
            if layout == "comfyui":
                written[f"{module}.alpha"] = torch.tensor(info.scale(rank) * rank)
            elif part == "B":
                tensor = scaled(tensor, info.scale(rank) / stated.scale(rank))
            written[f"{module}.{form.matrices[part]}.weight"] = tensor.detach().cpu().contiguous()
        if not form.original:  # diffusers reads these files
            peft = peft_config(ranks, dict.fromkeys(ranks, info.alpha), info.use_rslora)
            config |= {f"{prefix}{key}": value for key, value in peft.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    described = json.dumps({"version": _INFO_VERSION, **asdict(stated)}, sort_keys=True)
    for path, state in tensors.items():
        metadata = {_INFO_METADATA: described}
        if configs[path]:
            metadata[PEFT_METADATA] = json.dumps(configs[path], sort_keys=True)
        if layout == "released":
            pickled = OrderedDict(state)
            pickled._metadata = metadata  # type: ignore[attr-defined]  # where state dicts of modules have theirs
            with replacing(path.with_suffix(".pth")) as partial:
                torch.save(pickled, partial)
        with replacing(path) as partial:
            save_file(state, partial, metadata={"format": "pt", **metadata})
    return list(tensors)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``factor * tensor``, computed in float32; the very same numbers where ``factor`` is 1."""
    return tensor if math.isclose(factor, 1.0, rel_tol=1e-9) else (tensor.float() * factor).to(tensor.dtype)
