"""LoRA adapters of the experts: checked against the networks by header, and loaded at the scale they were trained at.

The memory adapter, which makes Wan2.2-I2V a memory-to-video model, must fit exactly. Other adapters (step-distilled,
styles) may cover any part of the networks; keys that are not used are reported. PEFT and diffusers inject the weights,
so ``set_adapters``, ``fuse_lora`` and ``unload_lora_weights`` work as with any adapter.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from storymem.io import FileError
from storymem.wan.eight_bits import ScaledLinear
from storymem.wan.keyframe_query import check_query
from storymem.wan.lora_files import (
    ADAPTED_LINEARS,
    PUBLISHED,
    UNKNOWN_SCALE,
    AdapterInfo,
    Layout,
    LoraFile,
    Part,
    Parts,
    expert_named,
    find_lora_files,
    original_name,
    parse_key,
    peft_config,
    ranks_of,
    resolve_scale,
    scaled,
    write_memory_lora,
)
from storymem.wan.spec import COMPONENTS, Expert, experts_of
from storymem.weights import Weights, listed, locate

RELEASED_ADAPTERS = "Kevin-thu/StoryMem"
_RELEASED_SIZE_GB = 4.9  # two files a sub-folder: 613 million float32 numbers each
_RELEASED_LICENCE = "CC BY-NC 4.0 (not for commercial use)"
# Adapters of which the low-rank matrices are one part: without the rest they are another function.
_OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|hada_t|lokr_|oft_|glora|vera_|boft|set_weight")

logger = logging.getLogger(__name__)
_warn_once = cache(logger.warning)


def memory_lora_config(
    rank: int = PUBLISHED.rank,
    alpha: float = PUBLISHED.alpha,
    use_rslora: bool = PUBLISHED.use_rslora,
    dropout: float = 0.05,
) -> LoraConfig:
    """The PEFT configuration of a memory adapter, by default the published one: ten linears in every block."""
    return LoraConfig(**peft_config({"": rank}, {"": alpha}, use_rslora), lora_dropout=dropout)


def adapted_linears(transformer: nn.Module) -> list[str]:
    """Names of the linears that a memory adapter changes, ten per block."""
    blocks: Any = transformer.get_submodule("blocks")
    return [f"blocks.{index}.{inside}" for index in range(len(blocks)) for inside in ADAPTED_LINEARS]


# Checking


def _targets(transformer: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The shape of every weight and table of a transformer, with adapters or not, and whether it has a bias."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, module in transformer.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        base: Any = getattr(module, "base_layer", module)
        table, weight = getattr(base, "scale_shift_table", None), base._parameters.get("weight")
        if isinstance(table, Tensor):
            found[f"{name}.scale_shift_table".lstrip(".")] = tuple(table.shape), False
        if weight is not None:  # quantised weights have another shape
            shape = (base.out_features, base.in_features) if hasattr(base, "out_features") else tuple(weight.shape)
            found[name] = shape, getattr(base, "bias", None) is not None
    return found


def _match(file: LoraFile, transformer: nn.Module, component: str | None, *, strict: bool) -> tuple[Parts, list[str]]:
    """The keys of every module in a file, and the keys that fit no module.

    Args:
        transformer: on any device.
        component: that of the expert, in a file for both; None: the file is for one expert.
        strict: whether A and B of every linear of a memory adapter must be there, and nothing else.

    Raises:
        FileError: listing all keys that are missing, given twice, misshapen or (``strict``) unexpected.
    """
    if foreign := [key for key in file.shapes if _OTHER_KINDS.search(key)]:
        raise FileError(listed(f"{file.path} is not a plain LoRA; other kinds are not supported:", {"found": foreign}))
    targets, linears = _targets(transformer), adapted_linears(transformer)
    names = {way: name for name in (linears if strict else targets) for way in (name, original_name(name))}
    names |= {way.replace(".", "_"): name for way, name in names.items()}
    parts: Parts = {name: {} for name in linears if strict}
    missing, unused, twice, misshapen = [], [], [], []
    for key in file.shapes:
        read = parse_key(key)
        if read is not None and component is not None and read.component not in (None, component):
            continue  # of the other expert
        if read is None or read.module not in names or component not in (None, read.component):
            unused.append(key)
        elif (first := parts.setdefault(names[read.module], {}).setdefault(read.part, key)) != key:
            twice.append(f"{first} and {key}")
    for name, keys in parts.items():
        (out, *inside), has_bias = targets[name]
        rank = max([1, *file.shapes[keys["A"]][:1]]) if "A" in keys else 1
        right = {"A": [rank, *inside], "B": [out, rank, *[1] * (len(inside) - 1)], "alpha": []}
        if not strict:
            right |= {"diff": [out, *inside]} | ({"bias": [out], "diff_b": [out]} if has_bias else {})
        unused += [keys.pop(part) for part in list(keys) if part not in right or keys.keys() == {"alpha"}]
        if strict or keys.keys() & {"A", "B", "bias"}:
            missing += [f"{original_name(name)}.lora_{part}" for part in ("A", "B") if part not in keys]
        for part, key in keys.items():
            shape = list(file.shapes[key])
            if shape != right[part] and (part, shape) != ("alpha", [1]):
                misshapen.append(f"{key} is {shape}, not {right[part] or 'one number'}")
    problems = {
        "missing": missing,
        "given twice": twice,
        "misshapen": misshapen,
        "unexpected": unused if strict else [],
    }
    if any(problems.values()):
        size = f"{len(linears) // len(ADAPTED_LINEARS)} blocks, {len(linears)} adapted linears"
        raise FileError(listed(f"{file.path} does not fit this transformer of {size}:", problems))
    if not any(parts.values()):
        raise FileError(listed(f"{file.path} contains nothing for this transformer:", {"not used": unused}))
    return {name: keys for name, keys in parts.items() if keys}, unused


# Reading


@dataclass(frozen=True, kw_only=True)
class ExpertAdapter:
    """One expert's adapter, checked against its transformer.

    Attributes:
        file: of which only the header was read.
        parts: the keys of its tensors, by diffusers' name of the module.
        config: arguments of ``peft.LoraConfig``.
        info: its description.
        report: for the user: what was matched, at what scale, and which keys are not used.
        as_usual: whether all linears of the blocks were matched, all keys are used, and the scale is known.
    """

    file: LoraFile
    parts: Parts
    config: Mapping[str, Any]
    info: AdapterInfo
    report: str
    as_usual: bool

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The low-rank matrices, ``blocks.0.attn1.to_q.lora_A.weight`` ..., in ``dtype``; NotFiniteError for NaN."""
        return {
            f"{name}.lora_{part}.weight": tensor.to(dtype or tensor.dtype)
            for name, part, tensor in self._read("A", "B")
        }

    def differences(self) -> dict[str, Tensor]:
        """What is added to the network's own parameters: ``blocks.0.norm2.weight`` ... -> float32 tensor."""
        found: dict[str, Tensor] = {}
        for name, part, tensor in self._read("diff", "diff_b", "bias"):
            value = tensor.float()
            if part == "bias":  # of B
                alpha = self.config["alpha_pattern"].get(name, self.config["lora_alpha"])
                rank = self.config["rank_pattern"].get(name, self.config["r"])
                value = value * replace(self.info, alpha=alpha).scale(rank)
            attribute = ".weight" if part == "diff" else ".bias"
            parameter = name if name.endswith("scale_shift_table") else name + attribute
            found[parameter] = found[parameter] + value if parameter in found else value
        return found

    def query(self) -> dict[str, Tensor]:
        """The tensors of the file's KeyframeQuery by their names in it; none if it has no such network."""
        tensors = self.file.tensors(self.file.query.values())
        return dict(zip(self.file.query, tensors.values(), strict=True))

    def _read(self, *wanted: Part) -> list[tuple[str, Part, Tensor]]:
        """Modules, parts and tensors of the wanted parts."""
        chosen = [(name, part) for name, keys in self.parts.items() for part in keys if part in wanted]
        tensors = self.file.tensors(self.parts[name][part] for name, part in chosen)
        return [(name, part, tensor) for (name, part), tensor in zip(chosen, tensors.values(), strict=True)]


