"""The names LoRA files give to the linears of a Wan transformer, and the check of a file against one.

Three ways of writing ``blocks.0.attn1.to_q`` are in use: the original Wan names (``self_attn.q``, with PEFT's
prefix ``base_model.model.`` in the released adapters and ``diffusion_model.`` in ComfyUI), and diffusers'
own. The converters of diffusers rename what they know and drop the rest with a log line; here every key is
accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from torch import nn

Expert = Literal["high_noise", "low_noise"]
Part = Literal["A", "B", "alpha"]

#: The attribute of a diffusers pipeline that holds each expert; also the prefix of its keys in a file for
#: both.
COMPONENTS: dict[Expert, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}

#: The ten adapted linears of a block: the original Wan name and diffusers' name.
ADAPTED_LINEARS: dict[str, str] = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_ORIGINAL_NAMES = {ours: original for original, ours in ADAPTED_LINEARS.items()}

_PARTS: dict[str, Part] = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_KEY = re.compile(
    r"(?P<prefix>(?:(?P<component>transformer|transformer_2)\.)?(?:base_model\.model\.|diffusion_model\.)?)"
    r"(?P<block>blocks\.\d+)\.(?P<linear>.+?)\."
    r"(?:(?P<matrix>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
_LISTED = 8  # keys named in an error before the rest is only counted


@dataclass(frozen=True, kw_only=True)
class ParsedKey:
    """One key of a LoRA file, read. ``linear`` is diffusers' name, ``written`` the name in the file."""

    key: str
    linear: str
    part: Part
    prefix: str
    component: str | None
    written: str


@dataclass(frozen=True, kw_only=True)
class LinearKeys:
    """The keys of one adapted linear in a file: A [rank, in], B [out, rank] and alpha, a scalar or absent."""

    a: str
    b: str
    alpha: str | None
    rank: int
    written: str


def experts_of(pipe: Any) -> dict[Expert, Any]:
    """The transformers of a pipeline, of which one may be absent; a ``ValueError`` if both are."""
    experts = {expert: getattr(pipe, name, None) for expert, name in COMPONENTS.items()}
    present = {expert: transformer for expert, transformer in experts.items() if transformer is not None}
    if not present:
        raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a transformer_2 to adapt")
    return present


def parse_key(key: str) -> ParsedKey | None:
    """Read one key of a LoRA file in any known layout; ``None`` if it names none of the adapted linears."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    linear = ADAPTED_LINEARS.get(match["linear"], match["linear"])
    if linear not in _ORIGINAL_NAMES:
        return None
    return ParsedKey(
        key=key,
        linear=f"{match['block']}.{linear}",
        part="alpha" if match["alpha"] else _PARTS[match["matrix"]],
        prefix=match["prefix"],
        component=match["component"],
        written=f"{match['block']}.{match['linear']}",
    )


def original_name(linear: str) -> str:
    """The original Wan name of an adapted linear: ``blocks.0.attn1.to_q`` -> ``blocks.0.self_attn.q``."""
    _, block, inside = linear.split(".", 2)
    return f"blocks.{block}.{_ORIGINAL_NAMES[inside]}"


def adapted_linears(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features) of the linears that a memory adapter changes, ten a block."""
    blocks = transformer.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    linears = {}
    for index, inside in product(range(len(blocks)), _ORIGINAL_NAMES):
        # Also right for linears that are quantised or already carry an adapter: both keep these two
        # attributes.
        linear: Any = blocks[index].get_submodule(inside)
        linears[f"blocks.{index}.{inside}"] = (linear.out_features, linear.in_features)
    return linears


