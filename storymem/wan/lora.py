"""Memory adapters: LoRA weights that turn Wan2.2-I2V into a memory-to-video model, loaded and saved.

PEFT and diffusers inject the weights, so what diffusers offers for adapters goes on working: ``set_adapters``
with weights, several adapters at once, ``fuse_lora``, ``unload_lora_weights``, ``save_lora_adapter``. What is
done here is to read every layout in circulation, to account for every key, and to apply the scale that the
adapter was trained at.

The layouts are listed in :mod:`storymem.wan.lora_export`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from storymem.wan.lora_export import Layout, save_memory_lora, write_memory_lora
from storymem.wan.lora_files import AdapterFile, find_adapter_files, open_adapter_file
from storymem.wan.lora_info import AdapterInfo, memory_lora_config, peft_config, resolve_scale
from storymem.wan.lora_layouts import (
    COMPONENTS,
    Expert,
    LinearKeys,
    adapted_linears,
    experts_of,
    match_keys,
    parse_key,
)
from storymem.weights import Weights, locate

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


@dataclass(frozen=True, kw_only=True)
class ExpertAdapter:
    """One expert's adapter, checked against its transformer; its weights are read by :meth:`tensors` only."""

    file: AdapterFile
    keys: Mapping[str, LinearKeys]
    config: Mapping[str, Any]
    info: AdapterInfo

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The weights under diffusers' names, ``blocks.0.attn1.to_q.lora_A.weight``, cast if asked."""
        names = {linear.a: f"{name}.lora_A.weight" for name, linear in self.keys.items()}
        names |= {linear.b: f"{name}.lora_B.weight" for name, linear in self.keys.items()}
        return {names[key]: tensor.to(dtype or tensor.dtype) for key, tensor in self.file.tensors(names).items()}


def load_memory_lora(
    pipe: Any,
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    adapter_name: str = "memory",
    weight: float | Mapping[Expert, float] = 1.0,
    alpha: float | None = None,
    use_rslora: bool | None = None,
) -> AdapterInfo:
    """Load a memory adapter into the experts of a Wan pipeline, active beside the adapters that already are.

    Step-distilled adapters for Wan2.2-A14B change the same linears, and load the same way under a name of their own.

    Both files are checked before either expert is touched. The weights take the dtype of the linears they
    adapt. A pipeline with one expert (the other is ``None``) needs that expert's file only.

    Args:
        pipe: a diffusers pipeline whose ``transformer`` is the high-noise and ``transformer_2`` the low-noise
            expert.
        folder_or_repo: a folder or file in any of the four layouts, or a Hugging Face id whose files were
            downloaded before (``Kevin-thu/StoryMem``).
        subfolder: a folder inside it (``Wan2.2-MI2V-A14B``, ``Wan2.2-MM2V-A14B``).
        adapter_name: the name for ``pipe.set_adapters`` and its kin.
        weight: strength, a factor on top of the scale the adapter was trained at; one for both experts, or one each.
        alpha: for files that do not state it; the published 128 if ``None``.
        use_rslora: likewise; the published ``True`` if ``None``.

    Returns:
        What the adapter says about itself; of the high-noise expert where the two differ in rank or scale.

    Raises:
        MissingWeights: if the adapter, or the file of one expert, is not on this machine.
        ValueError: if a key is missing, unexpected or misshapen; if the file contradicts ``alpha`` or
            ``use_rslora``; if ``adapter_name`` is taken, or other adapters are fused.
    """
    transformers = experts_of(pipe)
    for expert, transformer in transformers.items():
        _check_can_load(transformer, COMPONENTS[expert], adapter_name)
    adapters = read_memory_lora(transformers, folder_or_repo, subfolder=subfolder, alpha=alpha, use_rslora=use_rslora)
    for expert, adapter in adapters.items():
        strength = weight[expert] if isinstance(weight, Mapping) else weight
        _inject(pipe, transformers[expert], adapter, adapter_name, strength)
    return next(iter(adapters.values())).info


def read_memory_lora(
    transformers: Mapping[Expert, nn.Module],
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    use_rslora: bool | None = None,
) -> dict[Expert, ExpertAdapter]:
    """Find, open and check a memory adapter without loading its weights; see :func:`load_memory_lora`."""
    weights = Weights(
        name="memory adapter",
        source=str(folder_or_repo),
        file=f"{subfolder}/*" if subfolder else None,
        size_gb=_RELEASED_SIZE_GB if str(folder_or_repo) == RELEASED_ADAPTERS and subfolder else 0.0,
        licence=_RELEASED_LICENCE if str(folder_or_repo) == RELEASED_ADAPTERS else "",
    )
    files = find_adapter_files(locate(weights), list(transformers), weights)
    shared = len(set(files.values())) < len(files)
    adapters = {
        expert: _read_expert(path, expert, transformers[expert], shared, alpha, use_rslora)
        for expert, path in files.items()
    }
    _check_one_adapter(adapters)
    return adapters


def _read_expert(
    path: Path,
    expert: Expert,
    transformer: nn.Module,
    shared: bool,
    alpha: float | None,
    use_rslora: bool | None,
) -> ExpertAdapter:
    file = open_adapter_file(path)
    components = {read.component for read in map(parse_key, file.shapes) if read is not None}
    if shared and components == {None}:
        raise ValueError(
            f"{path} does not say which expert its keys are for (they start with neither 'transformer.' nor "
            "'transformer_2.'), and the pipeline has two; give a folder with one file for each"
        )
    component = COMPONENTS[expert] if shared or len(components) > 1 else None
    keys = match_keys(file.shapes, adapted_linears(transformer), where=str(path), component=component)
    of_expert = component or next(iter(components))
    scale = resolve_scale(file, keys, prefix=f"{of_expert}." if of_expert else "", alpha=alpha, use_rslora=use_rslora)
    config = peft_config({name: k.rank for name, k in keys.items()}, scale.alphas, scale.use_rslora)
    info = replace(
        AdapterInfo.from_file(file) or AdapterInfo(),
        rank=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=scale.use_rslora,
    )
    return ExpertAdapter(file=file, keys=keys, config=config, info=info)


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


def _inject(pipe: Any, transformer: Any, adapter: ExpertAdapter, adapter_name: str, weight: float) -> None:
    active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    active = [active] if isinstance(active, str) else list(active)
    dtype = transformer.get_submodule("blocks.0.attn1.to_q").weight.dtype
    whole = dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )  # otherwise a quantised base: as in the file
    transformer.load_lora_adapter(
        adapter.tensors(dtype if whole else None),
        prefix=None,
        adapter_name=adapter_name,
        metadata=dict(adapter.config),
        low_cpu_mem_usage=True,
        _pipeline=pipe,
    )
    transformer.set_adapter([*active, adapter_name])
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(adapter_name, weight)
