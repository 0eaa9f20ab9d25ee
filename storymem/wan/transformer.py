"""Wan's transformer over a sequence of segments; see :mod:`storymem.wan.segments`.

The network is diffusers' ``WanTransformer3DModel``: class, weights and blocks are unchanged. :func:`enable_layouts`
gives it the forward below, which takes a layout and keeps no state between calls. The attention processors get what
they need through the block's own arguments: :class:`SelfReads` as the rotary tables, :class:`TextReads` as the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MethodType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed, _get_qkv_projections
from diffusers.utils import apply_lora_scale
from einops import rearrange
from torch import Tensor

from storymem.wan.segments import Keys, Layout, Segment, Text, name_of, single_shot

KeysAndValues = tuple[Tensor, Tensor]  # each [1 or B, tokens, heads, head_dim]
T = TypeVar("T")


class Run(NamedTuple, Generic[T]):
    """Tokens [start, stop) of a forward's own sequence, or of a cached segment, and what is stated of them."""

    start: int
    stop: int
    what: T


Piece = Run[str | None]  # keys: the name of the cached segment that has them, or None for the forward's own
SelfQuery = Run[tuple[tuple[Piece, ...], ...]]  # queries: the key sets that they read
TextQuery = Run[Text | None]  # queries: the text that they read


class Plan(NamedTuple):
    """A layout in tokens of this process; without queries all tokens read all, as in Wan, and nothing is cached."""

    self_queries: tuple[SelfQuery, ...]
    text_queries: tuple[TextQuery, ...]
    tokens: tuple[int, ...]  # of each computed segment
    to_cache: tuple[Run[str], ...]  # constant segments, by name


class BlockCache:
    """Keys and values of one block by segment; a class of its own, so that hooks pass it on as it is."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self.segments: dict[str, KeysAndValues] = {}

    def add(self, name: str, key: Tensor, value: Tensor) -> None:
        """Cache keys and values [B, tokens, heads, head_dim], without the larger tensors that they may be parts of."""
        self.segments[name] = (self._copy(key), self._copy(value))

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.on_cpu:  # page-locked where that makes the way back faster
            pinned = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            return copy.copy_(tensor, non_blocking=pinned)
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class SelfReads(NamedTuple):
    """For a block's self-attention: rotary tables ``cos`` and ``sin`` [1, tokens, 1, D], and what each query reads."""

    cos: Tensor
    sin: Tensor
    queries: tuple[SelfQuery, ...]
    cache: BlockCache
    to_cache: tuple[Run[str], ...]


class TextReads(NamedTuple):
    """For a block's cross-attention: texts [B, L, dim] by name, and what each query reads."""

    texts: dict[str, Tensor]
    queries: tuple[TextQuery, ...]


