"""Memory adapters written to files, in the four layouts that people use.

===========  =======================================  ======================================================
layout       files                                    first key
===========  =======================================  ======================================================
storymem     {high,low}_noise.safetensors             blocks.0.attn1.to_q.lora_A.weight
released     backbone_{high,low}_noise.safetensors    base_model.model.blocks.0.self_attn.q.lora_A.weight
diffusers    pytorch_lora_weights.safetensors         transformer.blocks.0.attn1.to_q.lora_A.weight
comfyui      memory_{high,low}_noise.safetensors      diffusion_model.blocks.0.self_attn.q.lora_down.weight
===========  =======================================  ======================================================

``storymem`` and ``diffusers`` keep A and B as trained and state alpha and rsLoRA in the metadata. Readers of
``released`` look at no metadata and take alpha = rank with rsLoRA, so there B takes up what the true scale differs from
that, and the metadata states alpha = rank; beside each file lies the same as ``.pth``, which the published code opens.
ComfyUI knows alpha / rank alone, so there alpha is written such that this is the true scale.

diffusers reads two of these without us. Of ``storymem``, each expert's file::

    pipe.transformer.load_lora_adapter(folder, prefix=None, weight_name="high_noise.safetensors")

of ``diffusers``, the high-noise half with ``pipe.load_lora_weights(folder)``, and the other with::

    name = "pytorch_lora_weights.safetensors"
    pipe.transformer_2.load_lora_adapter(folder, prefix="transformer_2", weight_name=name)
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from storymem.io import replacing
from storymem.wan.lora_files import PEFT_METADATA, AdapterInfo, most_common, peft_config
from storymem.wan.lora_keys import adapted_linears
from storymem.wan.names import COMPONENTS, Expert, experts_of, original_name

Layout = Literal["storymem", "released", "diffusers", "comfyui"]

_FILES: dict[Layout, str] = {
    "storymem": "{expert}.safetensors",
    "released": "backbone_{expert}.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "memory_{expert}.safetensors",
}


def save_memory_lora(
    pipe_or_transformers: Any,
    folder: str | Path,
    *,
    layout: Layout = "storymem",
    adapter_name: str = "memory",
    metadata: AdapterInfo | None = None,
) -> list[Path]:
    """Save an adapter from the transformers it is loaded in or was trained in.

    The weight set by ``set_adapters`` is not saved: it belongs to the use of the adapter.

    Args:
        pipe_or_transformers: a pipeline, or ``{"high_noise": transformer, "low_noise": transformer}`` (or one
            of them).
        folder: where to; made if absent. Keep one layout a folder, since a loader must not have to choose.
        layout: one of those in the module's table.
        adapter_name: the adapter's name in the transformers.
        metadata: memory mode, RoPE stride, conditioning and notes; its rank, alpha and rsLoRA are replaced by
            those of the weights.

    Returns:
        The safetensors files written.

    Raises:
        ValueError: if a transformer has no such adapter, or one of another kind than
            :func:`memory_lora_config` makes.
    """
    whole = isinstance(pipe_or_transformers, Mapping)
    transformers: Mapping[Expert, Any] = pipe_or_transformers if whole else experts_of(pipe_or_transformers)
    layers = {
        expert: _adapter_layers(transformer, COMPONENTS[expert], adapter_name)
        for expert, transformer in transformers.items()
    }
    every = [layer for of_expert in layers.values() for layer in of_expert.values()]
    info = replace(
        metadata or AdapterInfo(),
        rank=most_common(layer.r[adapter_name] for layer in every),
        alpha=float(most_common(layer.lora_alpha[adapter_name] for layer in every)),
        use_rslora=bool(most_common(layer.use_rslora.get(adapter_name, False) for layer in every)),
    )
    states = {
        expert: {
            f"{name}.lora_{part}.weight": tensor
            for name, layer in of_expert.items()
            for part, tensor in _matrices(layer, adapter_name, info).items()
        }
        for expert, of_expert in layers.items()
    }
    return write_memory_lora(states, folder, info=info, layout=layout)


def _adapter_layers(transformer: Any, component: str, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of one adapter, which must sit on exactly the linears of a memory adapter."""
    layers = {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.r
    }
    if not layers:
        have = ", ".join(getattr(transformer, "peft_config", {})) or "none"
        raise ValueError(f"{component} has no adapter called {adapter_name!r}; it has: {have}")
    strange = sorted(layers.keys() ^ set(adapted_linears(transformer)))
    strange += [
        name
        for name, layer in layers.items()
        if adapter_name in layer.lora_variant or getattr(layer.lora_B[adapter_name], "bias", None) is not None
    ]
    if strange:
        raise ValueError(
            f"adapter {adapter_name!r} of {component} is not one that memory_lora_config() makes: "
            f"{len(strange)} modules differ, first {', '.join(strange[:4])}"
        )
    return layers