def read_memory_lora(
    transformers: Mapping[Expert, nn.Module],
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    use_rslora: bool | None = None,
    strict: bool = True,
) -> dict[Expert, ExpertAdapter]:
    """Find and check an adapter by its header; see :func:`load_memory_lora`. ``transformers`` may be on meta."""
    released = str(folder_or_repo) == RELEASED_ADAPTERS
    weights = Weights(
        name="memory adapter" if strict else "adapter",
        source=str(folder_or_repo),
        file=f"{subfolder}/*" if subfolder else None,
        size_gb=_RELEASED_SIZE_GB if released and subfolder else 0.0,
        licence=_RELEASED_LICENCE if released else "",
    )
    source = locate(weights)
    files = {expert: LoraFile(path) for expert, path in find_lora_files(source, list(transformers), weights).items()}
    shared = len(files) > 1 and len({file.path for file in files.values()}) == 1
    if shared and not strict and (named := expert_named(source.stem)) is not None:
        files, shared = {named: files[named]}, False  # the other expert gets no adapter
    adapters = {}
    for expert, file in files.items():
        adapter = _read_expert(file, expert, transformers[expert], shared, alpha, use_rslora, strict)
        if alone := transformers.keys() - files.keys():
            report = f"{adapter.report}; nothing for the {alone.pop()} expert"
            adapter = replace(adapter, as_usual=False, report=report)
        adapters[expert] = adapter
    for entry in ("memory_attention", "rope_stride", "conditioning", "objective"):
        values = {adapter.file.path: getattr(adapter.info, entry) for adapter in adapters.values()}
        if len(set(values.values())) > 1:
            stated = ", ".join(f"{path}: {value!r}" for path, value in values.items())
            raise ValueError(f"the experts' files belong to different adapters: {entry} differs ({stated})")
    return adapters


