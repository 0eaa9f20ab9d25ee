"""LCT (arXiv 2503.10589) on a small model: an architecture comparison, since its code and weights are not public.

All shots are denoised at once with full attention. Each reads the overview and its own prompt, and a gap on the
temporal axis separates it from the shot before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from storymem.methods.joint import FilmRequest, JointMethod
from storymem.story import Story
from storymem.wan.segments import lct


class Lct(JointMethod):
    """The layout of LCT on a model's own networks, with ``adapter`` if it is given.

    Args:
        gap: see :func:`storymem.wan.segments.lct`.
        generate, max_shots, adapter: see :class:`storymem.methods.joint.JointMethod`.
    """

    name: ClassVar[str] = "LCT"
    objective: ClassVar[str] = "lct"

    def __init__(
        self, *, generate: Mapping[str, Any], gap: int, max_shots: int, adapter: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(generate=generate, adapter=adapter, max_shots=max_shots, gap=gap)
        self.gap = gap

    def request(self, story: Story) -> FilmRequest:
        return self.shots_apart(story, partial(lct, gap=self.gap))
