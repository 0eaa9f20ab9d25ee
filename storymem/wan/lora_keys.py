"""The keys of LoRA files: which module of a Wan transformer each is for, and the check of a file against one.

Every layout in circulation names the same modules: the released adapters by the original names behind PEFT's prefix,
ComfyUI behind its own, DiffSynth without one, kohya's scripts with underscores for dots, diffusers by its own names.
diffusers' converters are not used: they drop the differences of norms and most others (``.diff``), and fail where a
linear is left out. Here every key is accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from storymem.io import FileError
from storymem.wan.names import ADAPTED_LINEARS, original_name
from storymem.weights import listed

Part = Literal["A", "B", "bias", "alpha", "diff", "diff_b"]

_DOWN = ("lora_A", "lora_down", "lora.down")
_KEY = re.compile(
    r"(?P<prefix>(?:(?P<component>transformer|transformer_2)\.)?"
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|pipe\.|dit\.|model\.)*"
    r"(?:lora_unet_+|lora_transformer_+|lycoris_+)?)"
    r"(?P<module>.+?)\."
    r"(?:(?P<matrix>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?!weight$|bias$)[^.]+)?"
    r"\.(?P<kind>weight|bias)|(?P<other>alpha|diff|diff_b|diff_m))"
)
# Adapters of which the low-rank matrices are a part only: without the rest they are another function.
_OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|hada_t|lokr_|oft_|glora|vera_|boft|set_weight")


class ParsedKey(NamedTuple):
    """One key of a LoRA file: what stands before the module, the module as written there, and what of it this is."""

    prefix: str
    component: str | None
    written: str
    part: Part


@dataclass(frozen=True, kw_only=True)
class ModuleKeys:
    """The keys of one module in a file.

    A [rank, in] and B [out, rank], perhaps with a bias of B and an alpha (one number); and differences of its weight
    and its bias, which are added as they are.
    """

    parts: Mapping[Part, str]
    rank: int  # 0 if there are only differences
    prefix: str
    written: str

    @property
    def is_lora(self) -> bool:
        """Whether A and B are there."""
        return "A" in self.parts


class Target(NamedTuple):
    """A part of a transformer that an adapter can change: the shape of its weight, and whether it has a bias."""

    shape: tuple[int, ...]
    has_bias: bool = False


def parse_key(key: str) -> ParsedKey | None:
    """Read one key of a LoRA file in any layout; None if it does not have the form of one."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    written, other = match["module"], match["other"]
    part: Part
    if other == "diff_m":  # of a table of shifts and scales
        written, part = f"{written}.modulation", "diff"
    elif other:
        part = other  # type: ignore[assignment]
    elif match["matrix"] in _DOWN:
        if match["kind"] == "bias":
            return None
        part = "A"
    else:
        part = "B" if match["kind"] == "weight" else "bias"
    return ParsedKey(match["prefix"], match["component"], written, part)


def adapted_linears(transformer: nn.Module) -> list[str]:
    """Names of the linears that a memory adapter changes, ten a block."""
    blocks = transformer.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    return [f"blocks.{index}.{inside}" for index, inside in product(range(len(blocks)), ADAPTED_LINEARS.values())]


def targets_of(transformer: nn.Module) -> dict[str, Target]:
    """Name -> target, of all that a transformer computes with, whether it carries adapters or not."""
    found: dict[str, Target] = {}
    for name, module in transformer.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        base: Any = getattr(module, "base_layer", module)
        table, weight = getattr(base, "scale_shift_table", None), base._parameters.get("weight")
        if isinstance(table, Tensor):
            found[f"{name}.scale_shift_table".lstrip(".")] = Target(tuple(table.shape))
        if hasattr(base, "out_features"):  # quantised weights have another shape
            found[name] = Target((base.out_features, base.in_features), base.bias is not None)
        elif weight is not None:
            found[name] = Target(tuple(weight.shape), getattr(base, "bias", None) is not None)
    return found


