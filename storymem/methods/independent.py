"""Independent shots: each shot by text-to-video alone, the paper's Wan2.2 baseline."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from storymem.film.manifest import CandidateRecord
from storymem.film.settings import Mode
from storymem.film.storyteller import Storyteller
from storymem.memory import Keyframe
from storymem.methods.storymem import StoryMem
from storymem.story import Shot, Story


class IndependentShots(StoryMem):
    """Every shot is made as the first shot of a film is; nothing is added to the memory and nothing recalled.

    Noise, sampler and model are those of :class:`StoryMem` with the same settings. (StoryMem without memory is
    something else: there the memory-to-video model makes all shots but the first.)
    """

    @cached_property
    def storyteller(self) -> Storyteller:
        """See :attr:`StoryMem.storyteller`."""
        return _TextToVideo(**vars(super().storyteller))

    def uses_text_to_video(self, story: Story) -> bool:
        """Always."""
        return True


class _TextToVideo(Storyteller):
    def mode_of(self, shot: Shot, story: Story) -> Mode:
        return "t2v"

    def _select(self, *args: Any, **kwargs: Any) -> tuple[list[Keyframe], tuple[CandidateRecord, ...]]:
        return [], ()
