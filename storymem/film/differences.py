"""Differences between the settings of films, and what to type where they matter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from storymem.scorers import with_defaults

SIDES = ("model.video.width", "model.video.height")


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each difference between the settings of films, whether or not they list the defaults of scorers."""
    return differences(_settings(before), _settings(after))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value of every setting that decides what a film looks like."""
    scorers = {name: with_defaults(node) for name, node in config.get("scorer", {}).items()}
    return {path: value for path, value in flat({**config, "scorer": scorers}).items() if value not in ({}, [])}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs: ``sampler.steps: 8 before, 40 now``."""
    old, new = flat(before), flat(after)
    words = [{key: repr(value) for key, value in side.items()} for side in (old, new)]
    return [
        f"{key}: {words[0].get(key, 'nothing')} before, {words[1].get(key, 'nothing')} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...)
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value in nested mappings and lists under its path: ``sampler.steps``, ``characters[2].name``."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", item) for number, item in enumerate(value, start=1)]
    else:
        return {path: value}
    return {key: leaf for where, item in items for key, leaf in flat(item, where).items()}


def arguments_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The arguments that bring back the settings ``before``; None if single values do not."""
    old, new = _settings(before), _settings(now)
    keys = [key for key in old.keys() | new.keys() if not key.startswith("weights.")]  # these follow from the others
    changed = sorted(key for key in keys if old.get(key, ...) != new.get(key, ...))
    if any(key not in old or key not in new or "[" in key or isinstance(old[key], list | dict) for key in changed):
        return None
    size = [("size", "x".join(str(old[side]) for side in SIDES))] if set(SIDES) & set(changed) else []
    written = {None: "null", True: "true", False: "false"}
    values = [(key, written[old[key]] if isinstance(old[key], bool | None) else old[key]) for key in changed]
    return shlex.join(f"{key}={value}" for key, value in [*size, *values] if key not in SIDES)
