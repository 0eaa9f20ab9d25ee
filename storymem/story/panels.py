"""One caption for several shots that are drawn as panels of one image, top to bottom (IC-LoRA, arXiv 2410.23775)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PANELS = 3
"""Panels of an image, for which the published film-storyboard LoRA was trained."""
JOINT_TOKENS = 160
"""Tokens to which a video model's joint caption is padded, in training and in generation."""


@dataclass(frozen=True, kw_only=True)
class PanelWords:
    """The words between the captions of panels.

    Args:
        opening: before the summary.
        marks: before the caption of each panel.
        names_in_brackets: whether a character's name is written as ``<Ada>``.
    """

    opening: str
    marks: tuple[str, ...]
    names_in_brackets: bool


PanelStyle = Literal["film_storyboard", "plain"]

#: ``film_storyboard``: those of the published LoRA. ``plain``: for a text encoder with few words, such as that of the
#: toy model, which has neither digits nor brackets. Of the words that it has, a linear probe finds the panel of a word
#: best after these (0.85 of words, against 0.62 after ``[SCENE-1]``).
PANEL_WORDS: dict[PanelStyle, PanelWords] = {
    "film_storyboard": PanelWords(
        opening="[MOVIE-SHOTS]", marks=("[SCENE-1]", "[SCENE-2]", "[SCENE-3]"), names_in_brackets=True
    ),
    "plain": PanelWords(opening="", marks=("top top", "one one", "under under"), names_in_brackets=False),
}


def panel_prompt(
    captions: Sequence[str], *, summary: str = "", names: Sequence[str] = (), style: PanelStyle = "film_storyboard"
) -> str:
    """The joint caption: ``[MOVIE-SHOTS] summary [SCENE-1] caption [SCENE-2] caption [SCENE-3] caption``.

    Generation and training build it here.

    Args:
        captions: of the panels, top to bottom; at most three.
        summary: what all panels have in common.
        names: of characters.
        style: which of :data:`PANEL_WORDS`.
    """
    words = PANEL_WORDS[style]
    if not 1 <= len(captions) <= len(words.marks):
        raise ValueError(f"an image has 1 to {len(words.marks)} panels, not {len(captions)}")
    panels = [part for pair in zip(words.marks, captions, strict=False) for part in pair]
    text = " ".join(" ".join(filter(None, [words.opening, summary, *panels])).split())
    if not words.names_in_brackets or not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub(rf"(?<![\w<])({'|'.join(map(re.escape, longest_first))})(?![\w>])", r"<\1>", text)
