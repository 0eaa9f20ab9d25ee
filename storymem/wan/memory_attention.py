"""Cached memory, a mode of ours: the memory's keys and values are the same at every step, so they are computed once.

In this mode memory slots carry their clean latents in place of noise, run at timestep 0, skip the text and look only
at memory; video slots look at everything. In ``joint``, the published mode, memory slots are denoised with the video
and nothing here is used.

A transformer computes the mode in one of two ways, which agree but for rounding:

- whole: memory and video in one forward, each token with its own timestep. Training goes this way.
- prefill, then read: one forward of the memory alone keeps its keys and values in every block; each further forward is
  of the video alone and finds them there. Neither text nor timestep enters them, so they serve every step and both
  branches of guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import HookRegistry, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_qkv_projections
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from storymem.wan.conditioning import memory_condition
from storymem.wan.rope import install_memory_rope
from storymem.wan.settings import MemoryCache

_Role = Literal["none", "whole", "prefill", "read"]
_CONTEXT = "memory"


class MemoryAttention:
    """What the attention of one transformer knows about memory at the moment; all its processors share it."""

    def __init__(self, transformer: Any) -> None:
        self.rope = install_memory_rope(transformer)
        self.layers = [MemorySelfAttention(self) for _ in transformer.blocks]
        self.role: _Role = "none"
        self.tokens = 0  # in "whole": how many of the first tokens are memory
        self.on_cpu = False

    @contextmanager
    def whole(self, memory_frames: int, *, stride: int, tokens: int) -> Iterator[None]:
        """Forwards inside are of memory and video together.

        Args:
            memory_frames: M, at least 1.
            stride: S, the distance between memory slots on the temporal axis.
            tokens: of the memory, M times those of a slot.
        """
        with self._with("whole", tokens), self._positions(memory_frames, stride):
            yield

    @contextmanager
    def prefill(self, memory_frames: int, *, stride: int, on_cpu: bool) -> Iterator[None]:
        """The one forward inside is of memory alone; those after it read what it keeps until :meth:`forget`."""
        self.on_cpu = on_cpu
        with self._with("prefill", 0), self._positions(memory_frames, stride):
            yield
        assert all(layer.kept for layer in self.layers), "every block computes the memory"
        self.role = "read"

    def forget(self) -> None:
        """Drop keys and values; forwards are of video alone from now on, without memory."""
        self.role, self.tokens = "none", 0
        for layer in self.layers:
            layer.kept = None

    def hidden(self) -> AbstractContextManager[None]:
        """Forwards inside are of video alone and see no memory; what is kept stays."""
        return self._with("none", 0)

    def as_now(self) -> AbstractContextManager[None]:
        """A context, for later, in which forwards treat memory tokens as they would now."""
        return self._with(self.role, self.tokens)

    @contextmanager
    def _with(self, role: _Role, tokens: int) -> Iterator[None]:
        before = self.role, self.tokens
        self.role, self.tokens = role, tokens
        try:
            yield
        finally:
            self.role, self.tokens = before

    @contextmanager
    def _positions(self, memory_frames: int, stride: int) -> Iterator[None]:
        self.rope.memory_frames, self.rope.stride = memory_frames, stride
        try:
            yield
        finally:
            self.rope.memory_frames = 0


class MemorySelfAttention(WanAttnProcessor):
    """Wan's self-attention, in which memory looks only at memory; without memory it is Wan's own.

    Attributes:
        kept: keys and values of the memory, each [1, tokens, heads, head_dim].
    """

    def __init__(self, memory: MemoryAttention) -> None:
        super().__init__()
        self.memory = memory
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        memory = self.memory
        if memory.role == "none":
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = _projected(attn, hidden_states, rotary_emb)
        if memory.role == "whole":
            m = memory.tokens
            by_memory = self._attend(query[:, :m], key[:, :m], value[:, :m])
            output = torch.cat([by_memory, self._attend(query[:, m:], key, value)], dim=1)
        else:
            if memory.role == "prefill":
                self.kept = (_to_cpu(key), _to_cpu(value)) if memory.on_cpu else (key, value)
            else:
                assert self.kept is not None
                key, value = _after(self.kept[0], key), _after(self.kept[1], value)
            output = self._attend(query, key, value)
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class MemoryCrossAttention(WanAttnProcessor):
    """Wan's cross-attention, which memory skips: so one prefill serves every text."""

    def __init__(self, memory: MemoryAttention) -> None:
        super().__init__()
        self.memory = memory

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, tokens, dim] -> the same shape, zero for memory tokens."""
        if self.memory.role == "prefill":
            return torch.zeros_like(hidden_states)
        skipped = self.memory.tokens
        told = super().__call__(attn, hidden_states[:, skipped:], encoder_hidden_states, attention_mask, rotary_emb)
        return F.pad(told, (0, 0, skipped, 0)) if skipped else told


def install_memory_attention(transformer: Any) -> MemoryAttention:
    """Give a ``WanTransformer3DModel`` the attention that knows memory; once is enough, twice is harmless."""
    found = _installed(transformer)
    if found is not None:
        return found
    memory = MemoryAttention(transformer)
    for block, layer in zip(transformer.blocks, memory.layers, strict=True):
        for attn, processor in ((block.attn1, layer), (block.attn2, MemoryCrossAttention(memory))):
            processor._attention_backend = attn.processor._attention_backend
            processor._parallel_config = attn.processor._parallel_config
            attn.set_processor(processor)
    return memory


def checkpointing(transformer: Any) -> Callable[..., Any]:
    """For ``enable_gradient_checkpointing``: a block computed again meets what it met at first.

    That is which tokens are memory, and which of torch's attention kernels are allowed; both belong to a moment, and
    the second computation comes when it is over.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        memory, kernels = _installed(transformer), _cur_sdpa_kernel_backends()
        return nullcontext(), _again(nullcontext() if memory is None else memory.as_now(), kernels)

    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def token_timesteps(timesteps: Tensor, latents: Tensor, transformer: Any) -> Tensor:
    """Timesteps [B, tokens] from those of the slots [B, N], for latents [B, C, N, h, w]."""
    return timesteps.repeat_interleave(slot_tokens(latents, transformer), dim=1)