def _read_expert(
    file: LoraFile,
    expert: Expert,
    transformer: nn.Module,
    shared: bool,
    alpha: float | None,
    use_rslora: bool | None,
    strict: bool,
) -> ExpertAdapter:
    components = {read.component for read in map(parse_key, file.shapes) if read is not None}
    if shared and components == {None} and strict:
        raise ValueError(
            f"{file.path} does not name the expert that its keys are for (they start with neither 'transformer.' nor "
            "'transformer_2.'), and the pipeline has two; give a folder with one file for each"
        )
    component = COMPONENTS[expert] if components != {None} and (shared or len(components) > 1) else None
    parts, unused = _match(file, transformer, component, strict=strict)
    lora = {name: keys for name, keys in parts.items() if "A" in keys}
    prefix = f"{component or next(iter(components), None) or ''}.".lstrip(".")
    scale = resolve_scale(file, lora, prefix, alpha=alpha, use_rslora=use_rslora, memory=strict)
    ranks = {name: int(rank) for name, rank in ranks_of(file, lora).items()} or {"": 1}
    config = peft_config(ranks, scale.alphas or {"": 1.0}, scale.use_rslora, ADAPTED_LINEARS if strict else list(lora))
    described = {"rank": config["r"], "alpha": config["lora_alpha"], "use_rslora": scale.use_rslora}
    if file.query:
        check_query(file.query_shapes, transformer, where=f"{file.path}: its KeyframeQuery does not fit:")
    info = replace(file.info or AdapterInfo(objective="memento" if file.query else "memory"), **described)
    linears = set(adapted_linears(transformer))
    matched = len(lora.keys() & linears)
    report = f"{file.path}: {matched} of {len(linears)} linears of the blocks"
    report += f" and {len(parts) - matched} other modules" if len(parts) > matched else ""
    report += f", scale {info.scale(info.rank):.4g} ({scale.source})"
    report += "; used for both experts" if shared and component is None else ""
    return ExpertAdapter(
        file=file,
        parts=parts,
        config=config,
        info=info,
        report=listed(report, {"keys that fit no part of this network, and are not used": sorted(unused)}),
        as_usual=matched == len(linears) and not unused and scale.source != UNKNOWN_SCALE,
    )


