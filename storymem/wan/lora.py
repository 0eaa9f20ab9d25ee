"""LoRA adapters of the experts: checked against the networks by header, and loaded at the scale they were trained at.

The memory adapter, which turns Wan2.2-I2V into a memory-to-video model, must fit exactly. Other adapters (such as
step-distilled ones) may cover any part of the networks; what of their files is not read is reported. PEFT and diffusers
inject the weights, so what diffusers offers for adapters goes on working: ``set_adapters`` with weights, several
adapters at once, ``fuse_lora``, ``unload_lora_weights``, ``save_lora_adapter``.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from storymem.io import FileError
from storymem.wan.lora_export import Layout, save_memory_lora, write_memory_lora
from storymem.wan.lora_files import (
    PUBLISHED_ALPHA,
    PUBLISHED_USE_RSLORA,
    AdapterFile,
    AdapterInfo,
    expert_named,
    find_adapter_files,
    is_scale_number,
    memory_lora_config,
    most_common,
    open_adapter_file,
    peft_config,
)
from storymem.wan.lora_keys import ModuleKeys, adapted_linears, match_keys, parse_key
from storymem.wan.names import COMPONENTS, Expert, experts_of
from storymem.weights import Weights, listed, locate

__all__ = [
    "AdapterInfo",
    "ExpertAdapter",
    "Layout",
    "load_memory_lora",
    "memory_lora_config",
    "read_memory_lora",
    "save_memory_lora",
    "write_memory_lora",
]

RELEASED_ADAPTERS = "Kevin-thu/StoryMem"
_RELEASED_SIZE_GB = 4.9  # two files a sub-folder: 613 million float32 numbers each
_RELEASED_LICENCE = "CC BY-NC 4.0 (not for commercial use)"
_RELEASED_PREFIX = "base_model.model."
_ALPHA_METADATA = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
_RANK_METADATA = ("r", "rank", "lora_rank", "ss_network_dim", "network_dim")

logger = logging.getLogger(__name__)


# --- scale ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraScale:
    """Alpha of every adapted module, whether rsLoRA divides it by sqrt(rank) in place of rank, and who says so."""

    alphas: Mapping[str, float]
    use_rslora: bool
    source: str
    stated: bool = True


def resolve_scale(
    file: AdapterFile,
    modules: Mapping[str, ModuleKeys],
    *,
    prefix: str,
    alpha: float | None,
    use_rslora: bool | None,
    memory: bool,
) -> LoraScale:
    """The scale that a file states; else the caller's; else the published one, or alpha = rank, which is scale 1.

    Args:
        file: the file.
        modules: its modules with A and B.
        prefix: of the keys of the expert meant, in a file for both.
        alpha: the caller's.
        use_rslora: likewise.
        memory: whether it is a memory adapter: in the released layout these have the published scale.

    Raises:
        ValueError: if the caller's ``alpha`` or ``use_rslora`` contradicts the file, or what it states is no number.
    """
    stated = _stated_scale(file, modules, prefix)
    if stated is not None:
        differs = alpha is not None and not all(math.isclose(a, alpha, rel_tol=1e-6) for a in stated.alphas.values())
        if differs or use_rslora not in (None, stated.use_rslora):
            asked = f"alpha={alpha}, use_rslora={use_rslora}"
            says = f"alpha={most_common(stated.alphas.values()):g}, use_rslora={stated.use_rslora}"
            raise ValueError(f"{file.path} states {says}, but {asked} was asked for; leave these arguments out")
        return stated
    released = memory and all(keys.prefix == _RELEASED_PREFIX for keys in modules.values())
    if use_rslora is None:
        use_rslora = released and PUBLISHED_USE_RSLORA
    if alpha is not None:
        return LoraScale(alphas=dict.fromkeys(modules, float(alpha)), use_rslora=use_rslora, source="from the settings")
    if released:
        return LoraScale(alphas=dict.fromkeys(modules, PUBLISHED_ALPHA), use_rslora=use_rslora, source="as published")
    return LoraScale(
        alphas={name: float(keys.rank) for name, keys in modules.items()},
        use_rslora=use_rslora,
        source="the file states no alpha, so it is taken to be the rank",
        stated=False,
    )


def _stated_scale(file: AdapterFile, modules: Mapping[str, ModuleKeys], prefix: str) -> LoraScale | None:
    """From alpha tensors (these mean alpha / rank), else a PEFT configuration, our own metadata, or plain metadata."""
    written = {name: keys.parts["alpha"] for name, keys in modules.items() if "alpha" in keys.parts}
    if written:
        numbers = file.tensors(written.values())
        alphas = {name: float(keys.rank) for name, keys in modules.items()}
        alphas |= {name: _alpha(numbers[key].item(), f"{file.path}: {key}") for name, key in written.items()}
        return LoraScale(alphas=alphas, use_rslora=False, source="from its alphas")
    if (found := file.peft_config(prefix)) is not None:
        config, where = found
        if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
            raise FileError(f"{where} is not that of a plain LoRA, the only kind of adapter read")
        if "lora_alpha" in config:
            return _peft_scale(config, modules, where)
    if (info := AdapterInfo.from_file(file)) is not None:
        alphas = dict.fromkeys(modules, float(info.alpha))
        return LoraScale(alphas=alphas, use_rslora=info.use_rslora, source="from its metadata")
    return _plain_scale(file, modules, prefix)


def _peft_scale(config: Mapping[str, Any], modules: Mapping[str, ModuleKeys], where: str) -> LoraScale:
    special, use_rslora = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
    if not isinstance(special, dict) or not isinstance(use_rslora, bool):
        raise FileError(f"{where}: alpha_pattern must be an object, and use_rslora true or false")
    alphas = {}
    for name, keys in modules.items():
        try:
            pattern = get_pattern_key(list(special), keys.written)
        except re.error as error:
            raise FileError(f"{where}: alpha_pattern holds an invalid expression: {error}") from None
        alphas[name] = _alpha(special.get(pattern, config["lora_alpha"]), f"{where}: lora_alpha")
    return LoraScale(alphas=alphas, use_rslora=use_rslora, source=f"from {where}")


def _plain_scale(file: AdapterFile, modules: Mapping[str, ModuleKeys], prefix: str) -> LoraScale | None:
    """From single entries of the metadata, as trainers write them (``lora_alpha``, ``ss_network_alpha``)."""
    entries = {key.removeprefix(prefix): value for key, value in file.metadata.items()}
    key = next((key for key in _ALPHA_METADATA if _parsed(entries.get(key)) is not None), None)
    if key is None:
        return None
    source = f"from its metadata {key}"
    rank = next((found for name in _RANK_METADATA if (found := _parsed(entries.get(name))) is not None), None)
    if rank is not None and rank not in {keys.rank for keys in modules.values()}:
        source += f", which also says rank {rank:g}"
    alpha = _alpha(_parsed(entries[key]), f"{file.path}, metadata {key}")
    use_rslora = entries.get("use_rslora", "").lower() in ("true", "1")
    return LoraScale(alphas=dict.fromkeys(modules, alpha), use_rslora=use_rslora, source=source)


def _parsed(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "None", "Dynamic"
        return None


def _alpha(value: Any, where: str) -> float:
    if not is_scale_number(value):
        raise FileError(f"{where} must be a positive number, not {value!r}")
    return float(value)


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExpertAdapter:
    """One expert's adapter, checked against its transformer; its weights are read by :meth:`tensors` only.

    Attributes:
        file, keys: where its tensors lie, by diffusers' name of the module.
        config: arguments of ``peft.LoraConfig``.
        info: what it says about itself.
        report: what was matched, at what scale, and what was not read: a line for people, and more if keys are unread.
        as_usual: whether every linear of the blocks was matched, all keys were read, and the scale is stated.
    """

    file: AdapterFile
    keys: Mapping[str, ModuleKeys]
    config: Mapping[str, Any]
    info: AdapterInfo
    report: str
    as_usual: bool

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The low-rank matrices under diffusers' names, ``blocks.0.attn1.to_q.lora_A.weight``, cast if asked.

        Raises:
            NotFiniteError: if one of them is NaN, infinite or too large to be a weight.
        """
        lora = {name: keys.parts for name, keys in self.keys.items() if keys.is_lora}
        names = {parts["A"]: f"{name}.lora_A.weight" for name, parts in lora.items()}
        names |= {parts["B"]: f"{name}.lora_B.weight" for name, parts in lora.items()}
        return {names[key]: tensor.to(dtype or tensor.dtype) for key, tensor in self.file.tensors(names).items()}

    def differences(self) -> dict[str, Tensor]:
        """What is added to the network's own parameters: ``blocks.0.norm2.weight`` ... -> float32 tensor."""
        found: dict[str, Tensor] = {}
        for name, keys in self.keys.items():
            parts = {part: key for part, key in keys.parts.items() if part in ("diff", "diff_b", "bias")}
            tensors = self.file.tensors(parts.values())
            for part, key in parts.items():
                attribute = "weight" if part == "diff" else "bias"
                parameter = name if name.endswith("scale_shift_table") else f"{name}.{attribute}"
                value = tensors[key].float() * (self.scale(name) if part == "bias" else 1.0)
                found[parameter] = found[parameter] + value if parameter in found else value
        return found

    def scale(self, name: str) -> float:
        """The factor of B @ A in a module."""
        alpha = self.config["alpha_pattern"].get(name, self.config["lora_alpha"])
        return replace(self.info, alpha=alpha).scale(self.keys[name].rank)


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
    experts: Collection[Expert] | None = None,
) -> AdapterInfo:
    """Load an adapter into the experts of a Wan pipeline, active beside the adapters that already are.

    All files are read and checked before either expert is touched. The weights take the dtype of the linears they
    adapt. A pipeline with one expert (the other is ``None``) needs that expert's file only.

    Args:
        pipe: a diffusers pipeline whose ``transformer`` is the high-noise and ``transformer_2`` the low-noise
            expert.
        folder_or_repo: a folder or file in any layout in circulation (see :mod:`storymem.wan.lora_export`, and those
            of kohya's scripts and DiffSynth), or a Hugging Face id whose files were downloaded before
            (``Kevin-thu/StoryMem``).
        subfolder: a folder inside it (``Wan2.2-MI2V-A14B``, ``Wan2.2-MM2V-A14B``).
        adapter_name: the name for ``pipe.set_adapters`` and its kin.
        weight: strength, a factor on top of the scale the adapter was trained at; one for both experts, or one each.
        alpha: for files that do not state it; None: the published 128 in the released layout, else the rank.
        use_rslora: likewise; None: the published ``True`` in the released layout, else ``False``.
        strict: whether it is a memory adapter, which must fit exactly. Other adapters may cover any part of the
            networks and bring differences of their own parameters (``.diff``, ``.diff_b``, ``.diff_m``). These are
            added to the parameters for good: ``set_adapters`` and ``delete_adapters`` do not change them. What was not
            read is logged.
        experts: those that get it; None: all that the pipeline has.

    Returns:
        What the adapter says about itself; of the high-noise expert where the two differ in rank or scale.

    Raises:
        MissingWeights: if the adapter, or the file of one expert, is not on this machine.
        NotFiniteError: for weights that are NaN, infinite or too large.
        ValueError: if a key is missing, unexpected or misshapen; if the file contradicts ``alpha`` or
            ``use_rslora``; if ``adapter_name`` is taken, or other adapters are fused.
    """
    transformers = {name: it for name, it in experts_of(pipe).items() if experts is None or name in experts}
    for expert, transformer in transformers.items():
        _check_can_load(transformer, COMPONENTS[expert], adapter_name)
    adapters = read_memory_lora(
        transformers, folder_or_repo, subfolder=subfolder, alpha=alpha, use_rslora=use_rslora, strict=strict
    )
    matrices = {expert: adapter.tensors(_whole_dtype(transformers[expert])) for expert, adapter in adapters.items()}
    differences = {expert: adapter.differences() for expert, adapter in adapters.items()}
    for expert, adapter in adapters.items():
        if not adapter.as_usual:
            _say_once(adapter.report)
        strength = weight[expert] if isinstance(weight, Mapping) else weight
        if matrices[expert]:
            _inject(pipe, transformers[expert], matrices[expert], adapter.config, adapter_name, strength)
        _add(transformers[expert], differences[expert], strength)
    return next(iter(adapters.values())).info


