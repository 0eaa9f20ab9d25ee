"""The command line as Hydra overrides, in which text needs no quotes.

In Hydra's grammar spaces, brackets, commas, ``=``, ``~``, ``#`` and accented letters are syntax or errors. The settings
classes define which values are text; those are quoted here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from storymem.config import annotation_at, kinds_of

_FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
}
_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.@/-]*)=(.*)", re.DOTALL | re.ASCII)
_DELETION = re.compile(r"~[A-Za-z_][\w.@/-]*", re.ASCII)
_PATHS = re.compile(r"(.*_)?(source|folder|file|path)")  # in nodes whose arguments no settings class declares
_TARGET = "_target_"


def hydra_arguments(arguments: Sequence[str], positional: str | None, settings: type | None = None) -> list[str]:
    """The command line in Hydra's grammar.

    Args:
        arguments: as the user wrote them. ``key=value`` is an override, unless a file of that name exists, or a folder
            whose name does not begin with a setting.
        positional: the key that other arguments stand for: one as itself, several as a list.
        settings: the settings class. Values of its text keys are quoted unless they already are; with ``-m``, commas
            outside quotes separate the values of a sweep.

    An override that sets a ``_target_`` replaces the whole node, with all arguments of the old target.

    Raises:
        ValueError: for a setting that is written as an option, such as ``--seed=3``, or with several values, such as
            ``seed=1,2``, where there is no ``-m``.
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    flags, overrides, found = [], [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or before in _FLAGS_WITH_VALUE:
            if before not in _FLAGS_WITH_VALUE:
                _refuse_dashes(argument, settings)
            flags.append(argument)
        elif positional is None or _is_override(argument, settings):
            overrides.append(_with_text_quoted(argument, settings, sweep=sweep))
        else:
            found.append(argument)
    if len(found) > 1:
        overrides.append(f"{positional}=[{','.join(map(_quoted, found))}]")
    elif found:
        overrides.append(f"{positional}={_quoted(found[0])}")
    return [*flags, *_with_nodes_replaced(overrides)]


def _refuse_dashes(argument: str, settings: type | None) -> None:
    name, _, value = argument.lstrip("-").partition("=")
    key = name.replace("-", "_")
    if settings is not None and annotation_at(settings, key.split(".")) is not None:
        raise ValueError(f"{argument}: settings are written without dashes; write {key}={value or '...'}")


def _is_override(argument: str, settings: type | None) -> bool:
    path = os.path.expanduser(argument)
    if found := _OVERRIDE.fullmatch(argument):
        is_setting = settings is not None and annotation_at(settings, found[2].split(".")) is not None
        return not (os.path.isfile(path) or (os.path.isdir(path) and not is_setting))
    return _DELETION.fullmatch(argument) is not None and not os.path.exists(path)


def _with_text_quoted(override: str, settings: type | None, *, sweep: bool) -> str:
    found = _OVERRIDE.fullmatch(override)
    if found is None:  # a deletion, or nothing that Hydra can read
        return override
    sign, key, value = found.groups()
    is_group = "/" in key or "@" in key
    annotation = Any if settings is None or is_group else annotation_at(settings, key.split("."))
    choices = [choice.strip() for choice in _split(value)] if sweep else [value]
    if len(choices) == 1 and sweep and _is_sweep(value):  # a function, such as choice(a,b)
        return override
    return f"{sign}{key}={','.join(_as_value(choice, annotation, key, settings) for choice in choices)}"


def _refuse_several(key: str, value: str, *, is_list: bool) -> None:
    first, *others = _split(value)
    if others:  # else a function, such as choice(a,b)
        advice = f"a list in brackets, {key}=[{value}]" if is_list else f"one value, such as {key}={first.strip()}"
        raise ValueError(f"{key}={value}: write {advice}")


def _as_value(text: str, annotation: Any, key: str, settings: type | None) -> str:
    """``text`` in Hydra's grammar, for the setting ``key`` with this annotation."""
    kinds = kinds_of(annotation)
    if Any in kinds and _PATHS.fullmatch(key.rpartition(".")[2]):
        kinds = kinds_of(str | None)
    if any(kind in (Any, dict) or dataclasses.is_dataclass(kind) for kind in kinds) and (entries := _entries(text)):
        pairs = ((name, annotation_at(annotation, [name]), value) for name, value in entries.items())
        return "{" + ",".join(f"{name}:{_as_value(value, inner, name, settings)}" for name, inner, value in pairs) + "}"
    if (Any in kinds or tuple in kinds) and (items := _inside(text, "[]")):
        inner = annotation_at(annotation, ["0"])
        return "[" + ",".join(_as_value(item, inner, "", settings) for item in items) + "]"
    if str not in kinds:
        several = _is_sweep(text)
        if several and annotation is not None:
            _refuse_several(key, text, is_list=not kinds.isdisjoint({tuple, dict}))  # dict: a group, such as metrics
        # An unknown key is reported by the composition, before the grammar of its value.
        return _quoted(text) if several is None or (several and annotation is None) else text
    if not text or _is_quoted(text) or (None in kinds and text.lower() == "null"):
        return text
    return _quoted(text, settings)


def _quoted(text: str, settings: type | None = None) -> str:
    """A text as a Hydra value; ``${...}`` stays an interpolation if it names a key of ``settings``."""
    from omegaconf import OmegaConf

    names = re.findall(r"\$\{([^{}]*)\}", text)
    known = [
        OmegaConf.has_resolver(name.split(":")[0])
        if ":" in name
        else settings is not None and annotation_at(settings, name.split(".")) is not None
        for name in names
    ]
    if not all(known) or len(names) != text.count("${"):
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Hydra takes backslashes literally, except those right before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _is_sweep(text: str) -> bool | None:
    """Whether Hydra reads a value as a sweep; None if it cannot parse it."""
    parsed = _parsed(text)
    return None if parsed is None else parsed.is_sweep_override()


def _is_quoted(text: str) -> bool:
    from hydra.core.override_parser.types import QuotedString

    parsed = _parsed(text) if text[0] in "'\"" else None
    return parsed is not None and isinstance(parsed._value, QuotedString)


def _parsed(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except (HydraException, ValueError, RecursionError):  # also a number of thousands of digits, thousands of brackets
        return None


def _entries(text: str) -> dict[str, str] | None:
    """The entries of ``{name: value, ...}``, or None."""
    items = _inside(text, "{}")
    if items is None or not all(":" in item for item in items):
        return None
    return {name.strip(): value.strip() for name, value in (item.split(":", 1) for item in items)}


def _inside(text: str, brackets: str) -> list[str] | None:
    """The items between ``brackets`` that enclose the whole ``text``, or None."""
    text = text.strip()
    if len(text) < 2 or text[0] + text[-1] != brackets or len(_split(text)) > 1 or not text[1:-1].strip():
        return None
    return [item.strip() for item in _split(text[1:-1])]


def _split(text: str) -> list[str]:
    """``text`` at its commas outside brackets and quotes; a quote opens only where a value begins."""
    parts, closing, quote, begins = [""], [], "", True
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and text[place - 1] != "\\" else quote
        elif sign in "'\"" and begins:
            quote = sign
        elif sign in "[{(":
            closing.append({"[": "]", "{": "}", "(": ")"}[sign])
        elif closing and sign == closing[-1]:
            closing.pop()
        elif sign == "," and not closing:
            parts.append("")
            begins = True
            continue
        begins = not quote and (sign in "[{(,:" or (begins and sign == " "))
        parts[-1] += sign
    return parts if not (quote or closing) else [text]


def _with_nodes_replaced(overrides: Sequence[str]) -> list[str]:
    """Overrides in which a node starts empty if its ``_target_`` is set."""
    nodes: dict[str, str] = {}
    spread: list[tuple[str, str]] = []
    for override in overrides:
        found = _OVERRIDE.fullmatch(override)
        sign, key, value = found.groups() if found else ("", "", "")
        entries = _entries(value) or {}
        if _TARGET in entries:
            nodes[key] = sign
            spread += [(f"{key}.{name}", f"{key}.{name}={value}") for name, value in entries.items()]
            continue
        if key.endswith(f".{_TARGET}"):
            nodes[key.removesuffix(f".{_TARGET}")] = sign
        spread.append((key, override))
    inside = tuple(f"{node}." for node in nodes)
    return [
        *(override for key, override in spread if not key.startswith(inside)),
        *(f"{'++' if sign else ''}{node}=null" if "." in node else f"~{node}" for node, sign in nodes.items()),
        *(f"++{override.lstrip('+')}" for key, override in spread if key.startswith(inside)),
    ]
