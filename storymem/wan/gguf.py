"""Experts from GGUF single files, as they circulate for ComfyUI: weights in 2 to 8 bits, widened layer by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from tempfile import TemporaryDirectory

import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.weights import locate


def check_gguf(runtime: RuntimeSettings) -> None:
    """Raise ``ValueError`` for what does not go with GGUF files, or if nothing here can read them."""
    if runtime.precision != "as_is":
        raise ValueError(
            f"runtime.precision={runtime.precision}: the experts of model.gguf have few bits already; use as_is"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("model.gguf needs the reader of these files: pip install 'gguf>=0.10'")


def load_gguf_experts(model: ModelSettings, names: Collection[str]) -> dict[str, WanTransformer3DModel]:
    """Transformers, from files with the original's names or diffusers'; their shape is ``model.network``'s.

    Args:
        model: names the files.
        names: which of ``transformer`` and ``transformer_2``.

    Raises:
        MissingWeights: if a file is not on this machine.
    """
    assert model.gguf is not None
    dtype = getattr(torch, model.dtype)
    files = {"transformer": model.gguf.high_noise, "transformer_2": model.gguf.low_noise}
    with TemporaryDirectory() as shape:
        with torch.device("meta"):
            WanTransformer3DModel(**model.network.transformer, in_channels=model.spec.in_channels).save_config(shape)
        return {
            name: WanTransformer3DModel.from_single_file(
                str(locate(weights)),
                config=shape,
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
            )
            for name, weights in files.items()
            if name in names
        }
