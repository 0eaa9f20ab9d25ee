"""Weights of the experts in 8 bits: stored so by diffusers' layer-wise casting, or computed with too by torchao.

Only the linears in the blocks change, which hold 98 % of an expert. Embeddings, norms and adapters stay as they are, so
an adapter loses nothing; it is never fused into rounded weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from storymem.wan.gguf import check_gguf
from storymem.wan.settings import ModelSettings, RuntimeSettings

_TORCHAO = "pip install 'torchao>=0.15'"
_FP8_CAPABILITY, _INT8_CAPABILITY = (8, 9), (8, 0)  # Ada and Hopper; Ampere


def check_precision(model: ModelSettings, runtime: RuntimeSettings, device: torch.device, *, here: bool = True) -> None:
    """Raise ``ValueError`` for a ``runtime.precision`` that ``device`` cannot do, or that does not go with the rest.

    Args:
        here: whether this machine has the device; if not, what only it can tell is left out.
    """
    precision = runtime.precision
    if model.gguf is not None:
        check_gguf(model.gguf, runtime)
    if precision == "as_is":
        return
    if precision == "fp8_storage":
        if device.type == "mps":
            raise ValueError("runtime.precision=fp8_storage: mps devices have no 8-bit floats; use precision=as_is")
        if runtime.compile != "none":
            raise ValueError(
                "runtime.precision=fp8_storage converts weights layer by layer, outside of what can be compiled: use "
                "runtime.precision=fp8 or int8, or runtime.compile=none"
            )
        return
    if model.dtype != "bfloat16":
        raise ValueError(f"runtime.precision={precision} needs model.dtype=bfloat16 for the rest, not {model.dtype}")
    if not here:
        return
    _check_arithmetic(runtime, device)
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"runtime.precision={precision} needs torchao: {_TORCHAO}; fp8_storage needs nothing")


def lower_precision(experts: Iterable[Any], model: ModelSettings, runtime: RuntimeSettings) -> None:
    """Bring the blocks' linears of transformers to ``runtime.precision``; adapters must be loaded before."""
    for expert in experts:
        if runtime.precision == "fp8_storage":
            compute = getattr(torch, model.dtype)
            expert.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
        elif runtime.precision != "as_is":
            _quantise(expert, runtime.precision)


def _quantise(expert: nn.Module, precision: str) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if precision == "fp8":
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    else:
        config = Int8DynamicActivationInt8WeightConfig()
    quantize_(expert, config, filter_fn=_is_blocks_linear)


def _is_blocks_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("blocks.") and "lora_" not in name


def _check_arithmetic(runtime: RuntimeSettings, device: torch.device) -> None:
    """Whether a device multiplies 8-bit floats or integers."""
    precision = runtime.precision
    if device.type == "cuda" and torch.version.hip is None:
        needed = _FP8_CAPABILITY if precision == "fp8" else _INT8_CAPABILITY
        found = torch.cuda.get_device_capability(device)
        if found >= needed:
            return
        raise ValueError(
            f"runtime.precision={precision} needs compute capability {needed[0]}.{needed[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use runtime.precision=fp8_storage"
        )
    if precision == "int8" and device.type == "cpu":
        return
    raise ValueError(
        f"runtime.precision={precision} computes in 8 bits on CUDA devices, and the device is {device.type}: use "
        "runtime.precision=fp8_storage or as_is"
    )
