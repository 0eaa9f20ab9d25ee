"""Prompts that hold a caption of the whole film, as Memento's do: ``global caption: ...; shot caption: ...``."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"global caption:\s*(?P<caption>.*?)\s*;\s*shot caption:", re.IGNORECASE | re.DOTALL)


def tagged(caption: str, prompt: str) -> str:
    """A prompt in this form."""
    return f"global caption: {caption}; shot caption: {prompt}"


def global_caption(prompt: str) -> str | None:
    """The caption of the whole film in a prompt; None if it is not in this form."""
    found = _TAGGED.search(prompt)
    return None if found is None else found["caption"]
