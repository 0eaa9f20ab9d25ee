"""Scorers: images, clips and texts become embeddings or scores.

- `storymem.scorers.clip.ClipScorer`: image and text embeddings (keyframe selection, aesthetics).
- `storymem.scorers.viclip.ViclipScorer`: clip and text embeddings (prompt following, consistency).
- `QualityScorer`: the protocol of a quality filter; `storymem.scorers.scorer.NoQuality` lets every frame pass.
- `storymem.scorers.aesthetic.AestheticScorer`: LAION aesthetic score, V1 and V2.
- `storymem.scorers.hpsv3.Hpsv3Scorer`: human preference score, version 3.

One contract for all: images are float tensors in 0..1, RGB, [N, 3, H, W] of any size (clips [B, T, 3, H, W]); results
are float32 on the CPU, one row per image, clip or text, embeddings of unit length; without input there are no rows.
Other inputs raise ``ValueError`` (see `storymem.scorers.scorer.check_frames`), NaN in a result ``NotFiniteError``.

A scorer is built by `from_pretrained` (published weights), `from_folder` (a network of any size, of the user's own) or
`from_config` (random weights, the same for the same ``seed``, for tests and trials). They raise ``MissingWeights`` for
what is not on this machine, and ``FileError`` for what is damaged or does not fit. `required_weights` takes the
arguments of `from_pretrained` and lists what that would load.

This module loads no torch, and no scorer is imported before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, nearest
from storymem.weights import Weights, locate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOADS = ".from_pretrained"
_MOVED = {"storymem.scorers.quality.NoQuality": "storymem.scorers.scorer.NoQuality"}  # in films of earlier versions
_PLACEMENT = ("device", "batch_size", "max_batch_pixels")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScorerSettings:
    """The embedder and the quality filter of keyframes, as ``_target_`` nodes; the embedder groups clips too."""

    clip: dict[str, Any]
    quality: dict[str, Any]


class QualityScorer(Protocol):
    """Scores frames. Any class with these members can be the ``_target_`` of ``scorer.quality``.

    Attributes:
        threshold: a frame that scores less is of low quality.
    """

    threshold: float

    def score(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] float in 0..1 -> [N] float32 on the CPU."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """Move the weights, for example off the accelerator between shots."""
        ...


def scorer_weights(node: Any) -> list[Weights]:
    """The published weights that the ``_target_`` nodes at or below ``node`` load; no scorer is loaded."""
    if not isinstance(node, Mapping):
        return []
    found = [weights for below in node.values() for weights in scorer_weights(below)]
    if (target := str(node.get("_target_"))).endswith(_LOADS):
        required = getattr(resolve_name(target.removesuffix(_LOADS)), "required_weights", None)
        if required is not None:  # else it is a user's own scorer
            found += required(**{key: value for key, value in node.items() if key != "_target_"})
    return found


def scorer_bytes(*scorers: Mapping[str, Any]) -> tuple[int, ...]:
    """The size of the published weights of each scorer; those that come with the package count as nothing."""
    return tuple(int(sum(weights.size_gb for weights in scorer_weights(scorer)) * 1e9) for scorer in scorers)


def check_targets(node: Any, key: str) -> None:
    """Check the ``_target_`` nodes at or below ``node``, of scorers or of what has some; no weights are read.

    Raises:
        ValueError: for a class that does not exist, an argument that it does not take or that is missing, and a
            scorer's device, dtype, batch size or threshold that cannot be used.
        MissingWeights: for a scorer's folder that is not on this machine.
    """
    from storymem.scorers.scorer import Scorer, check_placement, check_threshold

    if not isinstance(node, Mapping):
        return
    for name, below in node.items():
        check_targets(below, f"{key}.{name}")
    if "_target_" not in node:
        return
    try:
        call = resolve_name(str(node["_target_"]))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}._target_={node['_target_']} cannot be imported: {error}") from None
    owner = getattr(call, "__self__", call)
    is_scorer = inspect.isclass(owner) and (owner.__module__.startswith(__name__) or issubclass(owner, Scorer))
    # Our constructors pass on what they do not name to the class, and that to the class of all scorers.
    _check_arguments(node, key, call, passed_to=(owner, Scorer) if is_scorer else ())
    if not is_scorer:
        return
    if call.__name__ == "from_folder" and "folder" in node:  # a folder of weights in no other argument of that name
        locate(Weights(name=f"{key}.folder", source=str(node["folder"])))
    try:
        check_placement(**{name: node[name] for name in ("device", "dtype", "batch_size") if name in node})
        check_threshold(node.get("threshold", 0.0))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _check_arguments(node: Mapping[str, Any], key: str, call: Any, *, passed_to: Sequence[Any]) -> None:
    """Raise ``ValueError`` for arguments that neither ``call`` takes, nor, where it passes them on, ``passed_to``."""
    own = [one for one in inspect.signature(call).parameters.values() if one.kind is not one.VAR_POSITIONAL]
    named = {one.name for one in own if one.kind is not one.VAR_KEYWORD}
    passes_on = len(named) < len(own)
    further = (one for each in passed_to for one in inspect.signature(each).parameters.values())
    known = named | {one.name for one in further if passes_on and one.default is not one.empty}
    unknown = [name for name in node if not name.startswith("_") and name not in known]
    if unknown and (passed_to or not passes_on):
        raise ValueError(f"unknown key {key}.{unknown[0]}{nearest(unknown[0], known)}")
    lacking = [one.name for one in own if one.default is one.empty and one.name in named - node.keys()]
    if lacking:
        raise ValueError(f"{key}.{lacking[0]} is missing")


def check_scorers(nodes: Mapping[str, Any]) -> None:
    """As :func:`check_targets`, for the scorers of a film or a preparation, which ``runtime.device`` places."""
    for name, node in nodes.items():
        check_targets(node, f"scorer.{name}")
        if (device := node.get("device", "auto")) != "auto":
            raise ValueError(f"scorer.{name}.device={device}: it runs where runtime.device says; leave it at auto")


def with_defaults(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """All that decides a scorer's results: its ``_target_`` node with defaults, without where and how much at once.

    Keys that a scorer of this package no longer has are left out. A node without a target that exists is unchanged.
    """
    from storymem.scorers.scorer import Scorer

    named = str(node.get("_target_", ""))
    target = _MOVED.get(named, named)
    try:
        call = resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return node
    # A constructor passes on what it does not name to its class, and that to the class of all scorers.
    calls = [Scorer, getattr(call, "__self__", call), call]
    known = {name: one.default for each in calls for name, one in inspect.signature(each).parameters.items()}
    defaults = {name: default for name, default in known.items() if default is not inspect.Parameter.empty}
    is_ours = target.startswith("storymem.")
    given = {name: value for name, value in node.items() if name in known or not is_ours}
    settings = {name: value for name, value in (defaults | given).items() if name not in _PLACEMENT}
    return settings | {"_target_": target}
