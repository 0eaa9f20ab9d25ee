"""Which frames the learned recall of an adapter chooses for a shot; see :mod:`storymem.wan.keyframe_query`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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


class LearnedRecall:
    """The KeyframeQuery of each expert; on the CPU, and on ``device`` while it computes.

    Args:
        queries: by expert.
        experts: their transformers, for the text embedding.
        device: of the computation.
    """

    def __init__(self, queries: Mapping[Expert, KeyframeQuery], experts: Mapping[Expert, Any], device: Any) -> None:
        self.queries, self.experts, self.device = dict(queries), experts, device

    @classmethod
    def of(cls, model: ModelSettings, experts: Mapping[Expert, Any], *, continuity: Continuity, device: Any) -> Self:
        """That of the files of ``model.adapter``; random without an adapter. FileError for files without one."""
        if model.adapter is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(model.seed)
                return cls({name: KeyframeQuery.of(expert) for name, expert in experts.items()}, experts, device)
        adapters = read_memory_lora(experts, locate(adapter_weights(model.adapter, continuity)))
        queries = {
            expert: KeyframeQuery.from_tensors(adapter.query(), experts[expert], where=str(adapter.file.path))
            for expert, adapter in adapters.items()
        }
        return cls(queries, experts, device)

    @torch.no_grad()
    def scores(self, expert: Expert, candidates: Candidates, prompt: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global scores [P] of the candidates; see :func:`storymem.wan.keyframe_query.mean_scores`.

        Args:
            prompt, caption: text embeddings [L, D], padded with zeros.
        """
        query, transformer = self.queries[expert].to(self.device), self.experts[expert]
        latents = torch.cat(list(candidates.latents), dim=1).to(self.device, torch.float32)
        texts = [embedded(transformer, text).to(self.device) for text in (prompt, caption)]
        found = query(latents, film_positions(candidates.frames, candidates.start), *texts)
        query.to("cpu")
        by_local, by_global = mean_scores(found, len(query.queries))
        return by_local.cpu(), by_global.cpu()

    def choose(
        self,
        candidates: Candidates,
        prompt: Tensor,
        caption: Tensor,
        *,
        local: int,
        whole: int,
        expert: Expert | None = None,
    ) -> list[int]:
        """Indices of the chosen candidates, ascending.

        Args:
            local, whole: how many frames the two groups of queries choose.
            expert: whose scores decide; None: the mean of all experts, for a memory that they share.
        """
        own = list(self.queries) if expert is None else [expert]
        by_local, by_global = zip(*(self.scores(one, candidates, prompt, caption) for one in own), strict=True)
        means = (torch.stack(each).mean(dim=0) for each in (by_local, by_global))
        return sorted(choose(*means, local=local, whole=whole).tolist())
