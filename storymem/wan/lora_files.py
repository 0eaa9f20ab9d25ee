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
=========  =======================================  ==========================================================

``storymem`` and ``diffusers`` store A and B as trained, and alpha and rsLoRA in the metadata. Readers of ``released``
ignore metadata and take alpha = rank with rsLoRA, so B is rescaled to that, and each file is also written as ``.pth``,
which the published code opens. ComfyUI knows alpha / rank only, so its alpha is chosen to give the true scale.

diffusers reads the first and the third with ``load_lora_adapter`` of each transformer (``prefix=None`` and
``prefix="transformer_2"``). Its converters of other layouts are not used here: they drop ``.diff`` of norms, and fail
where a linear has no adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storymem.config import STRICT, ConfigError, build_settings, check_bounds
from storymem.io import FileError, check_regular, parse_json, read_json_object, replacing
from storymem.wan.settings import MemoryMode
from storymem.wan.spec import COMPONENTS, Expert
from storymem.weights import MissingWeights, Weights, check_values, read_header, read_pickle

Layout = Literal["storymem", "released", "diffusers", "comfyui"]
Part = Literal["A", "B", "bias", "alpha", "diff", "diff_b"]

#: The linears of a block that a memory adapter changes.
ADAPTED_LINEARS = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")]
ADAPTED_LINEARS += ["ffn.net.0.proj", "ffn.net.2"]
#: Key of a file's metadata under which diffusers stores a PEFT configuration.
PEFT_METADATA = "lora_adapter_metadata"
_INFO_METADATA, _INFO_VERSION = "storymem", 1
_ALPHA_METADATA = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
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
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|pipe\.|dit\.|model\.)*"
    r"(?:lora_unet_+|lora_transformer_+|lycoris_+)?"
    r"(?P<module>.+?)\."
    r"(?:(?P<down>lora_A|lora_down|lora\.down)(?:\.(?!weight$)[^.]+)?\.weight"
    r"|(?P<up>lora_B|lora_up|lora\.up)(?:\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b|diff_m))"
)


# --- keys -----------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A key of a LoRA file: the expert's component in its prefix, the module as spelled there, and its part."""

    component: str | None
    module: str
    part: Part


