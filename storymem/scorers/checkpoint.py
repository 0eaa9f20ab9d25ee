"""Reading checkpoints without running their code, and loading them so that nothing is left to chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_LISTED = 8  # names written out in a message before "and N more"


class CheckpointError(ValueError):
    """A file's tensors are not those of the network; the message lists what is missing or misshapen."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a .safetensors file or of a torch pickle (``weights_only=True``), on the CPU."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
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
        CheckpointError: if a name is missing or unexpected or a shape differs; all of them are listed.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, should be {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(found.values()):
        lines = [f"{source} does not fit {type(network).__name__}:"]
        lines += [f"  {kind}: {_listing(names)}" for kind, names in found.items() if names]
        raise CheckpointError("\n".join(lines))
    network.load_state_dict(dict(tensors), strict=True, assign=assign)


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