def slot_tokens(latents: Tensor, transformer: Any) -> int:
    """Tokens of one slot of latents [B, C, N, h, w]."""
    _, height, width = transformer.config.patch_size
    return (latents.shape[3] // height) * (latents.shape[4] // width)


def memory_input(latents: Tensor) -> Tensor:
    """What a network gets for memory slots: [B, 36, M, h, w] from clean latents [B, 16, M, h, w]."""
    return torch.cat([latents, memory_condition(latents, latents[:, :, :0], given_slots=0)], dim=1)


@contextmanager
def reading_memory(
    experts: Iterable[Any], latents: Tensor, *, stride: int, cache: MemoryCache = "device"
) -> Iterator[None]:
    """Have every forward of video alone look back at a memory; afterwards nothing of it is left.

    The memory is computed when an expert is first called, on the device where it runs then, and what another expert
    kept is dropped: experts take turns once in a shot.

    Args:
        experts: transformers, which are called with keywords, as diffusers' pipelines do.
        latents: of the memory, [1, 16, M, h, w], for all samples of a batch.
        stride: S, the distance between memory slots on the temporal axis.
        cache: where keys and values lie, see :class:`storymem.wan.settings.RuntimeSettings`.
    """
    clean, experts = memory_input(latents), list(experts)
    memories = [install_memory_attention(expert) for expert in experts]
    with ExitStack() as stack:
        for expert, memory in zip(experts, memories, strict=True):
            stack.callback(memory.forget)
            if cache == "recompute":
                frames = latents.shape[2]
                stack.enter_context(memory.whole(frames, stride=stride, tokens=frames * slot_tokens(clean, expert)))
                hooks = [
                    expert.register_forward_pre_hook(partial(_put_before, clean=clean), with_kwargs=True),
                    expert.register_forward_hook(partial(_take_out, frames=frames)),
                ]
            else:
                prefill = partial(_prefill_once, memories=memories, clean=clean, stride=stride, on_cpu=cache == "cpu")
                hooks = [expert.register_forward_pre_hook(prefill, with_kwargs=True)]
            for hook in hooks:
                stack.callback(hook.remove)
        yield


def _prefill_once(
    expert: Any,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    memories: Iterable[MemoryAttention],
    clean: Tensor,
    stride: int,
    on_cpu: bool,
) -> None:
    """A forward pre-hook: the forward that comes finds the memory's keys and values."""
    memory = install_memory_attention(expert)
    if memory.role == "read":
        return
    for other in memories:
        other.forget()
    inputs = kwargs | {
        "hidden_states": clean.to(kwargs["hidden_states"]),
        "timestep": kwargs["timestep"].new_zeros(1),
        "encoder_hidden_states": kwargs["encoder_hidden_states"][:1],  # not looked at
        "return_dict": False,
    }
    with (
        memory.prefill(clean.shape[2], stride=stride, on_cpu=on_cpu),
        _apart_from_step_caches(expert),
        torch.compiler.set_stance("force_eager"),  # no graph for two forwards of a shot
    ):
        expert.forward(**inputs)  # not __call__, which would come here again


def _put_before(expert: Any, args: tuple, kwargs: dict[str, Any], *, clean: Tensor) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: memory slots, at timestep 0, come before those of the video."""
    video, timestep = kwargs["hidden_states"], kwargs["timestep"]
    latents = torch.cat([clean.to(video).expand(len(video), -1, -1, -1, -1), video], dim=2)
    of_memory = timestep.new_zeros(len(video), clean.shape[2])
    timesteps = torch.cat([of_memory, timestep[:, None].expand(-1, video.shape[2])], dim=1)
    return args, kwargs | {"hidden_states": latents, "timestep": token_timesteps(timesteps, latents, expert)}


def _take_out(expert: Any, args: tuple, output: tuple[Tensor], *, frames: int) -> tuple[Tensor]:
    """A forward hook: what is predicted for the memory is left out."""
    return (output[0][:, :, frames:],)


@contextmanager
def _apart_from_step_caches(transformer: Any) -> Iterator[None]:
    """Keep what diffusers' caches across steps remember (first-block cache and others) out of a forward inside."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    hooks = [hook for each in (registry, *registry._get_child_registries()) for hook in each.hooks.values()]
    managers = {id(m): m for hook in hooks for m in vars(hook).values() if isinstance(m, StateManager)}.values()
    contexts = [manager._context for manager in managers]
    states = [(hook, hook.state) for hook in hooks if hasattr(hook, "state")]  # one for all contexts
    for hook, state in states:
        hook.state = type(state)()
    with transformer.cache_context(_CONTEXT):
        yield
    for hook, state in states:
        hook.state = state
    for manager, context in zip(managers, contexts, strict=True):
        manager._state_cache.pop(_CONTEXT, None)
        manager.set_context(context)


@contextmanager
def _again(memory: AbstractContextManager[None], kernels: list[SDPBackend]) -> Iterator[None]:
    with memory, sdpa_kernel(kernels):
        yield


def _installed(transformer: Any) -> MemoryAttention | None:
    return getattr(transformer.blocks[0].attn1.processor, "memory", None)


def _projected(attn: Any, hidden_states: Tensor, rotary_emb: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [B, tokens, heads, head_dim], with positions in the first two."""
    query, key, value = _get_qkv_projections(attn, hidden_states, None)
    query, key, value = (
        projected.unflatten(2, (attn.heads, -1)) for projected in (attn.norm_q(query), attn.norm_k(key), value)
    )
    positions = tuple(table[0, :, 0] for table in rotary_emb)
    query, key = (apply_rotary_emb(projected, positions, sequence_dim=1) for projected in (query, key))
    return query, key, value


def _after(kept: Tensor, own: Tensor) -> Tensor:
    """Those of the memory, [1, tokens, heads, head_dim] on any device, and then a batch's own."""
    kept = kept.to(own.device, non_blocking=True)
    return torch.cat([kept.expand(len(own), -1, -1, -1), own], dim=1)


def _to_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, page-locked where that makes the way back faster."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)
