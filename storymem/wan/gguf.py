"""Experts from single files, as they circulate for ComfyUI: GGUF, of 2 to 8 bits, which are widened layer by layer.

A safetensors file with the original's names or diffusers' is read as well, if it holds plain weights.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from storymem.io import FileError, check_regular
from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.weights import Header, check_tensors, check_values, locate, read_header

_MOST_TENSORS, _MOST_ENTRIES, _LONGEST_LIST, _LONGEST_TEXT = 1 << 16, 1 << 14, 1 << 22, 1 << 20  # in a header
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of a metadata value -> bytes
_STRING, _ARRAY = 8, 9
# Type of tensor -> name, numbers in a block, bytes of a block, and where in it half-precision scales lie; those that
# diffusers reads.
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


def check_gguf(runtime: RuntimeSettings) -> None:
    """Raise ``ValueError`` for what does not go with GGUF files, or if nothing here can read them."""
    if runtime.precision != "as_is":
        raise ValueError(
            f"runtime.precision={runtime.precision}: the experts of model.gguf have few bits already; use as_is"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("model.gguf needs the reader of these files: pip install 'gguf>=0.10'")


def check_expert_file(path: Path, network: Any) -> None:
    """Raise unless a single file holds exactly the weights of a network, in types that are read; loads none of them.

    Args:
        path: GGUF or safetensors.
        network: ``WanTransformer3DModel``, on any device.

    Raises:
        FileNotFoundError, FileError: naming the file and the tensors.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    if path.suffix == ".gguf":
        header = read_gguf_header(path)
    else:
        header = read_header(path)
        if scales := [name for name in header.shapes if name.endswith(("scale_weight", "weight_scale", "scaled_fp8"))]:
            raise FileError(
                f"{path} is scaled fp8 ({scales[0]} and {len(scales) - 1} more), which is not read: use a GGUF file of "
                "this expert, or the folder of model.weights with runtime.precision=fp8_storage"
            )
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: (shape, header.dtypes[name]) for name, shape in header.shapes.items()}
    converted = convert_wan_transformer_to_diffusers(dict(found))  # as diffusers does where its own names are absent
    if len(converted.keys() & expected.keys()) > len(found.keys() & expected.keys()):
        found = converted
    kind = header.metadata.get("general.architecture")
    about = f" (architecture {kind!r})" if kind not in (None, "wan") else ""
    where = f"{path}{about} does not hold the weights of this model's experts:"
    check_tensors({name: shape for name, (shape, _) in found.items()}, expected, where=where)
    for name, (_, dtype) in found.items() if path.suffix == ".gguf" else ():
        module, _, attribute = name.rpartition(".")
        linear = attribute == "weight" and hasattr(network.get_submodule(module), "in_features")
        widened = set(name.split(".")) & set(network._keep_in_fp32_modules)
        if dtype not in ("F32", "F16") and not linear and not widened:
            raise FileError(f"{path}: {name} is {dtype}, which only weights of linears may be: use another GGUF file")


def load_gguf_experts(model: ModelSettings, names: Collection[str]) -> dict[str, Any]:
    """Transformers, from files with the original's names or diffusers'; their shape is ``model.network``'s.

    Args:
        model: names the files.
        names: which of ``transformer`` and ``transformer_2``.

    Raises:
        MissingWeights: if a file is not on this machine.
        NotFiniteError: for weights that are NaN, infinite or too large.
    """
    import torch
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    assert model.gguf is not None
    dtype = getattr(torch, model.dtype)
    files = {"transformer": model.gguf.high_noise, "transformer_2": model.gguf.low_noise}
    experts = {}
    with TemporaryDirectory() as shape:
        with torch.device("meta"):
            WanTransformer3DModel(**model.network.transformer, in_channels=model.spec.in_channels).save_config(shape)
        for name in [name for name in files if name in names]:
            path = locate(files[name])
            experts[name] = WanTransformer3DModel.from_single_file(
                str(path),
                config=shape,
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
            )
            check_values(_numbers(experts[name]), path)
    return experts