def _matrices(layer: LoraLayer, adapter_name: str, info: AdapterInfo) -> dict[str, Tensor]:
    """A and B of one layer; B takes up what the scale of this layer differs from ``info``'s."""
    a = layer.lora_A[adapter_name].get_parameter("weight").detach()
    b = layer.lora_B[adapter_name].get_parameter("weight").detach()
    own = replace(
        info,
        alpha=float(layer.lora_alpha[adapter_name]),
        use_rslora=bool(layer.use_rslora.get(adapter_name, False)),
    )
    rank = layer.r[adapter_name]
    factor = own.scale(rank) / info.scale(rank)
    return {"A": a, "B": b if factor == 1.0 else (b.float() * factor).to(b.dtype)}


def write_memory_lora(
    states: Mapping[Expert, Mapping[str, Tensor]],
    folder: str | Path,
    *,
    info: AdapterInfo,
    layout: Layout = "storymem",
) -> list[Path]:
    """Write adapter weights that are at hand as tensors: averaged ones, or ones gathered from shards.

    Args:
        states: for each expert, ``blocks.0.attn1.to_q.lora_A.weight`` ... -> tensor.
        folder: where to; made if absent.
        info: alpha and rsLoRA of these weights, and what else shall stand in the metadata.
        layout: one of those in the module's table.

    Returns:
        The safetensors files written.
    """
    if layout not in _FILES:
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    stated = info
    if layout == "comfyui":
        stated = replace(info, alpha=info.scale(info.rank) * info.rank, use_rslora=False)
    elif layout == "released":
        stated = replace(info, alpha=float(info.rank), use_rslora=True)
    tensors: dict[str, dict[str, Tensor]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for expert, state in states.items():
        file = _FILES[layout].format(expert=expert)
        tensors.setdefault(file, {}).update(_in_layout(layout, state, info, stated, COMPONENTS[expert]))
        configs.setdefault(file, {}).update(_peft_metadata(layout, state, info, COMPONENTS[expert]))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [
        _write(
            tensors[file],
            Path(folder) / file,
            stated.to_metadata() | ({PEFT_METADATA: json.dumps(config, sort_keys=True)} if config else {}),
            pickled=layout == "released",
        )
        for file, config in configs.items()
    ]


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, pickled: bool) -> Path:
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if pickled:
        state = OrderedDict(on_cpu)
        state._metadata = dict(metadata)  # type: ignore[attr-defined]  # as state dicts of modules have it
        with replacing(path.with_suffix(".pth")) as partial:
            torch.save(state, partial)
    with replacing(path) as partial:
        save_file(on_cpu, partial, metadata={"format": "pt", **metadata})
    return path


def _in_layout(
    layout: Layout, state: Mapping[str, Tensor], info: AdapterInfo, stated: AdapterInfo, component: str
) -> dict[str, Tensor]:
    """The tensors of one expert under the names of ``layout``, for a reader that takes the scale ``stated``."""
    if layout == "storymem":
        return dict(state)
    if layout == "diffusers":
        return {f"{component}.{key}": tensor for key, tensor in state.items()}
    written = {}
    for key, tensor in state.items():
        linear, matrix = key.removesuffix(".weight").rsplit(".", 1)
        original = original_name(linear)
        if layout == "released":
            rank = tensor.shape[0 if matrix == "lora_A" else 1]
            factor = info.scale(rank) / stated.scale(rank)
            if matrix == "lora_B" and not math.isclose(factor, 1.0, rel_tol=1e-9):
                tensor = (tensor.float() * factor).to(tensor.dtype)
            written[f"base_model.model.{original}.{matrix}.weight"] = tensor
        elif matrix == "lora_A":
            rank = tensor.shape[0]
            written[f"diffusion_model.{original}.lora_down.weight"] = tensor
            written[f"diffusion_model.{original}.alpha"] = torch.tensor(info.scale(rank) * rank)
        else:
            written[f"diffusion_model.{original}.lora_up.weight"] = tensor
    return written


def _peft_metadata(layout: Layout, state: Mapping[str, Tensor], info: AdapterInfo, component: str) -> dict[str, Any]:
    """PEFT's configuration where diffusers reads the file; its names would not fit the original Wan names."""
    if layout not in ("storymem", "diffusers"):
        return {}
    ranks = {key.split(".lora_A.")[0]: int(t.shape[0]) for key, t in state.items() if ".lora_A." in key}
    config = peft_config(ranks, dict.fromkeys(ranks, info.alpha), info.use_rslora)
    return config if layout == "storymem" else {f"{component}.{key}": value for key, value in config.items()}
