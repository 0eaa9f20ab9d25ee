"""What a prompt of the toy world asks for: the way back from `toyworld.words`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from toyworld.words import ACTION_WORDS, FRAMING_WORDS, PLACE_WORDS, TIME_WORDS, TOGETHER_WORDS


@dataclass(frozen=True, kw_only=True)
class Said:
    """Place, time, framing and action that a prompt names, in the words of `toyworld.attributes`."""

    place: str
    time: str
    framing: str
    action: str


_TOGETHER = {
    action: tuple(re.sub(r"\{a\} (and \{b\} )?| \{b\}", "", wording) for wording in wordings)
    for action, wordings in TOGETHER_WORDS.items()
}
_TABLES: dict[str, Mapping[str, Iterable[str]]] = {"place": PLACE_WORDS, "time": TIME_WORDS, "framing": FRAMING_WORDS}


def read_prompt(prompt: str) -> Said:
    """Read a prompt of any wording, with or without looks.

    Raises:
        ValueError: if it is not in the toy world's words.
    """
    found = {name: _only(prompt, name, table) for name, table in _TABLES.items()}
    actions = {a: (*ACTION_WORDS.get(a, ()), *_TOGETHER.get(a, ())) for a in ACTION_WORDS.keys() | _TOGETHER.keys()}
    return Said(**found, action=_only(prompt, "action", actions))


def left_to_right(prompt: str, names: Iterable[str]) -> tuple[str, ...]:
    """The characters of a shot as they stand: who is named first stands on the left."""
    return tuple(sorted(names, key=prompt.find))


def _only(prompt: str, what: str, table: Mapping[str, Iterable[str]]) -> str:
    """The one value of which a wording stands in the prompt."""
    found = sorted(value for value, wordings in table.items() if any(_says(prompt, words) for words in wordings))
    if len(found) != 1:
        wrong = f"names {' and '.join(found)}" if found else "names none"
        raise ValueError(
            f"{prompt!r} is no prompt of the toy world: it should name one {what} and {wrong}; write for example "
            f"{', '.join(repr(next(iter(table[value]))) for value in sorted(table))}"
        )
    return found[0]


def _says(prompt: str, words: str) -> bool:
    """Whether the words stand there as words of their own ("close shot" does not in "half-close shot")."""
    return re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", prompt, re.IGNORECASE) is not None
