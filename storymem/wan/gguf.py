"""Experts from GGUF files of 2 to 8 bits: they stay in few bits, and are widened layer by layer when they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from storymem.io import FileError, check_regular
from storymem.wan.settings import GgufSettings
from storymem.weights import GGUF, Header, Weights, check_values, locate, other_format, read_header

# Of the types of tensors that diffusers reads: bytes of a block that are half-precision scales; None: it is no block.
_SCALES: dict[str, slice | None] = {
    **dict.fromkeys(("F32", "F16", "BF16")),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), slice(0, 2)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), slice(0, 4)),
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q6_K": slice(208, 210),
}
def stays_in_few_bits(files: GgufSettings) -> bool:
    """Whether the experts are GGUF files; safetensors are widened when loaded."""
    return any((weights.file or weights.source).endswith(".gguf") for weights in files.all)


def are_in_8_bits(*files: Weights) -> bool:
    """Whether safetensors files have weights in fp8, by their headers; by their names if they are not here."""
    for weights in files:
        try:
            header = read_header(locate(weights))
        except (ValueError, FileNotFoundError):  # reported where weights are checked
            return "fp8" in (weights.file or weights.source).lower()
        if any(dtype.startswith("F8") for dtype in header.dtypes.values()):
            return True
    return False


def check_gguf_types(path: Path, header: Header, names: Mapping[str, str], network: Any) -> None:
    """Raise ``FileError`` for a weight in few bits that is not of a linear; ``names`` are those in the file."""
    for name, original in names.items():
        module, _, attribute = name.rpartition(".")
        linear = attribute == "weight" and hasattr(network.get_submodule(module), "in_features")
        widened, dtype = set(name.split(".")) & set(network._keep_in_fp32_modules), header.dtypes[original]
        if dtype not in ("F32", "F16") and not linear and not widened:
            raise FileError(f"{path}: {name} is {dtype}, which only weights of linears may be: use another GGUF file")


def read_gguf_header(path: Path) -> Header:
    """Shapes, types and architecture of a GGUF file; tensors are not read.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged, incomplete or of an unsupported type.
        ValueError: if the format's reader is not installed.
    """
    reader = _opened(path)
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    dtypes = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    kind = reader.get_field("general.architecture")
    return Header(shapes, dtypes, {} if kind is None else {kind.name: bytes(kind.parts[-1]).decode()})


def load_gguf(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The transformer in a GGUF file that was checked; NotFiniteError for NaN.

    Args:
        config: arguments of ``WanTransformer3DModel``.
        dtype: in which it computes.
    """
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    with TemporaryDirectory() as shape:
        with torch.device("meta"):
            WanTransformer3DModel(**config).save_config(shape)
        network = WanTransformer3DModel.from_single_file(
            _mapped(path), config=shape, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), dtype=dtype
        )
    check_values(_numbers(network), path)
    return network


def _opened(path: Path) -> Any:
    """The format's own reader of a file, which maps it; what is changed in memory is not written to the file."""
    check_regular(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("model.gguf needs the reader of these files: pip install 'gguf>=0.10'") from None
    try:
        reader = GGUFReader(path, "c")
    except (ValueError, LookupError, OverflowError, RecursionError) as error:
        what = other_format(path, but=GGUF) or f" ({error}): fetch it again"
        raise FileError(f"{path} is not a readable GGUF file{what}") from None
    for tensor in reader.tensors:
        if (kind := tensor.tensor_type.name) not in _SCALES:
            raise FileError(f"{path}: {tensor.name} is of type {kind}, which diffusers does not read")
    return reader


def _mapped(path: Path) -> dict[str, Any]:
    """The tensors of a file, mapped from it; diffusers' own reader copies each one, and maps the file as well."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    tensors = {}
    for tensor in _opened(path).tensors:
        numbers = torch.from_numpy(tensor.data)
        few_bits = tensor.tensor_type.name not in ("F32", "F16")
        tensors[tensor.name] = GGUFParameter(numbers, quant_type=tensor.tensor_type) if few_bits else numbers
    return tensors


def _numbers(network: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a network; of blocks of few bits, their scales."""
    from gguf import GGML_QUANT_SIZES

    for name, weight in network.named_parameters():
        if weight.is_floating_point():
            yield name, weight
            continue
        scales, (_, size) = _SCALES[weight.quant_type.name], GGML_QUANT_SIZES[weight.quant_type]
        if scales is None:
            yield name, weight.as_tensor().view(torch.bfloat16)
        else:
            yield name, weight.as_tensor().reshape(-1, size)[:, scales].contiguous().view(torch.float16)
