"""Networks from the files that users have: diffusers' folders, Wan's original release, single files of ComfyUI.

A file is compared with the network by its header: every weight must be there, and nothing else. Loading then reads
tensor by tensor, each once, and keeps no second copy: a tensor that needs no conversion stays mapped from its file.
A file that is too short is refused before it is mapped; one that is truncated later, while it is in use, ends the
process (SIGBUS), as RAM that fails would. Only a copy of it could prevent that, and mapping saves that copy.
GGUF is checked likewise and read by diffusers; see :mod:`storymem.wan.gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors import safe_open
from torch import Tensor, nn

from storymem.io import FileError
from storymem.wan.eight_bits import ScaledLinear, in_8_bits, is_linear_of_a_block, replace_module
from storymem.wan.gguf import check_gguf_types, read_gguf_header
from storymem.wan.spec import SPECS
from storymem.weights import Header, check_tensors, check_values, read_header, read_index, read_pickle

# Suffixes of scaled fp8: the factor of a weight; and what matters only where activations are computed in 8 bits too.
_FACTORS = (".scale_weight", ".weight_scale")
_NOT_NEEDED = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")
#: The sentencepiece model that ComfyUI's text encoders carry, as bytes.
TOKENIZER_KEY = "spiece_model"
_PREFIXES = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|text_encoders?\.|vae\.)")
_TIED = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor: files have it under either name, or both
_PICKLED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_T5_PARTS = {  # of a block of Wan's own UMT5 -> of transformers'
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
}
_VAE_PARTS = {
    **{"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"},
    "shortcut": "conv_shortcut",
}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in one or several files, by header.

    Args:
        path: for messages: a file, or the index of several.
        header: of all files together.
        files: name of each tensor -> its file.
    """

    path: Path
    header: Header
    files: Mapping[str, Path]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of ``path``: .safetensors, .pth, .gguf, or an index of .safetensors files.

        Raises:
            FileNotFoundError, FileError: if there is no such file, or it is damaged, incomplete or of another format.
        """
        if path.name.endswith(".index.json"):
            files, header = read_index(path), Header({}, {}, {})
            for file in sorted(set(files.values())):
                part, named = read_header(path.with_name(file)), {name for name, its in files.items() if its == file}
                if differ := sorted(part.shapes.keys() ^ named):
                    verb = "lacks" if differ[0] in named else "has"
                    where = f"{path.with_name(file)} {verb} {differ[0]}, unlike {path.name}"
                    raise FileError(f"{where}: they are of different downloads")
                header.shapes.update(part.shapes)
                header.dtypes.update(part.dtypes)
            return cls(path, header, {name: path.with_name(file) for name, file in files.items()})
        header = _READERS.get(path.suffix, read_header)(path)
        return cls(path, header, dict.fromkeys(header.shapes, path))

    @property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors but the factors of scaled fp8 and what is never read."""
        skipped = (*_FACTORS, *_NOT_NEEDED, TOKENIZER_KEY)
        return {name: shape for name, shape in self.header.shapes.items() if not name.endswith(skipped)}

    @property
    def factors(self) -> dict[str, str]:
        """Name of a weight in scaled fp8 -> name of its factor."""
        return {f"{it.rsplit('.', 1)[0]}.weight": it for it in self.header.shapes if it.endswith(_FACTORS)}

    def readers(self, stack: ExitStack) -> Callable[[str], Tensor]:
        """A function from names to tensors, which are mapped from their files; ``stack`` closes the files."""
        opened: dict[Path, Any] = {}
        for file in sorted(set(self.files.values())):
            pickled = file.suffix in (".pth", ".pt")
            opened[file] = read_pickle(file) if pickled else stack.enter_context(safe_open(file, framework="pt"))

        def read(name: str) -> Tensor:
            source = opened[self.files[name]]
            return source[name] if isinstance(source, dict) else source.get_tensor(name)

        return read

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as they are stored, on the CPU; NotFiniteError if one is NaN or far too large."""
        with ExitStack() as stack:
            read = self.readers(stack)
            found = {name: read(name) for name in names}
        check_values(found.items(), self.path)
        return found


def _pickle_header(path: Path) -> Header:
    state = read_pickle(path)
    plain = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain or any(tensor.layout != torch.strided for tensor in state.values()):
        raise FileError(f"{path} does not contain a state dict (key -> tensor), but a {type(state).__name__}")
    dtypes = {name: _PICKLED.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items()}
    notes = getattr(state, "_metadata", {})  # of modules' state dicts: versions; of ours: as in safetensors
    metadata = {key: value for key, value in notes.items() if isinstance(value, str)}
    return Header({name: tuple(tensor.shape) for name, tensor in state.items()}, dtypes, metadata)


_READERS: dict[str, Callable[[Path], Header]] = {
    **dict.fromkeys((".pth", ".pt"), _pickle_header),
    ".gguf": read_gguf_header,
}


# Names


def names_in(checkpoint: Checkpoint, network: nn.Module) -> dict[str, str]:
    """Name of every weight of ``network`` -> its name in a checkpoint that has exactly these.

    Args:
        network: a ``WanTransformer3DModel``, ``AutoencoderKLWan`` or ``UMT5EncoderModel``, on any device.

    Raises:
        FileError: listing what is missing, unexpected or misshapen, or weights in a form that is not understood.
    """
    path, header, shapes = checkpoint.path, checkpoint.header, checkpoint.numbers
    if path.suffix != ".gguf":
        _check_dtypes(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    ignored = "|".join(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ["$^"])
    plain = {_PREFIXES.sub("", name): name for name in shapes if not re.search(ignored, name)}
    names = max((plain, _CONVERTERS[type(network).__name__](plain)), key=lambda them: len(them.keys() & expected))
    if (tied := next((names[name] for name in _TIED if name in names), None)) and expected.keys() >= set(_TIED):
        names |= dict.fromkeys(_TIED, tied)
    about = _about(shapes, names, type(network).__name__)
    kind = header.metadata.get("general.architecture", "wan")  # of GGUF
    where = str(path) if kind == "wan" else f"{path} (architecture {kind!r})"
    check_tensors(
        {name: shapes[original] for name, original in names.items()},
        expected,
        where=f"{where} does not contain the weights of {about}:",
    )
    if path.suffix == ".gguf":
        check_gguf_types(path, header, names, network)
    return names


def _about(shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], kind: str) -> str:
    """The network, in words; and of a transformer for another task, which."""
    if kind != "WanTransformer3DModel":
        return {"AutoencoderKLWan": "this model's VAE", "UMT5EncoderModel": "this model's text encoder"}[kind]
    shape = shapes.get(names.get("patch_embedding.weight", ""), ())
    found = next((spec.name for spec in SPECS if len(shape) > 1 and spec.in_channels == shape[1]), None)
    return "this model's experts" + (f" ({shape[1]} input channels, as {found})" if found else "")


def _from_vae(names: dict[str, str]) -> dict[str, str]:
    """diffusers' conversion; and of the blocks of Wan2.2's own VAE, which it does not know."""

    def renamed(name: str) -> str:
        nested = re.match(r"(en|de)coder\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)", name)
        if nested is None:
            return name
        coder, block, place, rest = nested.groups()
        direction = "down" if coder == "en" else "up"
        part, _, attribute = rest.rpartition(".")
        inside = f"{direction}sampler.{part}" if "resample" in part or "time_conv" in part else f"resnets.{place}"
        inside += f".{_VAE_PARTS[part]}" if part in _VAE_PARTS else ""
        return f"{coder}coder.{direction}_blocks.{block}.{inside}.{attribute}"

    return convert_wan_vae_to_diffusers({renamed(name): original for name, original in names.items()})


def _from_t5(names: dict[str, str]) -> dict[str, str]:
    renamed = {}
    for name, original in names.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        if block is not None and block[2] in _T5_PARTS:
            name = f"encoder.block.{block[1]}.{_T5_PARTS[block[2]]}.weight"
        outside = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
        renamed[outside.get(name, name)] = original
    return renamed


_CONVERTERS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "WanTransformer3DModel": lambda names: convert_wan_transformer_to_diffusers(dict(names)),
    "AutoencoderKLWan": _from_vae,
    "UMT5EncoderModel": _from_t5,
}


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """Weights must be floating-point numbers, and each in scaled fp8 needs one factor, or one per row."""
    path, header, factors = checkpoint.path, checkpoint.header, checkpoint.factors
    for name, factor in factors.items():
        rows = (*header.shapes.get(name, ()), 0)[0]
        if name not in header.shapes or header.shapes[factor] not in ((), (1,), (rows,), (rows, 1)):
            raise FileError(f"{path}: {factor} is not the factor of a weight, or has not one number per row")
    scaled = bool(factors) or "scaled_fp8" in header.shapes
    for name in checkpoint.numbers:
        dtype = header.dtypes[name]
        if dtype.startswith("F8") and scaled and name not in factors:
            raise FileError(f"{path}: {name} is scaled fp8, and the file has no factor of it: fetch it again")
        if not dtype.startswith(("F", "BF")):
            raise FileError(f"{path}: {name} is {dtype}, and weights are floating-point numbers")


# Loading


def load_network(
    build: Callable[[], nn.Module], checkpoint: Checkpoint, dtype: torch.dtype, *, eight_bits: bool = False
) -> Any:
    """A network with the weights of a checkpoint that :func:`names_in` accepts.

    Args:
        build: makes the network, from its configuration.
        dtype: of its weights; what diffusers keeps in float32 stays in it.
        eight_bits: store all linears of blocks in 8 bits, not only those that are so in the checkpoint.

    Raises:
        NotFiniteError: for weights that are NaN, infinite or too large.
    """
    with init_empty_weights(include_buffers=False):
        network = build().eval()
    names, factors = names_in(checkpoint, network), checkpoint.factors
    # transformers keeps what it names in float32 where the others are in float16; diffusers, in any case.
    by_any = isinstance(network, ModelMixin) or dtype == torch.float16
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if by_any else set()
    small: dict[str, tuple[Tensor, Tensor]] = {}
    parameters: dict[str, nn.Parameter] = {}  # by their names in the file: two weights may be one
    with ExitStack() as stack:
        read = checkpoint.readers(stack)
        for name, original in names.items():
            owner, _, attribute = name.rpartition(".")
            module, tensor = network.get_submodule(owner), read(original)
            factor = read(factors[original]) if original in factors else None
            check_values(
                [(original, tensor), *([] if factor is None else [(factors[original], factor)])], checkpoint.path
            )
            narrow = eight_bits or tensor.element_size() == 1
            if narrow and attribute == "weight" and is_linear_of_a_block(module, owner):
                small[owner] = in_8_bits(tensor, factor)
                continue
            if original not in parameters:
                target = torch.float32 if kept & set(name.split(".")) else dtype
                if factor is not None:  # one for all rows, or one for each
                    tensor = tensor.float() * factor.float().view(-1, *[1] * (tensor.ndim - 1))
                parameters[original] = nn.Parameter(tensor.to(target))
            module.register_parameter(attribute, parameters[original])
    for owner, (weight, factor) in small.items():
        bias = network.get_submodule(owner)._parameters["bias"]
        replace_module(network, owner, ScaledLinear(weight, factor, bias))
    return network
