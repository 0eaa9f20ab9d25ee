"""Guidance by the memory: the pass with the negative prompt sees no memory, so that guidance strengthens memory too.

As published, both passes of classifier-free guidance see the memory, and what guidance strengthens is the prompt. With
``sampler.guide_memory``, which is ours, the second pass is what the network expects of a shot that nothing is known of,
and guidance leads from there to prompt and memory together; that pass is cheaper for it. A network can do it if some
of its training was without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor

from storymem.wan.guidance import HOOK as GUIDANCE_BATCH
from storymem.wan.memory_attention import install_memory_attention
from storymem.wan.parallel import GUIDANCE_PARALLEL
from storymem.wan.passes import PASSES, PassHook
from storymem.wan.rope import install_memory_rope

_HOOK = "memory_guidance"


@contextmanager
def hiding_memory(experts: Iterable[Any], *, slots: int) -> Iterator[None]:
    """Have the passes with the negative prompt, inside, see no memory.

    Args:
        experts: transformers that look back at a memory, called by a loop of diffusers.
        slots: M if the latents they are given begin with M memory slots (``joint``), 0 if the memory is kept in their
            attention (``cached``).

    Raises:
        ValueError: for experts whose two passes must see the same.
    """
    with ExitStack() as stack:
        for expert in experts:
            registry = HookRegistry.check_if_exists_or_initialize(expert)
            if registry.get_hook(GUIDANCE_BATCH) is not None:
                raise ValueError("guide_memory: these experts run both passes of guidance as one batch, of one memory")
            if slots and registry.get_hook(GUIDANCE_PARALLEL) is not None:
                raise ValueError("guide_memory: in joint it needs both passes in one process, not guidance_parallel")
            registry.register_hook(_WithoutSlots(slots) if slots else _WithoutKept(), _HOOK)
            stack.callback(registry.remove_hook, _HOOK, recurse=False)
        yield


class _WithoutSlots(PassHook):
    """Takes the memory slots out of the second pass; there, what the first predicted of them is returned for them.

    So guidance leaves the slots as the first pass has them.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self._predicted: Tensor | None = None

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """(noise prediction [B, 16, M + T, h, w],)"""
        forward = self.fn_ref.original_forward
        if self.pass_name != PASSES[1]:
            (result,) = forward(*args, **kwargs)
            self._predicted = result[:, :, : self.slots]
            return (result,)
        assert self._predicted is not None, "the pass with the prompt comes first"
        rope = install_memory_rope(module)
        rope.memory_frames = 0
        try:
            (video,) = forward(*args, **kwargs | {"hidden_states": kwargs["hidden_states"][:, :, self.slots :]})
        finally:
            rope.memory_frames = self.slots
        return (torch.cat([self._predicted, video], dim=2),)


class _WithoutKept(PassHook):
    """Runs the second pass as if no keys and values of a memory were kept."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """What the network returns."""
        forward = self.fn_ref.original_forward
        if self.pass_name != PASSES[1]:
            return forward(*args, **kwargs)
        with install_memory_attention(module).hidden():
            return forward(*args, **kwargs)
