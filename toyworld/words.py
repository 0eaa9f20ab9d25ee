"""Sentences of the toy world, written and read back: names and places appear in them and looks do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toyworld.attributes import Character, Look, Scenery
from toyworld.places import LANDMARKS

PLACE_WORDS = {
    "desert": ("in the desert",),
    "forest": ("in the forest",),
    "beach": ("on the beach",),
    "city": ("in the city",),
    "snow field": ("in the snow field",),
    "moon": ("on the moon",),
}

TIME_WORDS = {
    "dawn": ("at dawn", "at sunrise"),
    "noon": ("at noon", "in bright daylight"),
    "dusk": ("at dusk", "at sunset"),
    "night": ("at night", "under the night sky"),
}

FRAMING_WORDS = {
    "medium": ("Medium shot", "Half-close shot"),
    "close": ("Close-up", "Close shot"),
}

ACTION_WORDS = {
    "walks left": ("walks to the left", "walks left"),
    "walks right": ("walks to the right", "walks right"),
    "jumps": ("jumps", "jumps up and down"),
    "waits": ("waits", "stands still"),
    "turns": ("turns", "turns to look the other way"),
}

TOGETHER_WORDS = {
    "meets": ("{a} meets {b}", "{a} and {b} meet"),
    "waits": ("{a} and {b} wait", "{a} and {b} stand still"),
    "jumps": ("{a} and {b} jump", "{a} and {b} jump up and down"),
}

TEMPLATES = (
    "{deed} {place} {time}. {framing}.",
    "{framing}. {deed} {place} {time}.",
    "{framing}: {time} {place}, {deed}.",
)

HAT_WORDS = {
    "no hat": "without a hat",
    "party hat": "in a party hat",
    "top hat": "in a top hat",
    "crown": "with a crown",
    "beanie": "in a beanie",
}
EYE_WORDS = {"dots": "dot eyes", "big eyes": "big eyes", "one eye": "one eye", "sunglasses": "sunglasses"}


def describe(look: Look) -> str:
    """A look in words, as in "a round red creature in a top hat, with big eyes"."""
    hat, eyes = HAT_WORDS[look.hat], EYE_WORDS[look.eyes]
    return f"a {look.shape} {look.colour} creature {hat}, with {eyes}"


def sentence(
    rng: np.random.Generator,
    *,
    place: str,
    time: str,
    framing: str,
    action: str,
    cast: Sequence[Character],
    scenery: Scenery,
    looks: bool = False,
) -> str:
    """The prompt of a shot in a wording drawn at random; with `looks`, followed by how everything looks.

    The same generator state gives the same wording with and without `looks`.
    """
    names = [character.name for character in cast]
    if len(names) == 2:
        deed = str(rng.choice(TOGETHER_WORDS[action])).format(a=names[0], b=names[1])
    else:
        deed = f"{names[0]} {rng.choice(ACTION_WORDS[action])}"
    text = str(rng.choice(TEMPLATES)).format(
        deed=deed,
        place=rng.choice(PLACE_WORDS[place]),
        time=rng.choice(TIME_WORDS[time]),
        framing=rng.choice(FRAMING_WORDS[framing]),
    )
    text = text[0].upper() + text[1:]
    return " ".join([text, *map(describe_character, cast), describe_scenery(place, scenery)]) if looks else text


def describe_character(character: Character) -> str:
    """A character's look as a sentence."""
    return f"{character.name} is {describe(character.look)}."


def describe_scenery(place: str, scenery: Scenery) -> str:
    """Landmark and flag of a place as a sentence."""
    thing, other = LANDMARKS[place][0], "right" if scenery.side == "left" else "left"
    return f"A {scenery.landmark} {thing} on the {scenery.side}, a {scenery.flag} flag on the {other}."


@dataclass(frozen=True, kw_only=True)
class Asked:
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


def read_prompt(prompt: str) -> Asked:
    """Read a prompt of any wording, with or without looks.

    Raises:
        ValueError: if it is not in the toy world's words.
    """
    found = {name: _only(prompt, name, table) for name, table in _TABLES.items()}
    actions = {a: (*ACTION_WORDS.get(a, ()), *_TOGETHER.get(a, ())) for a in ACTION_WORDS.keys() | _TOGETHER.keys()}
    return Asked(**found, action=_only(prompt, "action", actions))


def left_to_right(prompt: str, names: Iterable[str]) -> tuple[str, ...]:
    """The characters of a shot from left to right: the one named first stands on the left."""
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