def match_keys(
    shapes: Mapping[str, Sequence[int]],
    transformer: nn.Module,
    *,
    where: str,
    component: str | None = None,
    strict: bool = True,
) -> tuple[dict[str, ModuleKeys], list[str]]:
    """Find the keys of every module in a LoRA file.

    Args:
        shapes: key -> shape, of the whole file.
        transformer: what they must fit.
        where: the file, for the error.
        component: the pipeline component meant, where one file holds both experts under ``transformer.`` and
            ``transformer_2.``; ``None`` if the file is for one expert.
        strict: whether A and B of every linear of a memory adapter must be there, and nothing else.

    Returns:
        diffusers' name -> keys, and the keys that are for no part of this network (none if ``strict``).

    Raises:
        ValueError: if a key is missing, given twice or misshapen, or unexpected where ``strict``; if nothing fits; all
            are counted and the first listed.
    """
    if foreign := [key for key in shapes if _OTHER_KINDS.search(key)]:
        raise FileError(listed(f"{where} is not a plain LoRA, the only kind of adapter read:", {"unexpected": foreign}))
    targets, linears = targets_of(transformer), adapted_linears(transformer)
    spelled = _spellings(linears if strict else targets)
    found: dict[str, dict[Part, str]] = {}
    written: dict[str, ParsedKey] = {}
    unread, twice = [], []
    for key in shapes:
        read = parse_key(key)
        if read is not None and component not in (None, read.component):
            unread += [key] if read.component is None else []  # else it is the other expert's
            continue
        name = spelled.get(read.written) if read is not None else None
        if read is None or name is None or not _can_have(targets[name], read.part, strict):
            unread.append(key)
            continue
        parts = found.setdefault(name, {})
        written.setdefault(name, read)
        if (first := parts.setdefault(read.part, key)) != key:
            twice.append(f"{first} and {key}")
    for name, parts in list(found.items()):
        if parts.keys() == {"alpha"}:
            unread += found.pop(name).values()
    problems = {
        "missing": _missing_keys(found, linears if strict else [], written, component),
        "unexpected": unread if strict else [],
        "given twice": twice,
        "misshapen": [wrong for name, parts in found.items() for wrong in _misshapen(parts, targets[name], shapes)],
    }
    if any(problems.values()):
        blocks = len({name.split(".")[1] for name in linears})
        title = f"{where} does not fit this transformer of {blocks} blocks, {len(linears)} adapted linears:"
        raise FileError(listed(title, problems))
    if not found:
        raise FileError(listed(f"{where} holds nothing for this transformer:", {"not read": unread}))
    return {
        name: ModuleKeys(
            parts=found[name],
            rank=int(shapes[found[name]["A"]][0]) if "A" in found[name] else 0,
            prefix=written[name].prefix,
            written=written[name].written,
        )
        for name in targets
        if name in found
    }, unread


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Every way of writing a part's name -> diffusers' name."""
    ways = {way: name for name in names for way in (name, original_name(name))}
    return {way.replace(".", "_"): name for way, name in ways.items()} | ways


def _can_have(target: Target, part: Part, strict: bool) -> bool:
    """Whether an adapter's file may hold such a part for a module."""
    if strict:
        return part in ("A", "B", "alpha")
    return target.has_bias or part not in ("bias", "diff_b")


def _missing_keys(
    found: Mapping[str, Mapping[Part, str]],
    wanted: Iterable[str],
    written: Mapping[str, ParsedKey],
    component: str | None,
) -> list[str]:
    """The absent keys, spelled as the rest of the file is, so that they can be searched for in it."""
    some = next((name for name, parts in found.items() if "A" in parts), None)
    prefix = written[some].prefix if some else f"{component}." if component else ""
    original = some is not None and written[some].written != some
    down = some is not None and ".lora_down." in found[some]["A"]
    spelled: dict[Part, str] = {"A": "lora_down", "B": "lora_up"} if down else {"A": "lora_A", "B": "lora_B"}
    halves = [name for name, parts in found.items() if parts.keys() & {"A", "B", "bias"}]

    def as_written(name: str) -> str:
        spelled = original_name(name) if original else name
        return prefix + (spelled.replace(".", "_") if prefix.endswith("_") else spelled)

    return [
        f"{as_written(name)}.{matrix}.weight"
        for name in dict.fromkeys([*wanted, *halves])
        for part, matrix in spelled.items()
        if part not in found.get(name, {})
    ]


def _misshapen(parts: Mapping[Part, str], target: Target, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong with the shapes of one module's keys."""
    out, *inside = target.shape
    down = list(shapes[parts["A"]]) if "A" in parts else []
    rank = down[0] if down and down[0] > 0 else "rank"
    right: dict[Part, list[Any]] = {
        "A": [rank, *inside],
        "B": [out, rank, *[1] * (len(inside) - 1)],  # ones: of a convolution
        "bias": [out],
        "alpha": [],
        "diff": [out, *inside],
        "diff_b": [out],
    }
    wrong = []
    for part, key in parts.items():
        shape, wanted = list(shapes[key]), right[part]
        if shape != wanted and (part, shape) != ("alpha", [1]) and not (part == "B" and not down):
            if part == "A":
                wanted = ["rank", *inside]
            said = "one number" if part == "alpha" else f"[{', '.join(map(str, wanted))}]"
            wrong.append(f"{key} is {shape}, not {said}")
    return wrong