def _numbers(network: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a network; of blocks of few bits, their scales."""
    import torch

    for name, weight in network.named_parameters():
        if weight.is_floating_point():
            yield name, weight
            continue
        _, _, size, scales = _TYPES[int(weight.quant_type)]
        if scales is None:
            yield name, weight.as_tensor().view(torch.bfloat16)
        else:
            yield name, weight.as_tensor().reshape(-1, size)[:, scales].contiguous().view(torch.float16)


# --- the header -----------------------------------------------------------------------------------------------------


def read_gguf_header(path: Path) -> Header:
    """Shapes, types and text entries of a GGUF file; no weight is read.

    The format's own library takes the counts in a header on trust, and reads on for minutes where they are wrong.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged, incomplete or of a type not read.
    """
    size = check_regular(path).stat().st_size
    with path.open("rb") as file:
        try:
            return _header(file, size)
        except (struct.error, ValueError, OverflowError, RecursionError, _Damaged) as error:
            reason = str(error) if isinstance(error, _Damaged) else "its header is cut off or damaged"
            raise FileError(f"{path} is not a readable GGUF file ({reason}): fetch it again") from None


class _Damaged(Exception):
    """What is wrong with a header."""


def _header(file: BinaryIO, size: int) -> Header:
    magic, version, tensors, entries = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise _Damaged("it does not begin as one" if magic != b"GGUF" else f"version {version}, not 2 or 3")
    if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
        raise _Damaged(f"its header says {tensors:,} tensors and {entries:,} entries")
    metadata = {}
    for _ in range(entries):
        key = _text(file)
        metadata[key] = _value(file, *struct.unpack("<I", file.read(4)))
    alignment = int(metadata.get("general.alignment", "32"))
    if not 1 <= alignment <= 1 << 16:
        raise _Damaged(f"its alignment is {alignment}")
    shapes, dtypes, end = {}, {}, 0
    for _ in range(tensors):
        name = _text(file)
        (dimensions,) = struct.unpack("<I", file.read(4))
        if dimensions > 8:
            raise _Damaged(f"{name} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions))[::-1]
        kind, offset = struct.unpack("<IQ", file.read(12))
        if kind not in _TYPES:
            raise _Damaged(f"{name} is of type {kind}, which diffusers does not read")
        dtypes[name], block, block_bytes, _ = _TYPES[kind]
        count = 1
        for length in shape:
            count *= length
        if (shape[-1] if shape else 1) % block:
            raise _Damaged(f"{name} has rows of {shape[-1]}, which are not blocks of {block}")
        if offset != (begins := -(-end // alignment) * alignment):
            raise _Damaged(f"{name} begins at byte {offset:,}, and the tensor before it says {begins:,}")
        shapes[name] = shape
        end = offset + count // block * block_bytes
    if (total := -(-file.tell() // alignment) * alignment + end) > size:
        raise _Damaged(f"it has {size:,} bytes, and its header says {total:,}")
    return Header(shapes, dtypes, metadata)


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_TEXT:
        raise _Damaged(f"a text of {length:,} bytes")
    text = file.read(length)
    if len(text) < length:
        raise _Damaged("its header is cut off")
    return text.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> str:
    """A metadata value, as text where it is text or a whole number; others are passed over."""
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inside, count = struct.unpack("<IQ", file.read(12))
        if count > _LONGEST_LIST:
            raise _Damaged(f"a list of {count:,} entries")
        if inside in _SCALARS:
            file.seek(count * _SCALARS[inside], 1)
        else:
            for _ in range(count):
                _value(file, inside)
        return ""
    if kind not in _SCALARS:
        raise _Damaged(f"a value of type {kind}")
    return str(int.from_bytes(file.read(_SCALARS[kind]), "little"))