def read_memory_lora(
    transformers: Mapping[Expert, nn.Module],
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    use_rslora: bool | None = None,
    strict: bool = True,
) -> dict[Expert, ExpertAdapter]:
    """Find, open and check an adapter without loading its weights; see :func:`load_memory_lora`.

    ``transformers`` may be on the meta device.
    """
    released = str(folder_or_repo) == RELEASED_ADAPTERS
    weights = Weights(
        name="memory adapter" if strict else "adapter",
        source=str(folder_or_repo),
        file=f"{subfolder}/*" if subfolder else None,
        size_gb=_RELEASED_SIZE_GB if released and subfolder else 0.0,
        licence=_RELEASED_LICENCE if released else "",
    )
    source = locate(weights)
    files = find_adapter_files(source, list(transformers), weights)
    one_file = len(files) > 1 and len(set(files.values())) == 1
    if one_file and not strict and (named := expert_named(source.stem)) is not None:
        files, one_file = {named: source}, False  # the other expert gets no adapter
    adapters = {
        expert: _read_expert(
            path, expert, transformers[expert], one_file=one_file, alpha=alpha, use_rslora=use_rslora, strict=strict
        )
        for expert, path in files.items()
    }
    if alone := transformers.keys() - adapters.keys():
        adapters = {
            expert: replace(adapter, as_usual=False, report=f"{adapter.report}; nothing for the {alone.pop()} expert")
            for expert, adapter in adapters.items()
        }
    _check_one_adapter(adapters)
    return adapters


