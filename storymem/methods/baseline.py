"""What all baselines on Wan share: the base model as it is published, without memory and without our adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from storymem.film.manifest import CandidateRecord
from storymem.film.resume import Run
from storymem.film.settings import Mode
from storymem.film.storyteller import Storyteller
from storymem.memory import Keyframe, MemoryBank
from storymem.methods.storymem import StoryMem
from storymem.story import Shot, Story

logger = logging.getLogger(__name__)

#: Noise levels of Wan2.2-I2V-A14B's own sampler; memory-to-video uses 4.
IMAGE_TO_VIDEO_SHIFT = 5.0

_RECALL = "storymem.memory.SinkAndRecent"


class NoEmbedder:
    """In place of CLIP: without memory nothing is embedded."""


def without_memory(generate: Mapping[str, Any]) -> dict[str, Any]:
    """``generate`` without settings of the memory and its scorers, which have no effect and are not recorded."""
    return {
        **generate,
        "memory": {
            "recall": {"_target_": _RECALL},
            "selector": {"_target_": "storymem.memory.KeyframeSelector"},
        },
        "scorer": {
            "clip": {"_target_": f"{__name__}.{NoEmbedder.__name__}"},
            "quality": {"_target_": "storymem.scorers.scorer.NoQuality"},
        },
    }


def ignored_recall(generate: Mapping[str, Any], system: str) -> list[str]:
    """A line where another recall policy is chosen than the default, which has no effect without memory."""
    policy = generate["memory"]["recall"].get("_target_")
    return [] if policy == _RECALL else [f"memory.recall={policy} has no effect: {system} has no memory"]


class Baseline(StoryMem):
    """The shot loop of :class:`StoryMem` with the base model alone: nothing joins the memory and nothing is recalled.

    Steps and guidance are those of ``generate``, for Wan2.2 the base's own; the memory adapter and all scorers are left
    out.

    Args:
        generate: as of :class:`StoryMem`.
        shift: of the noise levels of image-to-video; None: shots are made from text, with the sampler's
            ``text_to_video_shift``.
    """

    reads_references: ClassVar[bool] = False  # whether reference images of a story have an effect

    def __init__(self, *, generate: Mapping[str, Any], shift: float | None = None) -> None:
        own = {
            "model": {**generate["model"], "adapter": None},
            "sampler": {**generate["sampler"], **({} if shift is None else {"shift": shift})},
        }
        super().__init__(generate={**without_memory(generate), **own})
        self._notes = ignored_recall(generate, type(self).__name__)

    def check(self, story: Story) -> None:
        super().check(story)
        while self._notes:  # once for all stories
            logger.warning(self._notes.pop())
        if story.all_references and not self.reads_references:
            logger.warning(f"{story.title}: reference images have no effect: {type(self).__name__} has no memory")


class WithoutMemory(Storyteller):
    """A shot loop in which neither frames nor reference images become keyframes."""

    def select(self, *args: Any, **kwargs: Any) -> tuple[list[Keyframe], tuple[CandidateRecord, ...]]:
        """None."""
        return [], ()

    def _restore(self, run: Run) -> MemoryBank:
        return MemoryBank(policy=self.recall)


class TextToVideo(WithoutMemory):
    """Every shot from its text alone."""

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """Text-to-video."""
        return "t2v"
