"""Classifier-free guidance in one batch: both passes of a step as one forward, the denoising loop unchanged.

diffusers' loop calls an expert twice a step, with one text and then with the other, everything else being the very same
tensors. A hook on the experts watches these calls. The first step of a shot shows it which texts belong together; from
then on the first call of a step computes both, and the second is handed its half. Should a call come that was not
foreseen (a callback changed the negative prompt, guidance is off), it is computed by itself: the result is right in
any case, and only time is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

HOOK = "storymem_guidance_batch"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pass:
    """One call of an expert; two passes of one step share latents and timestep, as objects."""

    latents: Tensor
    timestep: Tensor
    text: Tensor

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Pass:
        return cls(
            latents=arguments["hidden_states"],
            timestep=arguments["timestep"],
            text=arguments["encoder_hidden_states"],
        )

    def same_step(self, other: _Pass) -> bool:
        return self.latents is other.latents and self.timestep is other.timestep


class GuidanceBatch:
    """Pairs the two passes of guidance; one object serves both experts, so that a switch needs no new acquaintance.

    Args:
        forwards: counts forwards by their batch: ``{1: 2, 2: 39}`` after a shot of 40 steps.
    """

    def __init__(self) -> None:
        self.forwards: dict[int, int] = {}
        self._seen: _Pass | None = None
        self._texts: tuple[Tensor, Tensor] | None = None
        self._ready: tuple[_Pass, Tensor] | None = None

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """What ``forward(**arguments)`` returns; ``arguments`` are those of ``WanTransformer3DModel.forward``."""
        now = _Pass.of(arguments)
        ready, self._ready = self._ready, None
        if ready is not None:
            foreseen, output = ready
            if now.same_step(foreseen) and now.text is foreseen.text:
                return (output,)
            self._texts = None  # the second pass did not come as foreseen
        if self._texts is not None and now.text is self._texts[0] and not arguments.get("return_dict", True):
            return self._both(forward, arguments, now, self._texts[1])
        if self._seen is not None and now.same_step(self._seen) and now.text.shape == self._seen.text.shape:
            self._texts = (self._seen.text, now.text)
        self._seen = now
        self._count(1, now)
        return forward(**arguments)

    def _both(self, forward: Callable[..., Any], arguments: dict[str, Any], now: _Pass, other: Tensor) -> tuple[Tensor]:
        doubled = {
            "hidden_states": torch.cat([now.latents, now.latents]),
            "timestep": torch.cat([now.timestep, now.timestep]),
            "encoder_hidden_states": torch.cat([now.text, other]),
        }
        self._count(2, now)
        (output,) = forward(**(arguments | doubled))
        first, second = output.chunk(2)
        self._ready = (_Pass(latents=now.latents, timestep=now.timestep, text=other), second)
        return (first,)

    def _count(self, passes: int, now: _Pass) -> None:
        batch = passes * now.latents.shape[0]
        self.forwards[batch] = self.forwards.get(batch, 0) + 1


class _BatchedPasses(ModelHook):
    """diffusers' hook that sends the calls of one expert through a :class:`GuidanceBatch`."""

    def __init__(self, batch: GuidanceBatch) -> None:
        super().__init__()
        self.batch = batch

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not args, "diffusers' pipelines call their transformers with keywords"
        return self.batch.run(self.fn_ref.original_forward, kwargs)


def batch_guidance(experts: Mapping[str, Any]) -> GuidanceBatch:
    """Make the experts of a pipeline run both passes of guidance as one batch of two.

    It takes twice the activations' memory, and saves most where one pass does not fill the device. Wan 2.1's image
    embeddings are not batched; no model here has them.
    """
    batch = GuidanceBatch()
    for expert in experts.values():
        HookRegistry.check_if_exists_or_initialize(expert).register_hook(_BatchedPasses(batch), HOOK)
    return batch