def match_keys(
    shapes: Mapping[str, Sequence[int]],
    linears: Mapping[str, tuple[int, int]],
    *,
    where: str,
    component: str | None = None,
) -> dict[str, LinearKeys]:
    """Find the A, B and alpha of every adapted linear in a LoRA file.

    Args:
        shapes: key -> shape, of the whole file.
        linears: name -> (out_features, in_features), from :func:`adapted_linears`.
        where: the file, for the error.
        component: the pipeline component meant, where one file holds both experts under ``transformer.`` and
            ``transformer_2.``; ``None`` if the file is for one expert.

    Raises:
        ValueError: if a key is missing, unexpected, given twice or misshapen; all are counted and the first
            listed.
    """
    parsed = [parse_key(key) for key in shapes]
    unexpected = [key for key, read in zip(shapes, parsed, strict=True) if read is None]
    ours = [read for read in parsed if read is not None and (component is None or read.component == component)]
    unexpected += [read.key for read in ours if read.linear not in linears]
    if component is not None:
        unexpected += [read.key for read in parsed if read is not None and read.component is None]

    found: dict[tuple[str, Part], ParsedKey] = {}
    twice = []
    for read in ours:
        first = found.setdefault((read.linear, read.part), read)
        if first is not read:
            twice.append(f"{first.key} and {read.key}")
    missing = _missing_keys(found, linears, ours, f"{component}." if component else "")
    misshapen = _misshapen_keys(found, linears, shapes)
    problems = {"missing": missing, "unexpected": unexpected, "given twice": twice, "misshapen": misshapen}
    if any(problems.values()):
        raise ValueError(_report(where, problems, linears))
    return {
        linear: LinearKeys(
            a=found[linear, "A"].key,
            b=found[linear, "B"].key,
            alpha=found[linear, "alpha"].key if (linear, "alpha") in found else None,
            rank=int(shapes[found[linear, "A"].key][0]),
            written=found[linear, "A"].written,
        )
        for linear in linears
    }


def _missing_keys(
    found: Mapping[tuple[str, Part], ParsedKey],
    linears: Iterable[str],
    ours: Sequence[ParsedKey],
    usual_prefix: str,
) -> list[str]:
    """The absent keys, spelled as the rest of the file is, so that they can be searched for in it."""
    sample = next((read for read in ours if read.part == "A"), None)
    prefix = usual_prefix if sample is None else sample.prefix
    original = sample is not None and sample.written != sample.linear
    names = ("lora_down", "lora_up") if sample is not None and ".lora_down." in sample.key else ("lora_A", "lora_B")
    parts: tuple[tuple[Part, str], ...] = (("A", names[0]), ("B", names[1]))
    return [
        f"{prefix}{original_name(linear) if original else linear}.{name}.weight"
        for linear in linears
        for part, name in parts
        if (linear, part) not in found
    ]


def _misshapen_keys(
    found: Mapping[tuple[str, Part], ParsedKey],
    linears: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, Sequence[int]],
) -> list[str]:
    wrong = []
    for (linear, part), read in found.items():
        if linear not in linears:
            continue
        out_features, in_features = linears[linear]
        shape = list(shapes[read.key])
        down = found.get((linear, "A"))
        rank: int | str = shapes[down.key][0] if down is not None and len(shapes[down.key]) == 2 else "rank"
        if part == "A" and (len(shape) != 2 or shape[0] < 1 or shape[1] != in_features):
            wrong.append(f"{read.key} is {shape}, not [rank, {in_features}]")
        elif part == "B" and (len(shape) != 2 or shape[0] != out_features or rank not in ("rank", shape[1])):
            wrong.append(f"{read.key} is {shape}, not [{out_features}, {rank}]")
        elif part == "alpha" and shape not in ([], [1]):
            wrong.append(f"{read.key} is {shape}, not one number")
    return wrong


def _report(where: str, problems: Mapping[str, Sequence[str]], linears: Mapping[str, tuple[int, int]]) -> str:
    blocks = len({linear.split(".")[1] for linear in linears})
    lines = [f"{where} does not fit this transformer of {blocks} blocks, {len(linears)} adapted linears:"]
    for kind, keys in problems.items():
        if keys:
            more = [f"... and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
            lines += [f"  {kind} ({len(keys)}):", *(f"    {key}" for key in [*keys[:_LISTED], *more])]
    return "\n".join(lines)
