"""Experts from GGUF files of 2 to 8 bits: they stay in few bits, and are widened layer by layer when they compute."""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch

from storymem.io import FileError, check_regular
from storymem.wan.settings import GgufSettings
from storymem.weights import GGUF, Header, Weights, check_values, locate, other_format, read_header

_MOST = 1 << 22  # tensors, entries, bytes of a text, or elements of a list in a header
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of a metadata value -> bytes
_STRING, _ARRAY = 8, 9
# Types of tensors that diffusers reads: name, numbers per block, bytes per block, and the half-precision scales in it.
_TYPES: dict[int, tuple[str, int, int, slice | None]] = {
    0: ("F32", 1, 4, None),
    1: ("F16", 1, 2, None),
    2: ("Q4_0", 32, 18, slice(0, 2)),
    3: ("Q4_1", 32, 20, slice(0, 4)),
    6: ("Q5_0", 32, 22, slice(0, 2)),
    7: ("Q5_1", 32, 24, slice(0, 4)),
    8: ("Q8_0", 32, 34, slice(0, 2)),
    10: ("Q2_K", 256, 84, slice(80, 84)),
    11: ("Q3_K", 256, 110, slice(108, 110)),
    12: ("Q4_K", 256, 144, slice(0, 4)),
    13: ("Q5_K", 256, 176, slice(0, 4)),
    14: ("Q6_K", 256, 210, slice(208, 210)),
    20: ("IQ4_NL", 32, 18, slice(0, 2)),
    23: ("IQ4_XS", 256, 136, slice(0, 2)),
    30: ("BF16", 1, 2, None),
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


def check_reader(files: GgufSettings) -> None:
    """Raise ``ValueError`` if experts are GGUF files, and their reader is not installed."""
    if stays_in_few_bits(files) and importlib.util.find_spec("gguf") is None:
        raise ValueError("model.gguf needs the reader of these files: pip install 'gguf>=0.10'")


def check_gguf_types(path: Path, header: Header, names: Mapping[str, str], network: Any) -> None:
    """Raise ``FileError`` for a weight in few bits that is not of a linear; ``names`` are those in the file."""
    for name, original in names.items():
        module, _, attribute = name.rpartition(".")
        linear = attribute == "weight" and hasattr(network.get_submodule(module), "in_features")
        widened, dtype = set(name.split(".")) & set(network._keep_in_fp32_modules), header.dtypes[original]
        if dtype not in ("F32", "F16") and not linear and not widened:
            raise FileError(f"{path}: {name} is {dtype}, which only weights of linears may be: use another GGUF file")


def load_gguf(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The transformer in a GGUF file that was checked; NotFiniteError for NaN.

    Args:
        config: arguments of ``WanTransformer3DModel``.
        dtype: in which it computes.
    """
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    read_gguf_header(path)  # a mapped file that is shorter than its header states would end the process
    with TemporaryDirectory() as shape:
        with torch.device("meta"):
            WanTransformer3DModel(**config).save_config(shape)
        network = WanTransformer3DModel.from_single_file(
            _mapped(path), config=shape, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), dtype=dtype
        )
    check_values(_numbers(network), path)
    return network


def _mapped(path: Path) -> dict[str, Any]:
    """The tensors of a file, mapped from it; diffusers' own reader copies each one, and maps the file as well."""
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGUFReader

    tensors = {}
    for tensor in GGUFReader(path, "c").tensors:  # what is changed in memory is not written to the file
        numbers = torch.from_numpy(tensor.data)
        few_bits = _TYPES[int(tensor.tensor_type)][0] not in ("F32", "F16")
        tensors[tensor.name] = GGUFParameter(numbers, quant_type=tensor.tensor_type) if few_bits else numbers
    return tensors


def _numbers(network: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a network; of blocks of few bits, their scales."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point():
            yield name, weight
            continue
        _, _, size, scales = _TYPES[int(weight.quant_type)]
        if scales is None:
            yield name, weight.as_tensor().view(torch.bfloat16)
        else:
            yield name, weight.as_tensor().reshape(-1, size)[:, scales].contiguous().view(torch.float16)


# The header


def read_gguf_header(path: Path) -> Header:
    """Shapes, types and text entries of a GGUF file; tensors are not read.

    The format's own library does not check the counts in a header, and reads for minutes where they are wrong.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged, incomplete or of an unsupported type.
    """
    size = check_regular(path).stat().st_size
    with path.open("rb") as file:
        try:
            return _header(file, size)
        except (struct.error, ValueError, OverflowError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else "its header is cut off or damaged"
            what = other_format(path, but=GGUF) or f" ({reason}): fetch it again"
            raise FileError(f"{path} is not a readable GGUF file{what}") from None


def _header(file: BinaryIO, size: int) -> Header:
    magic, version = _numbers_of(file, "4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as one" if magic != b"GGUF" else f"version {version}, not 2 or 3")
    tensors, entries = _count(file, "tensors"), _count(file, "entries")
    metadata = {}
    for _ in range(entries):
        key = _text(file)
        metadata[key] = _value(file, *_numbers_of(file, "I"))
    alignment = int(metadata.get("general.alignment", "32"))
    if not 1 <= alignment <= 1 << 16:
        raise ValueError(f"its alignment is {alignment}")
    shapes, dtypes, end = {}, {}, 0
    for _ in range(tensors):
        name, (dimensions,) = _text(file), _numbers_of(file, "I")
        if dimensions > 8:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shapes[name] = shape = _numbers_of(file, f"{dimensions}Q")[::-1]
        kind, offset = _numbers_of(file, "IQ")
        if kind not in _TYPES:
            raise ValueError(f"{name} is of type {kind}, which diffusers does not read")
        dtypes[name], block, block_bytes, _ = _TYPES[kind]
        if (row := shape[-1] if shape else 1) % block:
            raise ValueError(f"{name} has rows of {row}, which are not blocks of {block}")
        if offset != (begins := -(-end // alignment) * alignment):
            raise ValueError(f"{name} begins at byte {offset:,}, and the tensor before it ends at {begins:,}")
        end = offset + math.prod(shape) // block * block_bytes
    if (total := -(-file.tell() // alignment) * alignment + end) > size:
        raise ValueError(f"it has {size:,} bytes, and its header states {total:,}")
    return Header(shapes, dtypes, metadata)


def _numbers_of(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _count(file: BinaryIO, what: str) -> int:
    (count,) = _numbers_of(file, "Q")
    if count > _MOST:
        raise ValueError(f"its header states {count:,} {what}")
    return count


def _text(file: BinaryIO) -> str:
    text = file.read(length := _count(file, "bytes of a text"))
    if len(text) < length:
        raise ValueError("its header is cut off")
    return text.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> str:
    """A metadata value, as text; empty for a list."""
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError(f"its header has a value of type {kind}")
        return str(int.from_bytes(file.read(_SCALARS[kind]), "little"))
    (inside,) = _numbers_of(file, "I")
    count = _count(file, "elements of a list")
    if inside in _SCALARS:
        file.seek(count * _SCALARS[inside], 1)
    else:
        for _ in range(count):
            _value(file, inside)
    return ""