class SegmentCache:
    """Keys and values of constant segments, per block, for the steps of one shot.

    Args:
        on_cpu: keep them in RAM and copy them to the device block by block.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self.names: frozenset[str] = frozenset()  # segments that every block has
        self._blocks: dict[int, BlockCache] = {}

    def block(self, index: int) -> BlockCache:
        """The cache of one block."""
        return self._blocks.setdefault(index, BlockCache(on_cpu=self.on_cpu))


class SegmentRope(WanRotaryPosEmbed):
    """Wan's rotary tables at any temporal positions, also negative ones; height and width are as in Wan."""

    def forward(
        self, hidden_states: Tensor, positions: tuple[int, ...] | None = None, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [1, tokens, 1, head_dim], for latents [B, C, N, h, w].

        Args:
            positions: of the N / p_t latent frames; None: 0, 1, ...
            order: [tokens], indices that reorder the tokens.
        """
        cos, sin = super().forward(hidden_states)
        frames = hidden_states.shape[2] // self.patch_size[0]
        if positions is not None and positions != tuple(range(frames)):
            self.check_positions(positions)
            index = torch.tensor(positions, device=cos.device)
            # The table holds 0, 1, ...: cos(-x) = cos(x) and sin(-x) = -sin(x) give the negative positions.
            time_cos = self.freqs_cos[index.abs(), : self.t_dim]
            time_sin = self.freqs_sin[index.abs(), : self.t_dim] * index.sign().unsqueeze(1)
            cos, sin = self._at(cos, time_cos, frames), self._at(sin, time_sin, frames)
        return (cos, sin) if order is None else (cos[:, order], sin[:, order])

    def check_positions(self, positions: tuple[int, ...]) -> None:
        """Raise ``ValueError`` for a position outside the model's table."""
        far = max(positions, key=abs, default=0)
        if abs(far) >= self.max_seq_len:
            raise ValueError(
                f"{len(positions)} frames reach position {far}; this model's table ends at {self.max_seq_len - 1}: use "
                "fewer memory frames or a smaller RoPE stride"
            )

    def _at(self, table: Tensor, time: Tensor, frames: int) -> Tensor:
        """``table`` [1, frames * n, 1, D] with its temporal channels replaced by ``time`` [frames, t_dim]."""
        by_frame = table.unflatten(1, (frames, -1))
        time = time.to(table.dtype)[None, :, None, None, :].expand(*by_frame.shape[:-1], -1)
        return torch.cat([time, by_frame[..., self.t_dim :]], dim=-1).flatten(1, 2)


class ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous.

    PyTorch builds cuDNN's attention backward for the strides of a gradient, and runs it again for all queries, keys and
    values of the same shapes and strides, whatever the strides of their gradients are then: it would read other memory.
    """

    @staticmethod
    def forward(_ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class SegmentAttnProcessor(WanAttnProcessor):
    """Wan's attention, in which each segment's queries read what the layout states; plain inputs give Wan's own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | TextReads | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | SelfReads | None = None,
    ) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        if isinstance(encoder_hidden_states, TextReads):
            return self._read_texts(attn, hidden_states, encoder_hidden_states)
        if isinstance(rotary_emb, SelfReads):
            if rotary_emb.queries:
                return self._read_segments(attn, hidden_states, rotary_emb)
            rotary_emb = rotary_emb[:2]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def projected(self, attn: Any, hidden_states: Tensor, reads: SelfReads) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with rotary positions, and values, each [B, tokens, heads, head_dim]."""
        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1)) for projected in (attn.norm_q(query), attn.norm_k(key), value)
        )
        return rotated(query, reads.cos, reads.sin), rotated(key, reads.cos, reads.sin), value

    def _read_segments(self, attn: Any, hidden_states: Tensor, reads: SelfReads) -> Tensor:
        query, key, value = self.projected(attn, hidden_states, reads)
        for start, stop, name in reads.to_cache:
            reads.cache.add(name, key[:, start:stop], value[:, start:stop])
        outputs = []
        for start, stop, sets in reads.queries:
            results = [
                dispatch_attention_fn(
                    query[:, start:stop],
                    _gathered(key, reads.cache, pieces, 0),
                    _gathered(value, reads.cache, pieces, 1),
                    backend=self._attention_backend,
                    parallel_config=self._parallel_config,
                )
                for pieces in sets
            ]
            if torch.is_grad_enabled():
                results = [ContiguousGradient.apply(result) for result in results]
            outputs.append(results[0] if len(results) == 1 else torch.stack(results).mean(dim=0))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _read_texts(self, attn: Any, hidden_states: Tensor, reads: TextReads) -> Tensor:
        outputs = []
        for start, stop, text in reads.queries:
            queries = hidden_states[:, start:stop]
            if text is None:
                outputs.append(torch.zeros_like(queries))
                continue
            tokens = reads.texts[text.name]
            if text.spans is not None:
                if text.spans[-1][1] > tokens.shape[1]:
                    raise ValueError(
                        f"the text {text.name!r} has {tokens.shape[1]} tokens; the layout reads {text.spans}"
                    )
                tokens = torch.cat([tokens[:, first:last] for first, last in text.spans], dim=1)
            outputs.append(super().__call__(attn, queries, tokens))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def enable_layouts(transformer: WanTransformer3DModel) -> None:
    """Give a transformer the forward that takes a layout, in place; repeated calls do nothing.

    Its class, weights and saved form stay diffusers' own, and without a layout its predictions. Gradient checkpointing,
    LoRA, compiled blocks, attention backends, offloading, layerwise casting, step caches and context parallelism work
    as in diffusers.

    Raises:
        ValueError: if it has hooks already, which would keep calling the stock forward.
    """
    if isinstance(transformer.rope, SegmentRope):
        return
    if hasattr(transformer, "_orig_mod"):
        raise ValueError("the transformer is compiled: make the memory-to-video pipeline first, then compile it")
    registry = getattr(transformer, "_diffusers_hook", None)
    if hasattr(transformer, "_hf_hook") or (registry is not None and registry.hooks):
        raise ValueError(
            "the transformer has hooks already (offloading, a step cache, context parallelism): make the "
            "memory-to-video pipeline first, and enable them then"
        )
    transformer.forward = MethodType(forward, transformer)
    transformer.rope.__class__ = SegmentRope  # the same tables
    transformer._cp_plan = _CP_PLAN
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            processor = SegmentAttnProcessor()
            processor._attention_backend = attn.processor._attention_backend
            processor._parallel_config = attn.processor._parallel_config
            attn.set_processor(processor)


#: diffusers' plan for Wan, except for timesteps, which are per segment here and not split.
_CP_PLAN = {
    "rope": {
        0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
    },
    "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


@apply_lora_scale("attention_kwargs")
def forward(
    self: WanTransformer3DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | Mapping[str, Tensor],
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    layout: Layout | None = None,
    cache: SegmentCache | None = None,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """The forward of a transformer over a layout: a prediction for all frames that are not in ``cache``.

    Args:
        hidden_states: latents and condition channels [B, C, N, h, w] of the computed segments, in their order.
        timestep: of the step, [B]; or [B, segments], one for each computed segment, which is then taken as it is.
            [B, tokens], as Wan2.2-TI2V-5B's stock pipeline passes it, is possible without a layout.
        encoder_hidden_states: text embeddings [B, L, text_dim], or several by the names that segments read.
        layout: what the frames are; None: one shot of N latent frames.
        cache: keys and values of constant segments. Segments in it are read and not computed; constant segments that
            are computed are added to it.

    Returns:
        The prediction [B, out_channels, N, h, w].
    """
    p_t, p_h, p_w = self.config.patch_size
    frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], (p_t, p_h, p_w), strict=True))
    layout = single_shot(frames) if layout is None else layout
    cached = frozenset() if cache is None else cache.names
    segments = [segment for segment in layout.segments if segment.name not in cached]
    if sum(segment.frames for segment in segments) != frames:
        raise ValueError(f"the layout's segments {[s.name for s in segments]} do not have {frames} latent frames")
    rank, processes = _share(self)
    plan = make_plan(layout, cached, height * width, rank, processes, cache is not None)

    order = _strided(frames * height * width, processes, hidden_states.device) if processes > 1 else None
    cos, sin = self.rope(hidden_states, sum((s.positions for s in segments), ()), order)
    hidden_states = rearrange(self.patch_embedding(hidden_states), "b d t h w -> b (t h w) d").contiguous()
    if order is not None:
        hidden_states = hidden_states[:, order]
    temb, modulation = _timesteps(self.condition_embedder, timestep, segments, hidden_states, plan.tokens)
    text = _texts(self.condition_embedder, encoder_hidden_states, encoder_hidden_states_image, plan)

    for index, block in enumerate(self.blocks):
        block_cache = BlockCache() if cache is None else cache.block(index)
        reads = SelfReads(cos, sin, plan.self_queries, block_cache, plan.to_cache)
        arguments = (hidden_states, text, modulation, reads)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            hidden_states = self._gradient_checkpointing_func(block, *arguments)
        else:
            hidden_states = block(*arguments)
    if cache is not None:
        cache.names |= {segment.what for segment in plan.to_cache}

    shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(-2)).unbind(dim=-2)
    if temb.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
    hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
    output = self.proj_out(hidden_states)
    if order is not None:
        output = output[:, order.argsort()]
    sizes = {"t": frames, "h": height, "w": width, "pt": p_t, "ph": p_h, "pw": p_w}
    output = rearrange(output, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", **sizes)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _share(transformer: WanTransformer3DModel) -> tuple[int, int]:
    """This process's number, and how many share the tokens."""
    config = getattr(transformer._parallel_config, "context_parallel_config", None)
    if config is None:
        return 0, 1
    return torch.distributed.get_rank(config._flattened_mesh.get_group()), config._flattened_mesh.size()


