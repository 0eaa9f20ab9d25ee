"""Reading checkpoints without running their code, and loading every tensor of them into a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from storymem.io import FileError
from storymem.weights import check_values, listed, read_header, read_pickle

Network = TypeVar("Network", bound=nn.Module)


class CheckpointError(FileError):
    """A file's tensors are not those of the network; the message lists what is missing or misshapen."""


def read_checkpoint(path: Path, *, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch pickle (``weights_only=True``), on the CPU.

    Args:
        path: of the file.
        inside: the key under which some files store the tensors, beside other things.

    Raises:
        FileNotFoundError, FileError: if there is no such file, it is damaged, or a Git LFS pointer.
        CheckpointError: if it holds something else than tensors by name.
        NotFiniteError: if a tensor holds NaN or infinity.
    """
    if path.suffix == ".safetensors":
        read_header(path)  # its errors say what is wrong with a file
        content: Any = load_file(path)
    else:
        content = read_pickle(path)
    if isinstance(content, dict) and inside is not None and inside in content:
        content = content[inside]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is {type(value).__name__}, not a tensor")
    check_values(content.items(), path)
    return content


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
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": [
            f"{name} is {list(found.shape)}, not {list(ours.shape)}"
            for name, found, ours in both
            if found.shape != ours.shape
        ],
        "of the wrong type": [f"{name} is {found.dtype}" for name, found, ours in both if _kind(found) != _kind(ours)],
    }
    if any(problems.values()):
        raise CheckpointError(listed(f"{source} does not fit {type(network).__name__}:", problems))
    network.load_state_dict(dict(tensors), strict=True, assign=assign)


def seeded(seed: int, build: Callable[[], Network]) -> Network:
    """An untrained network, the same for the same ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _kind(tensor: Tensor) -> bool:
    """Whether it holds floating-point numbers that can be computed with as they are (8 bits need scales)."""
    return tensor.is_floating_point() and tensor.element_size() > 1
