"""The joint caption of panels."""

from __future__ import annotations

import pytest

from storymem.story.panels import panel_prompt


def test_the_caption_of_panels() -> None:
    captions = ["Ann waits.", "Ann Lee runs to  Ann.", "Annette's hat."]
    assert panel_prompt(captions, summary="Two friends, Ann and Ann Lee.", names=["Ann", "Ann Lee"]) == (
        "[MOVIE-SHOTS] Two friends, <Ann> and <Ann Lee>. [SCENE-1] <Ann> waits. [SCENE-2] <Ann Lee> runs to <Ann>. "
        "[SCENE-3] Annette's hat."
    )
    assert panel_prompt(captions[:2], names=["Ann"], style="plain") == "top top Ann waits. one one Ann Lee runs to Ann."
    with pytest.raises(ValueError, match="1 to 3 panels, not 4"):
        panel_prompt([*captions, "x"])
