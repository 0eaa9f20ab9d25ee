"""Which frames the learned recall of an adapter chooses for a shot; see :mod:`storymem.wan.keyframe_query`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storymem.wan.keyframe_query import KeyframeQuery
from storymem.wan.lora import read_memory_lora
from storymem.wan.settings import Continuity, ModelSettings
from storymem.wan.sources import adapter_weights
from storymem.wan.spec import Expert
from storymem.weights import locate


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Frames of a film among which is chosen for a shot.

    Args:
        latents: normalised one-frame latents [z, 1, h, w] of each.
        frames: place of each in the film, from 0, with all shots as they were generated end to end.
        start: place of the shot's first frame.
        prompt: of the shot.
        caption: of the whole film; the prompt where there is none.
    """

    latents: Sequence[Tensor]
    frames: Sequence[int]
    start: int
    prompt: str
    caption: str


def load_queries(
    model: ModelSettings, experts: Mapping[Expert, Any], *, continuity: Continuity
) -> dict[Expert, KeyframeQuery]:
    """The query of each expert from the files of ``model.adapter``; random without an adapter.

    FileError for files without one.
    """
    if model.adapter is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.seed)
            return {name: KeyframeQuery.of(expert) for name, expert in experts.items()}
    adapters = read_memory_lora(experts, locate(adapter_weights(model.adapter, continuity)))
    return {
        expert: KeyframeQuery.from_tensors(adapter.query(), experts[expert], where=str(adapter.file.path))
        for expert, adapter in adapters.items()
    }
