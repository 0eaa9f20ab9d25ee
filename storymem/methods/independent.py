"""Independent shots: each shot by text-to-video alone, the paper's Wan2.2 baseline."""

from __future__ import annotations

from storymem.methods.baseline import Baseline, TextToVideo
from storymem.story import Story


class IndependentShots(Baseline):
    """Every shot is made as the first shot of a film is, with the same noise; nothing joins the memory.

    (StoryMem without memory is something else: there the memory-to-video model makes all shots but the first.)
    """

    loop = TextToVideo

    def uses_text_to_video(self, story: Story) -> bool:
        """Always."""
        return True