# Loading and saving


def load_memory_lora(
    pipe: Any,
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    adapter_name: str = "memory",
    weight: float | Mapping[Expert, float] = 1.0,
    alpha: float | None = None,
    use_rslora: bool | None = None,
    strict: bool = True,
) -> AdapterInfo:
    """Load an adapter into the experts of a Wan pipeline, active beside the adapters that already are.

    All files are read and checked before an expert is changed. Weights take the dtype of the linears they adapt.

    Args:
        pipe: a diffusers pipeline; ``transformer`` is the high-noise and ``transformer_2`` the low-noise expert, of
            which one may be None.
        folder_or_repo: a folder or file in one of the layouts of :mod:`storymem.wan.lora_files`, or a Hugging Face id
            whose files were downloaded before (``Kevin-thu/StoryMem``).
        subfolder: a folder inside it (``Wan2.2-MI2V-A14B``, ``Wan2.2-MM2V-A14B``).
        adapter_name: for ``pipe.set_adapters`` and the like.
        weight: strength, a factor on top of the scale the adapter was trained at; one for both experts, or one for each
            that gets the adapter.
        alpha: for files that do not state it; None: the published 128 in the released layout, else the rank.
        use_rslora: likewise; None: the published ``True`` in the released layout, else ``False``.
        strict: whether it is a memory adapter, which must fit exactly. Other adapters may cover any part of the
            networks; keys that are not used are logged. Their differences of the networks' own parameters (``.diff``,
            ``.diff_b``, ``.diff_m``) are added permanently: ``set_adapters`` does not change them.

    Returns:
        The adapter's description; of the high-noise expert where the two differ in rank or scale.

    Raises:
        MissingWeights: if the adapter, or the file of one expert, is not on this machine.
        NotFiniteError: for weights that are NaN, infinite or too large.
        ValueError: for a file that does not fit or contradicts ``alpha`` or ``use_rslora``; if ``adapter_name`` is
            taken, or other adapters are fused.
    """
    strength = weight if isinstance(weight, Mapping) else dict.fromkeys(COMPONENTS, weight)
    transformers = {name: it for name, it in experts_of(pipe).items() if name in strength}
    for expert, transformer in transformers.items():
        _check_can_load(transformer, COMPONENTS[expert], adapter_name)
    named = transformers
    if getattr(pipe, "turns", None) is not None:  # one is loaded, and files are matched with both
        (network,) = experts_of(pipe).values()
        named = dict.fromkeys(strength, network)
    read = read_memory_lora(
        named, folder_or_repo, subfolder=subfolder, alpha=alpha, use_rslora=use_rslora, strict=strict
    )
    adapters = {expert: adapter for expert, adapter in read.items() if expert in transformers}
    matrices = {expert: adapter.tensors(_whole_dtype(transformers[expert])) for expert, adapter in adapters.items()}
    differences = {expert: adapter.differences() for expert, adapter in adapters.items()}
    for expert, adapter in adapters.items():
        if not adapter.as_usual:
            _warn_once(adapter.report)
        if matrices[expert]:
            _inject(pipe, transformers[expert], matrices[expert], adapter.config, adapter_name, strength[expert])
        _add(transformers[expert], differences[expert], strength[expert])
    return next(iter(read.values())).info


