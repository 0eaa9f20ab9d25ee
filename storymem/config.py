"""Strict, typed configuration: what Hydra composed becomes frozen dataclasses, or an error that says where.

Settings are pydantic dataclasses declared with ``config=STRICT``: unknown keys and wrong types are refused, wherever
they are built. This module and the modules that declare settings load no torch, so that mistakes are told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid")

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names every wrong key."""


def build_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """``values`` (plain containers, as OmegaConf resolves them) as an instance of the settings class ``cls``.

    Raises:
        ConfigError: with a line per unknown key (and its nearest neighbour), missing key or wrong value.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        lines = [_describe(cls, problem) for problem in error.errors()]
        raise ConfigError("the configuration is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or what is known if nothing is near; empty if nothing is known."""
    names = sorted(known)
    if not names:
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(names)}"


def _describe(cls: type, problem: Any) -> str:
    # "[key]" marks that the fault is in a dictionary's key, which stands before it.
    path = [str(part) for part in problem["loc"] if part != "[key]"]
    where = ".".join(path) or "(top level)"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key{nearest(path[-1], _fields_at(cls, path[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: is missing"
    if problem["type"] == "value_error":  # raised by a __post_init__, whose text stands for itself
        return f"{where}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {problem.get('input')!r}"


def _fields_at(cls: Any, path: list[str]) -> list[str]:
    """Names of the settings at ``path`` below the settings class ``cls``."""
    for key in path:
        cls = _settings_class(typing.get_type_hints(cls)[key])
    return [field.name for field in dataclasses.fields(cls)]


def _settings_class(annotation: Any) -> Any:
    """The settings class in ``X`` or ``X | None``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(member for member in typing.get_args(annotation) if dataclasses.is_dataclass(member))
    return annotation
