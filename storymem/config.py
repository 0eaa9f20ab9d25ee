"""Strict, typed configuration: what Hydra composed becomes frozen dataclasses, or an error that names the keys.

Settings are pydantic dataclasses declared with ``config=STRICT``: unknown keys and wrong types are refused, wherever
they are built. This module and the modules that declare settings load no torch, so that errors are reported quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

PACKAGE = Path(__file__).resolve().parent
#: The folder of configs/, examples/ and st_bench/: the installed package, or the root of a checkout.
SHARED = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
CONFIGS = SHARED / "configs"

T = TypeVar("T")

_PLAINER = {
    "tuple_type": "input should be a list",
    "dict_type": "input should be keys with values",
    "dataclass_type": "input should be keys with values",
}
_LISTED = 24  # known names in an error before the rest is only counted


def _user_path(path: str) -> str:
    if not path.strip():
        raise ValueError("is empty; write a path")
    if "\0" in path:
        raise ValueError("holds a NUL character, which no path can")
    return os.path.expanduser(path)


#: A path that a user writes: ``~`` is the home folder; not empty.
UserPath = Annotated[str, AfterValidator(_user_path)]


def _story_path(path: str) -> str:
    shipped = os.path.join(SHARED, path := _user_path(path))
    return shipped if os.path.exists(shipped) and not os.path.exists(path) else path


#: A path to stories; ``examples/...`` and ``st_bench/...`` that do not exist here are those of the package.
StoryPath = Annotated[str, AfterValidator(_story_path)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names every wrong key.

    Attributes:
        lines: one for each wrong key, beginning with its name.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("the configuration is not valid:\n" + "\n".join(f"  {line}" for line in lines))
        self.lines = tuple(lines)


def build_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """``values`` (plain containers, as OmegaConf resolves them) as an instance of the settings class ``cls``.

    Raises:
        ConfigError: with a line per unknown key (and its nearest neighbour), missing key or wrong value.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError([line for problem in _informative(error) for line in _describe(cls, problem)]) from None


def _informative(error: ValidationError) -> list[Any]:
    """The problems; where a value has the type of one member of a union, without those of the other members."""
    problems = [(_path(problem), problem) for problem in error.errors()]
    checked = [path for path, problem in problems if problem["type"] == "value_error"]
    return [problem for path, problem in problems if path not in checked or problem["type"] == "value_error"]


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that is most like ``name``, in any letter case; None if none is as like as ``cutoff``."""
    by_lower = {one.lower(): one for one in sorted(known)}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing if nothing is like ``name``."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or what is known if nothing is like ``name``; empty if nothing is known."""
    names = sorted(known)
    if not names:
        return ""
    return did_you_mean(name, names) or f"; known are: {first_of(names, _LISTED)}"


def first_of(names: Sequence[str], count: int) -> str:
    """The first ``count`` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def check_bounds(settings: object, **bounds: tuple[float, float]) -> None:
    """Raise ``ValueError`` for the first setting outside its lowest and highest value; one that is None passes."""
    for name, (lowest, highest) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not lowest <= value <= highest:
            bound = f"{lowest:.10g} or more" if value < lowest else f"{highest:.10g} or less"
            raise ValueError(f"{name} must be {bound}, not {value}")


def _describe(cls: type, problem: Any) -> list[str]:
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # of a node whose class is chosen by its `_target_`
        return [".".join([*map(str, problem["loc"]), line]) for line in inner.lines]
    return [_described(cls, problem)]


def _path(problem: Any) -> list[str]:
    # "[key]" marks that the fault is in a dictionary's key, which stands before it; "dict[str,str]" a union's member.
    return [str(part) for part in problem["loc"] if "[" not in str(part)]


def _described(cls: type, problem: Any) -> str:
    path = _path(problem)
    where = ".".join(path) or "(top level)"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key{nearest(path[-1], _fields_at(cls, path[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: is missing"
    if problem["type"] == "value_error":  # raised by a __post_init__ with a complete message
        return f"{where}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    expected = _PLAINER.get(problem["type"], problem["msg"][:1].lower() + problem["msg"][1:].split(", unable")[0])
    given = problem.get("input")
    wrong = f"{where}: {expected}, not {reprlib.repr(given)}"
    return f"{wrong}{_advice(cls, problem['type'], path, given)}" if path else wrong


def _advice(cls: type, kind: str, path: list[str], given: object) -> str:
    if kind == "tuple_type":
        plain = not isinstance(given, Mapping) and not _fields_at(cls, [*path, "0"])
        return f"; write {'.'.join(path)}=[{given if plain else '...'}]"
    if kind == "dataclass_type" and (keys := _fields_at(cls, path)):
        return f"; its keys are {', '.join(keys)}"
    is_group = kind in _PLAINER and CONFIGS.joinpath(*path).is_dir()
    return f"; write {'/'.join(path)}=NAME to choose a file by its name" if is_group else ""


def annotation_at(annotation: Any, path: Sequence[str]) -> Any:
    """The annotation of the setting at ``path`` below a settings class; Any where it is free, None where there is none.

    In tuples and mappings of free keys, every key stands for an element.
    """
    for key in path:
        annotation = next((found for kind in _members(annotation) if (found := _inner(kind, key)) is not None), None)
    return annotation


def kinds_of(annotation: Any) -> set[Any]:
    """What a value may be: the classes in a union, without their arguments; None for ``None``."""
    kinds = {typing.get_origin(member) or member for member in _members(annotation)}
    return {None if kind is type(None) else kind for kind in kinds}


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _inner(kind: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind).get(key)
    if kind is Any:
        return Any
    arguments = typing.get_args(kind)
    return {dict: arguments[-1:], tuple: arguments[:1]}.get(typing.get_origin(kind), (None,))[0]


def _fields_at(cls: Any, path: list[str]) -> list[str]:
    """Names of the settings at ``path`` below the settings class ``cls``."""
    classes = [kind for kind in _members(annotation_at(cls, path)) if dataclasses.is_dataclass(kind)]
    return [field.name for kind in classes for field in dataclasses.fields(kind)]