def _check_can_load(transformer: Any, component: str, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without dots, not {adapter_name!r}")
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise ValueError(
            f"{component} already has an adapter called {adapter_name!r}; choose another adapter_name, "
            f"or remove it first with pipe.delete_adapters({adapter_name!r})"
        )
    # PEFT runs a layer with fused adapters as its bare weight: a new adapter would have no effect.
    if any(isinstance(layer, LoraLayer) and layer.merged for layer in transformer.modules()):
        raise ValueError(f"{component} has fused adapters; call pipe.unfuse_lora() before loading another")


def _whole_dtype(transformer: Any) -> torch.dtype | None:
    """The dtype of the linears; None for a quantised base, whose adapters stay as in the file."""
    linear = transformer.get_submodule("blocks.0.attn1.to_q")
    if isinstance(getattr(linear, "base_layer", linear), ScaledLinear):
        return transformer.dtype
    dtype = linear.weight.dtype
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _inject(
    pipe: Any, transformer: Any, state: dict[str, Tensor], config: Mapping[str, Any], adapter_name: str, weight: float
) -> None:
    active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    with warnings.catch_warnings():  # several adapters are what is wanted
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.load_lora_adapter(
            state, prefix=None, adapter_name=adapter_name, metadata=dict(config), low_cpu_mem_usage=True, _pipeline=pipe
        )
    transformer.set_adapter([*active, adapter_name])
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(adapter_name, weight)


def _add(transformer: nn.Module, differences: Mapping[str, Tensor], weight: float) -> None:
    """Add differences to a transformer's own parameters, whether its linears have adapters or not."""
    for name, difference in differences.items():
        owner, _, attribute = name.rpartition(".")
        module = transformer.get_submodule(owner)
        parameter = getattr(getattr(module, "base_layer", module), attribute)
        if not parameter.is_floating_point():
            raise ValueError(f"the adapter changes {name}, which is quantised here: use networks in 16 or 32 bits")
        value = parameter.data.float() + weight * difference.to(parameter.device)
        parameter.data.copy_(value.to(parameter.dtype))


def save_memory_lora(
    pipe_or_transformers: Any,
    folder: str | Path,
    *,
    layout: Layout = "storymem",
    adapter_name: str = "memory",
    metadata: AdapterInfo | None = None,
) -> list[Path]:
    """Save a memory adapter from the transformers it is loaded or trained in, without the weight of ``set_adapters``.

    Args:
        pipe_or_transformers: a pipeline, or ``{"high_noise": transformer, "low_noise": transformer}`` (or one
            of them).
        folder: created if absent. Keep one layout per folder, so that loading need not choose.
        layout: see :mod:`storymem.wan.lora_files`.
        adapter_name: the adapter's name in the transformers.
        metadata: memory mode, RoPE stride, conditioning and notes; rank, alpha and rsLoRA are those of the weights.

    Returns:
        The safetensors files written.

    Raises:
        ValueError: if a transformer has no such adapter, or one that differs from :func:`memory_lora_config`.
    """
    given = isinstance(pipe_or_transformers, Mapping)
    transformers: Mapping[Expert, Any] = pipe_or_transformers if given else experts_of(pipe_or_transformers)
    states: dict[Expert, dict[str, Tensor]] = {}
    info = metadata or AdapterInfo()
    for expert, transformer in transformers.items():
        configs = getattr(transformer, "peft_config", {})
        if adapter_name not in configs:
            have = ", ".join(configs) or "none"
            raise ValueError(f"{COMPONENTS[expert]} has no adapter called {adapter_name!r}; it has: {have}")
        if not states:
            config = configs[adapter_name]
            info = replace(info, rank=config.r, alpha=float(config.lora_alpha), use_rslora=config.use_rslora)
        state = get_peft_model_state_dict(transformer, adapter_name=adapter_name, save_embedding_layers=False)
        linears = adapted_linears(transformer)
        if strange := sorted(state.keys() ^ {f"{name}.lora_{part}.weight" for name in linears for part in "AB"}):
            title = f"adapter {adapter_name!r} of {COMPONENTS[expert]} is not one of memory_lora_config():"
            raise ValueError(listed(title, {"missing or unexpected": strange}))
        for name in linears:  # B absorbs the difference between the scales of this module and of most
            layer, key = transformer.get_submodule(name), f"{name}.lora_B.weight"
            rank, alpha = layer.r[adapter_name], float(layer.lora_alpha[adapter_name])
            own = replace(info, alpha=alpha, use_rslora=bool(layer.use_rslora.get(adapter_name, False)))
            state[key] = scaled(state[key], own.scale(rank) / info.scale(rank))
        states[expert] = state
    return write_memory_lora(states, folder, info=info, layout=layout)
