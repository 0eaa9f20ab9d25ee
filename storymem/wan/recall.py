"""Which frames the learned recall of an adapter chooses for a shot; see :mod:`storymem.wan.keyframe_query`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storymem.wan.keyframe_query import KeyframeQuery, choose, embedded, film_positions, mean_scores
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


@torch.no_grad()
def choose_candidates(
    candidates: Candidates,
    queries: Mapping[Expert, KeyframeQuery],
    experts: Mapping[Expert, Any],
    prompt: Tensor,
    caption: Tensor,
    *,
    local: int,
    whole: int,
    device: torch.device,
) -> list[int]:
    """Indices of the chosen candidates, ascending, by the mean scores of the queries given.

    Args:
        queries: on the CPU; on ``device`` while they compute.
        experts: their transformers, for the text embedding.
        prompt, caption: text embeddings [L, D], padded with zeros.
        local, whole: how many frames the two groups of queries choose.
    """
    scores = []
    for expert, query in queries.items():
        latents = torch.cat(list(candidates.latents), dim=1).to(device, torch.float32)
        texts = [embedded(experts[expert], text).to(device) for text in (prompt, caption)]
        found = query.to(device)(latents, film_positions(candidates.frames, candidates.start), *texts)
        scores.append(torch.stack(mean_scores(found, len(query.queries))).cpu())
        query.to("cpu")
    by_local, by_global = torch.stack(scores).mean(dim=0)
    return sorted(choose(by_local, by_global, local=local, whole=whole).tolist())
