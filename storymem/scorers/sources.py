"""Which published files a scorer needs, from its ``_target_`` node; loads none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from storymem.weights import Weights

_LOADS = ".from_pretrained"


def scorer_weights(scorer: Mapping[str, Any]) -> list[Weights]:
    """All that a scorer described by a ``_target_`` node loads from published weights; empty for any other."""
    target = str(scorer["_target_"])
    if not target.endswith(_LOADS):
        return []
    module, name = target.removesuffix(_LOADS).rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    if not hasattr(kind, "required_weights"):  # somebody else's scorer
        return []
    return kind.required_weights(**{key: value for key, value in scorer.items() if key != "_target_"})


def scorer_bytes(*scorers: Mapping[str, Any]) -> int:
    """Bytes of the weights of scorers, by the sizes of their files; small ones that come with the package are none."""
    return int(sum(weights.size_gb for scorer in scorers for weights in scorer_weights(scorer)) * 1e9)
