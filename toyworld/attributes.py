"""What can be seen in the toy world: the words for it, and the records that hold it."""

from __future__ import annotations

from dataclasses import dataclass, fields

WIDTH, HEIGHT = 96, 64
FRAMES, FPS = 17, 8

PLACES = ("desert", "forest", "beach", "city", "snow field", "moon")
TIMES = ("dawn", "noon", "dusk", "night")
FRAMINGS = ("medium", "close")
ACTIONS = ("walks left", "walks right", "jumps", "waits", "turns", "meets")

SHAPES = ("round", "square", "tall", "pointed")
BODY_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
HATS = ("no hat", "party hat", "top hat", "crown", "beanie")
EYES = ("dots", "big eyes", "one eye", "sunglasses")
PROP_COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SIDES = ("left", "right")

UNKNOWN = "unknown"

NAMES = ("Ada", "Bo", "Cleo", "Dax", "Eli", "Fay", "Gus", "Hana", "Ivo", "Juno", "Kit", "Lou")


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a character looks; prompts of stories do not describe it."""

    shape: str
    colour: str
    hat: str
    eyes: str


LOOKS = tuple(
    Look(shape=shape, colour=colour, hat=hat, eyes=eyes)
    for shape in SHAPES
    for colour in BODY_COLOURS
    for hat in HATS
    for eyes in EYES
)


@dataclass(frozen=True, kw_only=True)
class Character:
    """One of the story's people: a name, which prompts use, and a look, which they do not."""

    name: str
    look: Look


@dataclass(frozen=True, kw_only=True)
class Scenery:
    """The random part of a place, kept for a whole story: a landmark (tent, hut, parasol, bus, cabin or
    rocket) on one side and a flag on the other."""

    landmark: str
    side: str
    flag: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one frame shows, as the renderer knows it or as `read_attributes` reads it.

    `looks` runs from left to right. A value is "unknown" where it cannot be read.
    """

    place: str
    time: str
    framing: str
    landmark: str
    side: str
    flag: str
    looks: tuple[Look, ...]


#: What is read of a character, and of everything else.
LOOK_PARTS = tuple(field.name for field in fields(Look))
PLACE_PARTS = tuple(field.name for field in fields(Seen) if field.name != "looks")
