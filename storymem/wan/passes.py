"""Which pass of guidance a forward belongs to: diffusers' loops name their calls by ``cache_context``."""

from __future__ import annotations

from typing import Any

from diffusers.hooks.hooks import BaseState, ModelHook, StateManager

#: With the prompt, and with the negative prompt, in the order of a step.
PASSES = ("cond", "uncond")


class PassHook(ModelHook):
    """A hook of a network that is told which pass each forward is."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.context = StateManager(BaseState)  # diffusers tells it the name of the call

    @property
    def pass_name(self) -> str:
        """One of :data:`PASSES`, or another name for a forward that belongs to neither."""
        return self.context.context.name

    def reset_state(self, module: Any) -> Any:
        """Between shots nothing is kept."""
        self.context.reset()
        return module