def _timesteps(
    embedder: Any, timestep: Tensor, segments: list[Segment], hidden_states: Tensor, tokens: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Embedding [B, D] and modulation [B, 6, D] of one timestep for all, or [B, tokens, ...] of several."""
    if timestep.ndim == 1 and any(segment.timestep is not None for segment in segments):
        fixed = [timestep if s.timestep is None else torch.full_like(timestep, s.timestep) for s in segments]
        timestep = torch.stack(fixed, dim=1)
    if timestep.ndim == 2 and timestep.shape[1] == 1:
        timestep = timestep[:, 0]
    if timestep.ndim == 2 and timestep.shape[1] not in (len(segments), sum(tokens)):
        raise ValueError(f"timesteps are for {timestep.shape[1]} of {len(segments)} segments or {sum(tokens)} tokens")
    projected = embedder.timesteps_proj(timestep.flatten())
    dtype = next(iter(embedder.time_embedder.parameters())).dtype
    if dtype != torch.int8:
        projected = projected.to(dtype)
    temb = embedder.time_embedder(projected).to(hidden_states.dtype)
    modulation = embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
    if timestep.ndim == 1:
        return temb, modulation
    temb, modulation = (x.unflatten(0, timestep.shape) for x in (temb, modulation))
    if timestep.shape[1] == len(segments):
        repeats = torch.tensor(tokens, device=temb.device)
        total = sum(tokens)
        temb, modulation = (x.repeat_interleave(repeats, dim=1, output_size=total) for x in (temb, modulation))
    return temb, modulation


def _texts(embedder: Any, texts: Tensor | Mapping[str, Tensor], image: Tensor | None, plan: Plan) -> Tensor | TextReads:
    by_name = {"prompt": texts} if isinstance(texts, Tensor) else texts
    read = {query.what.name for query in plan.text_queries if query.what} if plan.text_queries else {"prompt"}
    if absent := read - by_name.keys():
        raise ValueError(f"segments read the texts {sorted(absent)}, and only {sorted(by_name)} are given")
    embedded = {name: embedder.text_embedder(by_name[name]) for name in read}
    if image is not None:
        images = embedder.image_embedder(image)
        embedded = {name: torch.cat([images, text], dim=1) for name, text in embedded.items()}
    return TextReads(embedded, plan.text_queries) if plan.text_queries else embedded["prompt"]


@lru_cache(maxsize=256)
def make_plan(
    layout: Layout, cached: frozenset[str], frame_tokens: int, rank: int, processes: int, caching: bool
) -> Plan:
    """``layout`` in tokens of one process.

    Token i of the computed segments is in process i mod P, in order. So a range of tokens is a range in every process,
    and shares of ranges differ by at most one token.

    Args:
        cached: names of segments that are not computed.
        frame_tokens: tokens of one latent frame.
        rank: of this process among the ``processes`` that share the tokens.
        caching: whether keys and values of constant segments are cached.
    """

    def local(token: int) -> int:
        return max(0, -(-(token - rank) // processes))

    segments = [segment for segment in layout.segments if segment.name not in cached]
    spans = {segment.name: (0, segment.frames * frame_tokens) for segment in layout.segments}
    start = 0
    for segment in segments:
        end = start + segment.frames * frame_tokens
        spans[segment.name], start = (start, end), end
    own = {segment.name: (local(spans[segment.name][0]), local(spans[segment.name][1])) for segment in segments}

    def piece(keys: str | Keys) -> Piece:
        begin, end = spans[name_of(keys)]
        if isinstance(keys, Keys):
            end = begin + keys.frames * frame_tokens
        return Run(local(begin), local(end), name_of(keys) if name_of(keys) in cached else None)

    self_queries = _joined(
        Run(*own[segment.name], tuple(tuple(_joined(map(piece, key_set))) for key_set in segment.reads))
        for segment in segments
    )
    text_queries = _joined(Run(*own[segment.name], segment.text) for segment in segments)
    to_cache = tuple(Run(*own[name], name) for name in own if caching and name in layout.constant)
    total = local(start)
    plain = not to_cache and self_queries == [(0, total, (((0, total, None),),))]
    return Plan(
        self_queries=() if plain else tuple(self_queries),
        text_queries=() if [query.what for query in text_queries] == [Text()] else tuple(text_queries),
        tokens=tuple(end - begin for begin, end in own.values()),
        to_cache=to_cache,
    )


def _joined(runs: Iterable[Run[T]]) -> list[Run[T]]:
    """Adjacent runs of the same joined to one: keys that are adjacent already are not copied."""
    joined: list[Run[T]] = []
    for run in runs:
        if joined and joined[-1][1:] == (run.start, run.what):
            joined[-1] = joined[-1]._replace(stop=run[1])
        else:
            joined.append(run)
    return joined


def _strided(tokens: int, processes: int, device: torch.device) -> Tensor:
    """[tokens]: first those of process 0, i mod P = 0, then those of process 1, ..."""
    index = torch.arange(tokens, device=device)
    return torch.cat([index[rank::processes] for rank in range(processes)])


def rotated(projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, tokens, heads, head_dim] with rotary positions, computed as in diffusers' processor."""
    first, second = projected.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(projected)


def _gathered(own: Tensor, cache: BlockCache, pieces: tuple[Piece, ...], which: int) -> Tensor:
    """Keys (``which`` 0) or values (1) of pieces, one after the other."""
    parts = []
    for start, stop, name in pieces:
        if name is None:
            parts.append(own[:, start:stop])
        else:
            cached = cache.segments[name][which][:, start:stop].to(own.device, non_blocking=True)
            parts.append(cached.expand(own.shape[0], -1, -1, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