def parse_key(key: str) -> Key | None:
    """A key in any layout; None if it is not of that form."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    component, module = match["component"], match["module"]
    if match["other"] == "diff_m":  # of a table of shifts and scales
        return Key(component, f"{module}.modulation", "diff")
    if match["other"]:
        return Key(component, module, cast(Part, match["other"]))
    if match["down"]:
        return Key(component, module, "A")
    return Key(component, module, "B" if match["kind"] == "weight" else "bias")


def original_name(name: str) -> str:
    """The name of a module or table in the original network: ``blocks.0.attn1.to_q`` -> ``blocks.0.self_attn.q``."""
    if name == "scale_shift_table":
        return "head.modulation"
    return _PARTS.sub(lambda match: _ORIGINAL[match[0]], name)


# --- description ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterInfo:
    """What a memory adapter is and how it was trained; stored in the metadata of its files.

    Args:
        rank: of the low-rank matrices; the most common one where modules differ.
        alpha: W + scale * B @ A with scale = alpha / sqrt(rank) under rsLoRA, else alpha / rank.
        use_rslora: which of the two.
        memory_attention: the memory mode it was trained for: ``joint``, the published one (memory slots are
            denoised with the video), or ``cached`` (memory slots are clean and attend to memory only).
        rope_stride: S, the step between the temporal positions of memory slots.
        conditioning: beyond memory, what it was trained to continue from: ``m2v``, ``mi2v``, ``mm2v``;
            ``None`` if unknown.
        training: notes on the training run, any JSON.
    """

    rank: int = 128
    alpha: float = 128.0
    use_rslora: bool = True
    memory_attention: MemoryMode = "joint"
    rope_stride: int = 5
    conditioning: str | None = None
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


# --- reading --------------------------------------------------------------------------------------------------------


class LoraFile:
    """A ``.safetensors`` or ``.pth`` file, of which only the header is read until tensors are.

    Attributes:
        path: of the file.
        shapes: of the tensors, by key.
        metadata: of the file.

    Raises:
        FileNotFoundError, FileError: if it is absent, damaged, or contains anything but named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, None
        if path.suffix != ".pth":
            self.shapes, _, self.metadata = read_header(path)
            return
        state = read_pickle(path)
        if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
            raise FileError(f"{path} does not contain a state dict (key -> tensor), but a {type(state).__name__}")
        self._state, self.shapes = state, {key: tuple(tensor.shape) for key, tensor in state.items()}
        notes = getattr(state, "_metadata", {})  # of modules' state dicts: versions; of ours: as in safetensors
        self.metadata = {key: value for key, value in notes.items() if isinstance(value, str)}

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``keys``, on the CPU in the file's dtype; NotFiniteError if one is NaN or far too large."""
        if self._state is not None:
            found = {key: self._state[key] for key in keys}
        else:
            with safe_open(self.path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in keys}
        check_values(found.items(), self.path)
        return found

    @property
    def info(self) -> AdapterInfo | None:
        """Its description; None if this package did not write it.

        Raises:
            FileError: if the description is damaged or of a newer version.
        """
        where = f"{self.path}, metadata {_INFO_METADATA}"
        values = self._json(_INFO_METADATA)
        if values is None:
            return None
        if (version := values.pop("version", None)) != _INFO_VERSION:
            raise FileError(f"{where} has version {version}; this release of storymem reads version {_INFO_VERSION}")
        try:
            return build_settings(AdapterInfo, values)
        except ConfigError as error:
            raise FileError(f"{where}: {error}") from None

    def scale_config(self, prefix: str) -> tuple[dict[str, Any], str] | None:
        """The scale that the file states, as a PEFT configuration, and where it is stated.

        It is read from a PEFT configuration (in the metadata, or in ``adapter_config.json`` beside the file), our own
        description, or single entries of the metadata, as trainers write them (``lora_alpha``, ``ss_network_alpha``).

        Args:
            prefix: that names in the metadata may have, as the keys of the expert do (``transformer.``).
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


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def expert_named(name: str, *, by_letter: bool = False) -> Expert | None:
    """The expert in the name of a file or folder: ``x_high_noise``, ``x-HighNoise``, ``x_HIGH``; None if neither.

    Args:
        name: without suffix.
        by_letter: whether H and L, or HN and LN, are names too.
    """
    words = "_".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()
    ways = [("high_?noise", "low_?noise"), ("high", "low"), ("hn?", "ln?")]  # from the clearest on
    for pair in ways if by_letter else ways[:2]:
        found = [it for it, way in zip(COMPONENTS, pair, strict=True) if re.search(rf"(?:^|_){way}(?:_|$)", words)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def find_lora_files(source: Path, experts: Sequence[Expert], weights: Weights) -> dict[Expert, Path]:
    """The file of each expert: two names with high and low, two sub-folders, or one file for both.

    Args:
        source: a file, or a folder of LoRA files.
        experts: the experts that need a file.
        weights: of which ``source`` is the place, for messages.

    Raises:
        MissingWeights: if there is no file for an expert.
        ValueError: if there are several.
    """
    if not source.is_dir():
        return dict.fromkeys(experts, check_regular(source))
    here = _files_in(source)
    named = {path: expert_named(path.stem) for path in here}
    if not any(named.values()):
        by_letter = {path: expert_named(path.stem, by_letter=True) for path in here}
        named = by_letter if {*COMPONENTS} <= {*by_letter.values()} else named
    folders = {path: _files_in(path) for path in sorted(source.iterdir()) if path.is_dir()}
    found: dict[Expert, Path] = {}
    for expert in experts:
        candidates = [path for path, name in named.items() if name == expert]
        candidates = candidates or [
            file
            for folder, files in folders.items()
            for file in files
            if expert_named(folder.name) == expert or folder.name == COMPONENTS[expert]
        ]
        candidates = candidates or (here if not any(named.values()) else [])
        if not candidates:
            raise _missing(source, expert, here, [path.name for path, files in folders.items() if files], weights)
        if len(candidates) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in candidates)
            raise ValueError(
                f"{source} holds more than one adapter file for the {expert} expert: {names}; keep one for each "
                "expert, with high_noise and low_noise in their names"
            )
        found[expert] = candidates[0]
    return found


def _files_in(folder: Path) -> list[Path]:
    """LoRA files directly in ``folder``, without those ``.pth`` that are there as ``.safetensors`` too."""
    safe = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return safe + sorted(path for path in folder.glob("*.pth") if path.with_suffix(".safetensors") not in safe)


def _missing(
    source: Path, expert: Expert, here: Sequence[Path], folders: Sequence[str], weights: Weights
) -> MissingWeights:
    holds = ", ".join(path.name for path in here) or "no adapter file"
    lines = [f"{weights.name}: {source} holds {holds}, so nothing for the {expert} expert."]
    if folders:
        lines.append(f"  Sub-folders with adapters, of which one can be chosen as subfolder=: {', '.join(folders)}")
    lines.append(f"  wanted: backbone_{expert}.safetensors or .pth, or pytorch_lora_weights.safetensors for both")
    if not weights.is_local:
        lines.append(f"  download: {weights.download_command}")
    return MissingWeights("\n".join(lines))


# --- writing --------------------------------------------------------------------------------------------------------


class _Writing(NamedTuple):
    """How a layout is written: file and prefix of each expert, original names or diffusers', names of A and B."""

    file: str
    prefix: str
    original: bool
    matrices: Mapping[str, str]


