"""Memento's learned recall (arXiv 2606.14667): a small network that scores frames for the coming shot.

Two groups of learned queries read a text each, then the frames: local ones the prompt, global ones the caption of the
whole film. A frame's score is its mean attention weight before the softmax. Each expert has its own network, and its
files hold it beside the LoRA::

    base_model.model.keyframe_query.queries                      [local queries, D]
    base_model.model.keyframe_query.queries_global               [global queries, D]
    base_model.model.keyframe_query.memory_patcher.{weight,bias} Conv3d(z, D, (1, 2, 2))
    base_model.model.keyframe_query.query_to_{text,visual}.{q,k,v,o}.{weight,bias}, .norm_{q,k}.weight

Letters: P frames of the pool, Q queries, K chosen frames, L text tokens, D the transformer's width, z latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from storymem.wan.transformer import SegmentRope, rotated
from storymem.weights import check_tensors

#: Queries of the published network.
LOCAL_QUERIES, GLOBAL_QUERIES = 10, 2
#: How many frames each group chooses, as published.
SELECT_LOCAL, SELECT_GLOBAL = 6, 2
#: Of the softmax through which gradients reach the scores.
TEMPERATURE = 0.1
_EPS = 1e-6
_FARTHEST = 512  # latent frames, before and after the shot


def film_positions(frames: Sequence[int], start: int) -> tuple[int, ...]:
    """Temporal positions of frames, relative to the shot: ``f // 4 - n // 4``, within -512 .. 511.

    Args:
        frames: place of each in the film, from 0, where all shots are generated end to end.
        start: n, the place of the shot's first frame.
    """
    return tuple(min(max(frame // 4 - start // 4, -_FARTHEST), _FARTHEST - 1) for frame in frames)


def mean_scores(scores: Tensor, local_queries: int) -> tuple[Tensor, Tensor]:
    """The mean of scores [Q, P] over the local queries, which are the first, and over the global ones: [P] each."""
    return scores[:local_queries].mean(dim=0), scores[local_queries:].mean(dim=0)


def choose(by_local: Tensor, by_global: Tensor, *, local: int = SELECT_LOCAL, whole: int = SELECT_GLOBAL) -> Tensor:
    """Indices [K] of the chosen frames: ``local`` by falling local score, then ``whole`` of the others by global score.

    With P <= local + whole all frames are chosen, in order.

    Args:
        by_local, by_global: [P]; see :func:`mean_scores`.
    """
    if len(by_local) <= local + whole:
        return torch.arange(len(by_local), device=by_local.device)
    first = by_local.topk(local).indices
    return torch.cat([first, by_global.index_fill(0, first, -math.inf).topk(whole).indices])


def straight_through(
    by_local: Tensor, by_global: Tensor, *, local: int = SELECT_LOCAL, whole: int = SELECT_GLOBAL
) -> Tensor:
    """Rows [K, P] with 1 at each frame of :func:`choose`, through which gradients reach the scores.

    The value is ``1 - stopgrad(pi) + pi`` with pi = softmax(score / 0.1) at that frame; for the global queries the
    softmax is over the frames that the local ones did not choose. Where all frames are chosen there is no gradient.
    """
    index = choose(by_local.detach(), by_global.detach(), local=local, whole=whole)
    rows = F.one_hot(index, len(by_local)).to(by_local.dtype)
    if len(by_local) <= local + whole:
        return rows
    others = by_global.index_fill(0, index[:local], -math.inf)
    each = [(by_local / TEMPERATURE).softmax(0).expand(local, -1), (others / TEMPERATURE).softmax(0).expand(whole, -1)]
    pi = torch.cat(each).gather(1, index[:, None])
    return rows * (1 - pi.detach() + pi)


class _Attention(nn.Module):
    """Wan's attention layer under its original names."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=_EPS), nn.RMSNorm(dim, eps=_EPS)

    def forward(self, queries: Tensor, seen: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[Q, D] of queries [Q, D] and tokens [N, D]; ``rope`` rotates the keys."""
        query, key = self.split(self.norm_q(self.q(queries))), self.split(self.norm_k(self.k(seen)))
        if rope is not None:
            key = rotated(key, *rope)
        query, key, value = (part.transpose(1, 2) for part in (query, key, self.split(self.v(seen))))
        return self.o(rearrange(F.scaled_dot_product_attention(query, key, value), "1 h q d -> q (h d)"))

    def split(self, tokens: Tensor) -> Tensor:
        """[N, D] -> [1, N, heads, D / heads]."""
        return tokens[None].unflatten(-1, (self.heads, -1))


class KeyframeQuery(nn.Module):
    """Scores frames for a shot; see the module.

    Args:
        dim: D.
        heads: of the transformer.
        channels: z.
        local: queries that read the prompt.
        whole: queries that read the caption of the whole film.
        patch: (1, height, width) of a token, in latent pixels.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        channels: int = 16,
        local: int = LOCAL_QUERIES,
        whole: int = GLOBAL_QUERIES,
        patch: tuple[int, int, int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(local, dim) / math.sqrt(dim))
        self.queries_global = nn.Parameter(torch.randn(whole, dim) / math.sqrt(dim))
        self.memory_patcher = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)
        self.query_to_text, self.query_to_visual = _Attention(dim, heads), _Attention(dim, heads)
        self.rope = SegmentRope(dim // heads, patch, 2 * _FARTHEST)

    @classmethod
    def of(cls, transformer: Any, *, local: int = LOCAL_QUERIES, whole: int = GLOBAL_QUERIES) -> Self:
        """A network with random weights for an expert, a ``WanTransformer3DModel``."""
        config = transformer.config
        return cls(
            dim=config.num_attention_heads * config.attention_head_dim,
            heads=config.num_attention_heads,
            channels=config.out_channels,
            local=local,
            whole=whole,
            patch=tuple(config.patch_size),
        )

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], transformer: Any, *, where: str) -> KeyframeQuery:
        """The network of ``tensors`` (names without ``keyframe_query.``) for an expert; float32.

        The number of queries is that of the tensors. ``FileError``, which begins with ``where``, if anything is
        missing, unexpected or of another shape.
        """
        network = check_query({name: tensor.shape for name, tensor in tensors.items()}, transformer, where=where)
        network.rope = SegmentRope(network.rope.attention_head_dim, network.rope.patch_size, 2 * _FARTHEST)
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return network

    def forward(self, latents: Tensor, positions: Sequence[int], prompt: Tensor, caption: Tensor) -> Tensor:
        """Scores [Q, P]: the mean over heads and the frame's tokens of (W_q q) (RoPE W_k K) / sqrt(d), without norms.

        Args:
            latents: clean [z, P, h, w], each frame encoded alone.
            positions: of the frames; see :func:`film_positions`.
            prompt: [L, D], the prompt after the expert's text embedding, with padding; see :func:`embedded`.
            caption: [L, D], likewise the caption of the whole film; the prompt where there is none.
        """
        tokens = rearrange(self.memory_patcher(latents[None]), "1 d p h w -> (p h w) d")
        rope = self.rope(latents[None], tuple(positions))
        read = self.query_to_text
        queries = torch.cat([q + read(q, text) for q, text in ((self.queries, prompt), (self.queries_global, caption))])
        visual = self.query_to_visual
        queries = queries + visual(queries, tokens, rope)
        query, key = visual.split(visual.q(queries)), rotated(visual.split(visual.k(tokens)), *rope)
        # The mean over tokens and heads of a product is the product with the mean over tokens.
        by_frame = key.unflatten(1, (latents.shape[1], -1)).mean(dim=2)
        scale = visual.heads * math.sqrt(query.shape[-1])
        return torch.einsum("bqhd,bphd->qp", query, by_frame) / scale


