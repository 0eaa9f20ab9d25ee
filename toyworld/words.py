"""Sentences of the toy world: several wordings for each shot, in which names and places appear and looks do not."""

from __future__ import annotations

from collections.abc import Sequence

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
    "wide": ("Wide shot", "Long shot"),
    "medium": ("Medium shot", "Half-close shot"),
    "close": ("Close-up", "Close shot"),
}

ACTION_WORDS = {
    "walks left": ("walks to the left", "walks left"),
    "walks right": ("walks to the right", "walks right"),
    "jumps": ("jumps", "jumps up and down"),
    "spins": ("spins", "spins around"),
    "grows": ("grows", "grows bigger"),
    "waits": ("waits", "stands still"),
    "turns": ("turns", "turns to look the other way"),
}

TOGETHER_WORDS = {
    "meets": ("{a} meets {b}", "{a} and {b} meet"),
    "waits": ("{a} and {b} wait", "{a} and {b} stand still"),
    "jumps": ("{a} and {b} jump", "{a} and {b} jump up and down"),
}

PAN_WORDS = {
    "still": ("",),
    "left": (" The camera pans left.", " The view glides to the left."),
    "right": (" The camera pans right.", " The view glides to the right."),
}

TEMPLATES = (
    "{deed} {place} {time}. {framing}.",
    "{framing}. {deed} {place} {time}.",
    "{framing}: {time} {place}, {deed}.",
)

SHAPE_WORDS = {"round": "round", "square": "square", "tall": "tall", "pointed": "pointed"}
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
    return f"a {SHAPE_WORDS[look.shape]} {look.colour} creature {hat}, with {eyes}"


def sentence(
    rng: np.random.Generator,
    *,
    place: str,
    time: str,
    framing: str,
    action: str,
    pan: str,
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
    text = text[0].upper() + text[1:] + str(rng.choice(PAN_WORDS[pan]))
    return f"{text} {_looks(place, cast, scenery)}" if looks else text


def _looks(place: str, cast: Sequence[Character], scenery: Scenery) -> str:
    sentences = [f"{character.name} is {describe(character.look)}." for character in cast]
    other = "right" if scenery.side == "left" else "left"
    thing = LANDMARKS[place][0]
    sentences.append(f"A {scenery.landmark} {thing} on the {scenery.side}, a {scenery.flag} flag on the {other}.")
    return " ".join(sentences)