_AB, _DOWN_UP = {"A": "lora_A", "B": "lora_B"}, {"A": "lora_down", "B": "lora_up"}
_LAYOUTS: dict[Layout, _Writing] = {
    "storymem": _Writing("{expert}.safetensors", "", False, _AB),
    "released": _Writing("backbone_{expert}.safetensors", "base_model.model.", True, _AB),
    "diffusers": _Writing("pytorch_lora_weights.safetensors", "{component}.", False, _AB),
    "comfyui": _Writing("memory_{expert}.safetensors", "diffusion_model.", True, _DOWN_UP),
}


def write_memory_lora(
    states: Mapping[Expert, Mapping[str, Tensor]],
    folder: str | Path,
    *,
    info: AdapterInfo,
    layout: Layout = "storymem",
) -> list[Path]:
    """Write the weights of an adapter.

    Args:
        states: for each expert, ``blocks.0.attn1.to_q.lora_A.weight`` ... -> tensor.
        folder: created if absent.
        info: the scale of these weights, and what else the metadata shall contain.
        layout: one of those in the module's table.

    Returns:
        The safetensors files written.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    stated = info
    if layout == "comfyui":
        stated = replace(info, alpha=info.scale(info.rank) * info.rank, use_rslora=False)
    elif layout == "released":
        stated = replace(info, alpha=float(info.rank), use_rslora=True)
    tensors: dict[Path, dict[str, Tensor]] = {}
    configs: dict[Path, dict[str, Any]] = {}
    for expert, state in states.items():
        path = Path(folder) / _LAYOUTS[layout].file.format(expert=expert)
        prefix = _LAYOUTS[layout].prefix.format(component=COMPONENTS[expert])
        tensors.setdefault(path, {}).update(_in_layout(layout, prefix, state, info, stated))
        if not _LAYOUTS[layout].original:  # diffusers reads these files
            ranks = {key.split(".lora_A.")[0]: int(t.shape[0]) for key, t in state.items() if ".lora_A." in key}
            config = peft_config(ranks, dict.fromkeys(ranks, info.alpha), info.use_rslora)
            configs.setdefault(path, {}).update({f"{prefix}{key}": value for key, value in config.items()})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, state in tensors.items():
        metadata = {_INFO_METADATA: json.dumps({"version": _INFO_VERSION, **asdict(stated)}, sort_keys=True)}
        if path in configs:
            metadata[PEFT_METADATA] = json.dumps(configs[path], sort_keys=True)
        if layout == "released":
            pickled = OrderedDict(state)
            pickled._metadata = metadata  # type: ignore[attr-defined]  # where state dicts of modules have theirs
            with replacing(path.with_suffix(".pth")) as partial:
                torch.save(pickled, partial)
        with replacing(path) as partial:
            save_file(state, partial, metadata={"format": "pt", **metadata})
    return list(tensors)


def _in_layout(
    layout: Layout, prefix: str, state: Mapping[str, Tensor], info: AdapterInfo, stated: AdapterInfo
) -> dict[str, Tensor]:
    """The tensors of one expert under the keys of ``layout``, for readers that take the scale to be ``stated``."""
    written = {}
    for key, tensor in state.items():
        name, part = key.removesuffix(".weight").rsplit(".lora_", 1)
        module = prefix + (original_name(name) if _LAYOUTS[layout].original else name)
        rank = tensor.shape[0 if part == "A" else 1]
        if layout == "comfyui":
            written[f"{module}.alpha"] = torch.tensor(info.scale(rank) * rank)
        elif part == "B":
            tensor = scaled(tensor, info.scale(rank) / stated.scale(rank))
        written[f"{module}.{_LAYOUTS[layout].matrices[part]}.weight"] = tensor.detach().cpu().contiguous()
    return written


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``factor * tensor``, computed in float32; the very same numbers where ``factor`` is 1."""
    return tensor if math.isclose(factor, 1.0, rel_tol=1e-9) else (tensor.float() * factor).to(tensor.dtype)