def _read_expert(
    path: Path,
    expert: Expert,
    transformer: nn.Module,
    *,
    one_file: bool,
    alpha: float | None,
    use_rslora: bool | None,
    strict: bool,
) -> ExpertAdapter:
    file = open_adapter_file(path)
    components = {read.component for read in map(parse_key, file.shapes) if read is not None}
    if one_file and components == {None} and strict:
        raise ValueError(
            f"{path} does not say which expert its keys are for (they start with neither 'transformer.' nor "
            "'transformer_2.'), and the pipeline has two; give a folder with one file for each"
        )
    component = COMPONENTS[expert] if components != {None} and (one_file or len(components) > 1) else None
    modules, unread = match_keys(file.shapes, transformer, where=str(path), component=component, strict=strict)
    lora = {name: keys for name, keys in modules.items() if keys.is_lora}
    of_expert = component or next(iter(components), None)
    prefix = f"{of_expert}." if of_expert else ""
    scale = resolve_scale(file, lora, prefix=prefix, alpha=alpha, use_rslora=use_rslora, memory=strict)
    ranks = {name: keys.rank for name, keys in lora.items()} or {"": 1}
    config = peft_config(ranks, scale.alphas or {"": 1.0}, scale.use_rslora, () if strict else list(lora))
    info = replace(
        AdapterInfo.from_file(file) or AdapterInfo(),
        rank=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=scale.use_rslora,
    )
    linears = adapted_linears(transformer)
    matched = len(lora.keys() & set(linears))
    others = f" and {len(modules) - matched} other modules" if len(modules) > matched else ""
    both = "; used for both experts" if one_file and component is None else ""
    report = (
        f"{path}: {matched} of {len(linears)} linears of the blocks{others}, scale {info.scale(info.rank):.4g} "
        f"({scale.source}){both}"
    )
    return ExpertAdapter(
        file=file,
        keys=modules,
        config=config,
        info=info,
        report=listed(report, {"keys that are for no part of this network, and not read": sorted(unread)}),
        as_usual=matched == len(linears) and not unread and scale.stated,
    )


