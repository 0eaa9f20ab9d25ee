"""Prompts that hold a caption of the whole film, as Memento's do: ``global caption: ...; shot caption: ...``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_TAGGED = re.compile(r"global caption:\s*(?P<caption>.*?)\s*;\s*shot caption:", re.IGNORECASE | re.DOTALL)


def tagged(caption: str, prompt: str) -> str:
    """A prompt in this form."""
    return f"global caption: {caption}; shot caption: {prompt}"


def global_caption(prompt: str) -> str | None:
    """The caption of the whole film in a prompt; None if it is not in this form."""
    found = _TAGGED.search(prompt)
    return None if found is None else found["caption"]


def renamed(text: str, names: Mapping[str, str]) -> str:
    """``text`` with each name (whole words, the longest first) replaced by what ``names`` maps it to."""
    if not names:
        return text
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)({longest_first})(?!\w)", lambda found: names[found[0]], text)
