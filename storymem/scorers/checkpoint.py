"""Reading checkpoints and the sizes beside them without running their code, and building networks from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from accelerate import init_empty_weights
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from storymem.config import ConfigError, build_settings
from storymem.io import FileError, read_json_object
from storymem.weights import check_tensors, check_values, listed, read_header, read_pickle

Network = TypeVar("Network", bound=nn.Module)
Sizes = TypeVar("Sizes")

# Bounds for sizes in files: larger ones would take all RAM before anything is checked.
Width = Annotated[int, Field(ge=1, le=8192)]
Count = Annotated[int, Field(ge=1, le=96)]  # of layers and heads
_MOST = {"layers": 96, "heads": 96, "vocab": 1 << 20, "token": 1 << 20, "": 8192}  # by what a key contains


def read_sizes(cls: type[Sizes], content: Mapping[str, Any], path: Path) -> Sizes:
    """``content`` of the file at ``path`` as the settings class ``cls``; ``FileError`` if it does not fit."""
    try:
        return build_settings(cls, content)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from None


def read_checkpoint(path: Path, *, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch pickle (``weights_only=True``), on the CPU.

    Args:
        path: of the file.
        inside: the key under which some files store the tensors, beside other things.

    Raises:
        FileNotFoundError, FileError: if there is no such file, or it is damaged or holds something else.
        NotFiniteError: if a tensor holds NaN or infinity.
    """
    if path.suffix == ".safetensors":
        read_header(path)  # its errors name the cause
        content: Any = load_file(path)
    else:
        content = read_pickle(path)
    if isinstance(content, dict) and inside is not None and inside in content:
        content = content[inside]
    if not isinstance(content, dict) or not content:
        raise FileError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FileError(f"{path}: {name!r} is {type(value).__name__}, not a tensor")
    check_values(content.items(), path)
    return content


def loaded(build: Callable[[], Network], tensors: Mapping[str, Tensor], source: Path | str) -> Network:
    """The network that ``build`` makes, without RAM for its own parameters, with ``tensors`` by the names in it.

    Args:
        source: where the tensors came from, for the message.

    Raises:
        FileError: if names, shapes or kinds of numbers differ; all differences are listed.
    """
    with init_empty_weights(include_buffers=False):
        network = build()
    wanted = network.state_dict()
    check_tensors(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in wanted.items()},
        where=f"{source} does not fit {type(network).__name__}:",
    )
    for name, tensor in tensors.items():
        # Floats of 8 bits need scales.
        if wanted[name].is_floating_point() and not (tensor.is_floating_point() and tensor.element_size() > 1):
            raise FileError(f"{source}: {name} is {tensor.dtype}, not a float of 16 bits or more")
    network.load_state_dict(dict(tensors), strict=True, assign=True)
    return network


def load_pretrained(cls: type[Network], sizes: Any, path: Path, described: Path) -> Network:
    """A network of transformers with the weights at ``path``, every one of them and no other.

    Args:
        cls: of the network.
        sizes: the class of its configuration.
        path: of ``model.safetensors``.
        described: its ``config.json``.

    Raises:
        FileError: if a file is damaged or they do not fit.
        NotFiniteError: if a weight is NaN or infinite.
    """
    content = read_json_object(described)
    if content.get("model_type") != sizes.model_type:
        raise FileError(f"{described}: model_type is {content.get('model_type')!r}, not {sizes.model_type!r}")
    _check_sizes(content, described)
    try:
        config = sizes(**content)
        with init_empty_weights():
            cls(config)
    except Exception as error:  # transformers raises anything
        problem = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{described} does not describe a network that can be built: {problem}") from None
    read_header(path)  # its errors name the cause
    network, report = cls.from_pretrained(  # type: ignore[attr-defined]
        path.parent,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are reported
        output_loading_info=True,
    )
    problems = {kind.removesuffix("_keys"): sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise FileError(listed(f"{path} does not fit {described}:", problems))
    check_values(network.state_dict().items(), path)
    return network


def _check_sizes(content: Mapping[str, Any], described: Path) -> None:
    """Raise ``FileError`` for a number that no network has, at any depth; building it would take all RAM."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_sizes(value, described)
        most = next(most for part, most in _MOST.items() if part in key)
        if isinstance(value, int) and value > most:
            raise FileError(f"{described}: {key}={value} must be {most} or less")


def seeded(seed: int, build: Callable[[], Network]) -> Network:
    """An untrained network, the same for the same ``seed``; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
