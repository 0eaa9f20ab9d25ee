"""Composing configurations: the defaults of the settings classes as Hydra knows them, and their reference.

A default stands only in its class: ``defaults: [settings/train, ...]`` in ``configs/train.yaml`` begins with those of
``TrainSettings``, and the file holds what differs.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pkgutil import resolve_name
from typing import Any

from storymem.config import CONFIGS

#: File in ``configs/`` -> its settings class, "module:name", which is imported when it is needed.
SETTINGS = {
    "generate": "storymem.film.settings:GenerateSettings",
    "film": "storymem.film.command:FilmSettings",
    "memory": "storymem.film.memory_command:MemoryEditSettings",
    "write": "storymem.story.writing:WriteSettings",
    "prepare_data": "storymem.data.settings:PrepareSettings",
    "train": "storymem.training.settings:TrainSettings",
    "eval_stbench": "storymem.evaluation.stbench:EvaluateSettings",
    "download": "storymem.commands.download:DownloadSettings",
}
#: The mapping of the choices of ``objective`` to their settings classes; there are no files of them.
OBJECTIVES = "storymem.training.objectives.settings:OBJECTIVES"

_MISSING = "???"
_EVALUATED = ("ablation_", "stbench_")  # beginnings of the names of experiments that are not for training


@cache
def register_defaults(name: str) -> None:
    """Make ``settings/<name>`` available in the defaults list of ``configs/<name>.yaml``.

    For ``train`` also the group ``objective``, whose choices have the shift of the sampler.
    """
    from hydra.core.config_store import ConfigStore

    node = defaults_of(resolve_name(SETTINGS[name]))
    # No folders of Hydra's own.
    node["hydra"] = {"run": {"dir": "."}, "output_subdir": None, "job": {"name": name, "chdir": False}}
    if name == "train":
        del node["objective"]  # its keys are those of the chosen class
        for choice, cls in resolve_name(OBJECTIVES).items():
            target, changed = {"_target_": f"{cls.__module__}.{cls.__qualname__}"}, {"shift": "${sampler.shift}"}
            ConfigStore.instance().store(group="objective", name=choice, node=target | defaults_of(cls) | changed)
    ConfigStore.instance().store(group="settings", name=name, node=node, package="_global_")


def composed(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """``configs/<name>.yaml`` with overrides, as plain containers; inside a run of Hydra too."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    if name in SETTINGS:
        register_defaults(name)
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def defaults_of(settings: type) -> dict[str, Any]:
    """The defaults of a settings class as plain containers; what must be given is ``???``."""
    hints = typing.get_type_hints(settings)
    return {field.name: _default(field, hints[field.name]) for field in dataclasses.fields(settings)}


def _default(field: dataclasses.Field[Any], annotation: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        is_class = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
        return defaults_of(annotation) if is_class else _MISSING
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def groups(name: str) -> dict[str, list[str]]:
    """The groups of ``configs/<name>.yaml``, such as ``memory/recall``: the names of what can be chosen in each."""
    from yaml import safe_load

    entries = safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]
    found: dict[str, list[str]] = {}
    for group in (group for entry in entries if isinstance(entry, dict) for group in entry):
        for path in sorted((CONFIGS / group).rglob("*.yaml"), key=lambda path: (path.parent, path)):
            found.setdefault(path.parent.relative_to(CONFIGS).as_posix(), []).append(path.stem)
        if group == "objective":
            found[group] = sorted(resolve_name(OBJECTIVES))
    if "experiment" in found:
        found["experiment"] = [one for one in found["experiment"] if one.startswith(_EVALUATED) != (name == "train")]
    return found


def check_experiments(name: str, arguments: Iterable[str]) -> None:
    """Raise ``ValueError`` for an experiment of another command: this one has not all of its keys and groups."""
    for key, _, chosen in (argument.partition("=") for argument in arguments):
        if key != "experiment" or not (CONFIGS / key / f"{chosen}.yaml").is_file():
            continue
        if chosen not in (known := groups(name).get(key, [])):
            choices = f"choices of experiment here: {', '.join(known)}" if known else "this one has no experiments"
            raise ValueError(f"experiment={chosen} is of another command; {choices}")


def reference(name: str) -> str:
    """Every group of a command, and every key with its default and its docstring, for ``--help``."""
    settings = resolve_name(SETTINGS[name])
    lines = _described(settings, defaults_of(settings), "")
    texts = (f"  {group}: {', '.join(choices)}" for group, choices in groups(name).items())
    chosen = [textwrap.fill(text, width=112, subsequent_indent=" " * 6, break_on_hyphens=False) for text in texts]
    return "\n".join(
        [
            *(["Groups (write group=choice)", *chosen, ""] if chosen else []),
            "Keys (write key.subkey=value); the chosen files of the groups may set other defaults",
            *lines,
            "",
            "--cfg job prints the whole configuration as it would be used.",
        ]
    )


def _described(settings: type, defaults: dict[str, Any], path: str) -> Iterator[str]:
    hints, texts = typing.get_type_hints(settings), dict[str, str]()
    for cls in reversed(settings.__mro__):
        texts |= arguments_of(cls)
    for name in sorted(defaults, key=lambda name: isinstance(defaults[name], dict)):  # those of nodes last
        value, kinds = defaults[name], (hints[name], *typing.get_args(hints[name]))
        nested: list[Any] = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if nested and isinstance(value, dict):
            for kind in nested:
                yield f"\n{path}{name}: {(kind.__doc__ or '').strip().splitlines()[0]}"
                yield from _described(kind, value if kind is nested[0] else defaults_of(kind), f"{path}{name}.")
            continue
        given = "" if value == _MISSING else f" (default: {_shown(value)})"
        text = textwrap.wrap(f"{texts.get(name, '')}{given}".strip(), width=104, break_long_words=False)
        yield f"  {path}{name}"
        yield from (f"      {line}" for line in text)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(_shown, value)) + "]" if isinstance(value, list | tuple) else str(value)


def arguments_of(cls: type) -> dict[str, str]:
    """Name -> text of the ``Args:`` section of a docstring; "a, b: text" is the text of both."""
    _, _, section = (cls.__doc__ or "").partition("Args:\n")
    section = re.split(r"\n\s*\n", section)[0]
    found: dict[str, str] = {}
    indent = re.match(r" *", section)[0]  # type: ignore[index]
    for entry in re.split(rf"\n?^{indent}(?=\w)", section, flags=re.MULTILINE):
        names, _, text = entry.partition(":")
        for name in filter(None, re.split(r",\s*", names.strip())):
            found[name.strip("`")] = re.sub(r":\w+:(?=`)", "", " ".join(text.split()).replace("``", "`")).replace(
                "`~", "`"
            )
    return found
