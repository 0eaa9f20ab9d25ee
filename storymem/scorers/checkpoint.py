"""Reading checkpoints without running their code, and loading them so that nothing is left to chance."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from storymem.io import FileError, check_regular
from storymem.weights import check_values, read_header

_LISTED = 8  # names written out in a message before "and N more"
_POINTER = b"version https://git-lfs"
_UNPICKLING = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError),
    *(OSError, OverflowError, ImportError, AssertionError, struct.error, zipfile.BadZipFile),
)  # what torch.load raises for damaged files


class CheckpointError(FileError):
    """A file's tensors are not those of the network; the message lists what is missing or misshapen."""


def read_checkpoint(path: Path, *, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch pickle (``weights_only=True``), on the CPU.

    Args:
        path: of the file.
        inside: the key under which some files keep the tensors, beside other things.

    Raises:
        FileNotFoundError, FileError: if there is no such file, it is damaged, or a Git LFS pointer.
        CheckpointError: if it holds something else than tensors by name.
        NotFiniteError: if a tensor holds NaN or infinity.
    """
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    if isinstance(content, dict) and inside is not None and inside in content:
        content = content[inside]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is {type(value).__name__}, not a tensor")
    check_values(content.items(), path)
    return content


def _safetensors(path: Path) -> dict[str, Tensor]:
    read_header(path)  # which names what is wrong
    return load_file(path)


def _pickle(path: Path) -> Any:
    with check_regular(path).open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise FileError(f"{path} is a Git LFS pointer and not the weights themselves: fetch them with git lfs pull")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path} cannot be read as a checkpoint of torch with weights_only=True: {said}") from None


def load_strictly(
    network: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, *, assign: bool = False
) -> None:
    """Fill ``network`` with ``tensors``, every one of them and no other.

    Args:
        network: on any device; on the meta device ``assign`` must be true.
        tensors: by the network's own names.
        source: where they came from, for the message.
        assign: make the tensors the network's parameters instead of copying their values.

    Raises:
        CheckpointError: if a name is missing or unexpected or a shape or kind of number differs; all are listed.
    """
    wanted = network.state_dict()
    both = [(name, tensors[name], wanted[name]) for name in wanted if name in tensors]
    found = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": [
            f"{name} is {list(theirs.shape)}, should be {list(ours.shape)}"
            for name, theirs, ours in both
            if theirs.shape != ours.shape
        ],
        "not of the right type": [
            f"{name} is {theirs.dtype}" for name, theirs, ours in both if _kind(theirs) != _kind(ours)
        ],
    }
    if any(found.values()):
        lines = [f"{source} does not fit {type(network).__name__}:"]
        lines += [f"  {kind}: {_listing(names)}" for kind, names in found.items() if names]
        raise CheckpointError("\n".join(lines))
    network.load_state_dict(dict(tensors), strict=True, assign=assign)


def _kind(tensor: Tensor) -> bool:
    """Whether it holds floating-point numbers that can be computed with as they are (8 bits need scales)."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