def _check_one_adapter(adapters: Mapping[Expert, ExpertAdapter]) -> None:
    """Two experts trained for different memory modes, strides or conditionings are not one adapter."""
    for entry in ("memory_attention", "rope_stride", "conditioning"):
        values = {adapter.file.path: getattr(adapter.info, entry) for adapter in adapters.values()}
        if len(set(values.values())) > 1:
            says = ", ".join(f"{path.name} says {value!r}" for path, value in values.items())
            raise ValueError(f"the experts' files belong to different adapters: {entry} is not the same: {says}")


def _check_can_load(transformer: Any, component: str, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without dots, not {adapter_name!r}")
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise ValueError(
            f"{component} already has an adapter called {adapter_name!r}; choose another adapter_name, "
            f"or remove it first with pipe.delete_adapters({adapter_name!r})"
        )
    # PEFT runs a layer with fused adapters as its bare weight: a new adapter would have no effect, silently.
    if any(isinstance(layer, LoraLayer) and layer.merged for layer in transformer.modules()):
        raise ValueError(f"{component} has fused adapters; call pipe.unfuse_lora() before loading another")


def _whole_dtype(transformer: Any) -> torch.dtype | None:
    """The dtype of the linears; None for a quantised base, whose adapters stay as in the file."""
    dtype = transformer.get_submodule("blocks.0.attn1.to_q").weight.dtype
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _inject(
    pipe: Any,
    transformer: Any,
    state: dict[str, Tensor],
    config: Mapping[str, Any],
    adapter_name: str,
    weight: float,
) -> None:
    active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    active = [active] if isinstance(active, str) else list(active)
    transformer.load_lora_adapter(
        state,
        prefix=None,
        adapter_name=adapter_name,
        metadata=dict(config),
        low_cpu_mem_usage=True,
        _pipeline=pipe,
    )
    transformer.set_adapter([*active, adapter_name])
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(adapter_name, weight)


def _add(transformer: nn.Module, differences: Mapping[str, Tensor], weight: float) -> None:
    """Add differences to a transformer's own parameters, whether its linears carry adapters or not."""
    for name, difference in differences.items():
        of, _, attribute = name.rpartition(".")
        module = transformer.get_submodule(of)
        parameter = getattr(getattr(module, "base_layer", module), attribute)
        if not parameter.is_floating_point():
            raise ValueError(f"the adapter changes {name}, which is quantised here: use networks in 16 or 32 bits")
        value = parameter.data.float() + weight * difference.to(parameter.device)
        parameter.data.copy_(value.to(parameter.dtype))


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