def add_query(transformer: Any, *, seed: int) -> None:
    """Give an expert a query to train, its ``keyframe_query``; at first it embeds patches as the expert does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        query = KeyframeQuery.of(transformer)
    own, patches = query.memory_patcher, transformer.patch_embedding
    with torch.no_grad():
        own.load_state_dict({"weight": patches.weight[:, : own.in_channels], "bias": patches.bias})
    transformer.keyframe_query = query


def embedded(transformer: Any, text: Tensor) -> Tensor:
    """[L, D], float32: text embeddings [L, text_dim], zero-padded, after the text embedding of an expert."""
    embedder = transformer.condition_embedder.text_embedder
    weight = next(embedder.parameters())
    return embedder(text.to(weight.device, weight.dtype)).float()


def check_query(shapes: Mapping[str, Sequence[int]], transformer: Any, *, where: str) -> KeyframeQuery:
    """The network for ``transformer`` with these shapes, on the meta device; or ``FileError``, with ``where`` first."""
    counts = [(list(shapes.get(name, [])) or [1])[0] for name in ("queries", "queries_global")]
    with torch.device("meta"):
        network = KeyframeQuery.of(transformer, local=counts[0], whole=counts[1])
    check_tensors(shapes, {name: tensor.shape for name, tensor in network.state_dict().items()}, where=where)
    return network
