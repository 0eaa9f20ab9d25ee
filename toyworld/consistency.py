"""What stays the same in films of the toy world, exactly: attributes are read from the pixels by fitting its renderer.

Not part of the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from storymem.evaluation.entities import GAPS
from storymem.evaluation.metric import Column, FilmInfo, Metric, Pair, Scores, Value, mean
from storymem.story import Shot, Story
from toyworld.attributes import HEIGHT, LOOK_PARTS, LOOKS, PROP_COLOURS, SIDES, UNKNOWN, WIDTH, Scenery
from toyworld.places import draw_place
from toyworld.reader import ShotSeen, fit_backdrop, planar, read_shot
from toyworld.words import Asked, left_to_right, read_prompt

SCENERY_PARTS = tuple(field.name for field in fields(Scenery))
ASKED = ("place", "time", "framing", "action")


def chance_of(values: Sequence[str]) -> float:
    """How often two values drawn independently are the same: the share of equal ones among all pairs."""
    return sum((count / len(values)) ** 2 for count in Counter(values).values())


# The world draws looks and scenery evenly; a film of independent shots draws new ones for each shot.
CHANCE = {part: chance_of([getattr(look, part) for look in LOOKS]) for part in LOOK_PARTS}
CHANCE |= {"landmark": chance_of(PROP_COLOURS), "side": chance_of(SIDES), "flag": chance_of(PROP_COLOURS)}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A character, or the scenery of a place: what should look the same wherever it appears.

    Args:
        name: of the character or the place.
        parts: its attributes.
        shots: the shots it appears in, from 0; the others are compared with the first.
        stands: for a character in each of these shots: its place from the left, and among how many.
    """

    name: str
    parts: tuple[str, ...]
    shots: tuple[int, ...]
    stands: tuple[tuple[int, int], ...] = ()

    @property
    def is_character(self) -> bool:
        """Whether it is a character and not a place."""
        return bool(self.stands)


def things_of(story: Story) -> list[Thing]:
    """Characters in the order of the story's list, then places in the order in which they are named.

    Raises:
        ValueError: for a story that is not in the toy world's words.
    """
    casts = [left_to_right(shot.prompt, shot.characters) for shot in story.shots]
    found = []
    for character in story.characters:
        shots = tuple(index for index, cast in enumerate(casts) if character.name in cast)
        stands = tuple((casts[index].index(character.name), len(casts[index])) for index in shots)
        found.append(Thing(name=character.name, parts=LOOK_PARTS, shots=shots, stands=stands))
    places = [_asked(shot, story).place for shot in story.shots]
    for place in dict.fromkeys(places):
        shots = tuple(index for index, name in enumerate(places) if name == place)
        found.append(Thing(name=place, parts=SCENERY_PARTS, shots=shots))
    return [thing for thing in found if thing.shots]


def _exact(name: str, title: str, heading: str) -> Column:
    """A column that learned metrics of consistency are compared with."""
    return Column(name=name, title=title, heading=heading, consistency=True, exact=True)


class ToyConsistency(Metric):
    """Do characters and places of the toy world keep their attributes from shot to shot?

    Attributes are shape, colour, hat and eyes of a character, and the landmark's colour and side and the flag's colour
    in a place. Each is read in every shot in which the story has its character or place, and compared with the shot in
    which they first appear. Consistency is the share of equal ones, over all attributes and later appearances. The
    story alone decides how many are compared: what cannot be read in one of the two shots counts as different. Of two
    characters, the one whom the prompt names first is taken to stand on the left, as everywhere in the world.

    Stories with one character have a column of their own. A film in which all characters look alike is consistent as
    well: whether characters differ has its own column. As the learned columns of ``metrics=[entities]`` do, others give
    presence (here the share of shots with as many characters as are listed) and the characters' attributes by the
    distance of any two shots.

    Args:
        every: of a shot, each so-many-th frame is read.
    """

    columns = (
        _exact("attribute_consistency", "Attributes as at first appearance", "Attributes"),
        Column(name="attribute_chance", title="The same in independent shots, computed", heading="Chance"),
        _exact("character_consistency", "Attributes of characters", "Characters"),
        Column(
            name="lone_character_consistency",
            title="Attributes of a story's only character",
            heading="Lone char.",
            consistency=True,
        ),
        _exact("place_consistency", "Attributes of places", "Places"),
        Column(name="characters_present", title="Shots with as many characters as asked", heading="Present"),
        Column(name="character_gap_1", title="Characters, neighbouring shots", heading="Gap 1", consistency=True),
        Column(name="character_gap_2", title="Characters, two shots apart", heading="Gap 2", consistency=True),
        Column(name="character_gap_3_4", title="Characters, three or four apart", heading="Gap 3-4", consistency=True),
        Column(name="character_gap_5", title="Characters, five or more apart", heading="Gap 5+", consistency=True),
        Column(name="characters_apart", title="Pairs of characters who differ", heading="Apart"),
        Column(name="attributes_unread", title="Attributes that cannot be read", heading="Unread"),
        Column(name="prompt_attributes", title="Place, time, framing and action as asked", heading="As asked"),
    )

    version = 2

    def __init__(self, *, every: int = 4) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.every = every

    def check(self, story: Story) -> None:
        """``ValueError`` for prompts that are not of the toy world."""
        for shot in story.shots:
            _asked(shot, story)

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> ShotSeen:
        """What can be read of a shot.

        Raises:
            ValueError: for frames that are not of the toy world.
        """
        if frames.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(
                f"{film.story.title}, {shot.label}: metrics=[toy] reads films of {WIDTH}x{HEIGHT}, and this one is "
                f"{frames.shape[2]}x{frames.shape[1]}: leave its story out with stbench.only, or use other metrics"
            )
        return read_shot(frames, self.every)

    def compute(self, measured: Sequence[ShotSeen | None], film: FilmInfo) -> Scores:
        """See :meth:`Metric.compute`."""
        story = film.story
        things = things_of(story)
        characters = [thing for thing in things if thing.is_character]
        compared = [one for thing in things for one in _comparisons(thing, measured)]
        of_characters = [one for one in compared if one.of_character]
        alone, apart = len(characters) == 1, _apart(characters, measured)
        asked = tuple(
            None if shown is None else _as_asked(shown, shot, story)
            for shown, shot in zip(measured, story.shots, strict=True)
        )
        present = tuple(
            None if shown is None else float(len(shown.seen.looks) == len(shot.characters))
            for shown, shot in zip(measured, story.shots, strict=True)
        )
        gaps = _gaps(characters, measured)
        columns = {
            "attribute_consistency": mean([one.same for one in compared]),
            "attribute_chance": mean([CHANCE[one.part] for one in compared]),
            "character_consistency": mean([one.same for one in of_characters]),
            "lone_character_consistency": mean([one.same for one in of_characters]) if alone else None,
            "place_consistency": mean([one.same for one in compared if not one.of_character]),
            "characters_present": mean(present),
            **{name: mean(values) for name, values in gaps.items()},
            "characters_apart": mean(apart),
            "attributes_unread": mean([value for thing in things for value in _unread(thing, measured)]),
            "prompt_attributes": mean(asked),
        }
        undefined = _undefined(compared, alone, apart) | {
            name: "no character is listed in shots so far apart" for name, values in gaps.items() if not values
        }
        return Scores.of(
            columns,
            film.missing,
            undefined,
            shots={
                "attribute_consistency": tuple(
                    mean([one.same for one in compared if one.shot == shot.index]) for shot in story.shots
                ),
                "characters_present": present,
                "prompt_attributes": asked,
            },
            pairs={"attribute_consistency": tuple(_pairs(things, measured))},
            details={
                "kept": {thing.name: mean([one.same for one in _comparisons(thing, measured)]) for thing in things},
                "read": [None if one is None else _plain(one) for one in measured],
            },
        )

    def finds_characters(self, story: Story) -> bool:
        """See :meth:`Metric.finds_characters`."""
        return True

    def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """See :meth:`Metric.without_characters`: the place, drawn as it is read, in every frame."""
        seen = read_shot(frames, self.every).seen
        backdrop, _ = fit_backdrop(planar(frames[0]))
        known = {name: getattr(seen, name) for name in ("place", "time", "framing", *SCENERY_PARTS)}
        scenery = {name: known[name] for name in SCENERY_PARTS}
        where = [
            getattr(backdrop, name) if known[name] == UNKNOWN else known[name] for name in ("place", "time", "framing")
        ]
        drawn = draw_place(*where, None if UNKNOWN in scenery.values() else Scenery(**scenery))
        image = (drawn.transpose(1, 2, 0) * 255).round().astype(np.uint8)
        return np.repeat(image[None], len(frames), axis=0)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Metric.settings`."""
        return {
            "frames": f"every {self.every} from the first",
            "unreadable": "counts as different",
            "chance_of_characters": round(float(np.mean([CHANCE[part] for part in LOOK_PARTS])), 6),
            "chance_of_places": round(float(np.mean([CHANCE[part] for part in SCENERY_PARTS])), 6),
        }


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One attribute in a later shot: whether it is as in the first; None if one of the shots is missing."""

    part: str
    shot: int
    of_character: bool
    same: Value


def _comparisons(thing: Thing, seen: Sequence[ShotSeen | None]) -> Iterator[_Comparison]:
    first = _read(thing, 0, seen)
    for place, shot in enumerate(thing.shots[1:], start=1):
        now = _read(thing, place, seen)
        for at, part in enumerate(thing.parts):
            same = None if first is None or now is None else float(first[at] == now[at] != UNKNOWN)
            yield _Comparison(part=part, shot=shot, of_character=thing.is_character, same=same)


def _read(thing: Thing, place: int, seen: Sequence[ShotSeen | None]) -> tuple[str, ...] | None:
    """Its attributes at an appearance; None if the shot is missing.

    Where more or fewer characters are seen than the prompt names, all is unknown.
    """
    shown = seen[thing.shots[place]]
    if shown is None:
        return None
    if not thing.is_character:
        return tuple(getattr(shown.seen, part) for part in thing.parts)
    position, among = thing.stands[place]
    if len(shown.seen.looks) != among:
        return (UNKNOWN,) * len(thing.parts)
    return tuple(getattr(shown.seen.looks[position], part) for part in thing.parts)


def _unread(thing: Thing, seen: Sequence[ShotSeen | None]) -> Iterator[Value]:
    """For each attribute at each appearance, 1 if it cannot be read."""
    for place in range(len(thing.shots)):
        read = _read(thing, place, seen)
        yield from [None] * len(thing.parts) if read is None else [float(value == UNKNOWN) for value in read]


def _apart(characters: Sequence[Thing], seen: Sequence[ShotSeen | None]) -> list[Value]:
    """For each pair of characters, 1 if they are read to differ in some attribute where each first appears."""
    verdicts: list[Value] = []
    for one, other in combinations([_read(thing, 0, seen) for thing in characters], 2):
        if one is None or other is None:
            verdicts.append(None)
            continue
        known = [(a, b) for a, b in zip(one, other, strict=True) if UNKNOWN not in (a, b)]
        verdicts.append(float(any(a != b for a, b in known)))
    return verdicts


def _pairs(things: Sequence[Thing], seen: Sequence[ShotSeen | None]) -> Iterator[Pair]:
    """For all pairs of shots with a character or place in common, the share of its attributes that are the same."""
    same: dict[tuple[int, int], list[Value]] = {}
    for thing in things:
        for i, j, values in _same(thing, seen):
            same.setdefault((i, j), []).extend(values)
    for (i, j), values in sorted(same.items()):
        yield i, j, mean(values)


def _gaps(characters: Sequence[Thing], seen: Sequence[ShotSeen | None]) -> dict[str, list[Value]]:
    """Column -> for each attribute of a character in two shots so far apart, 1 if it is the same."""
    same = [one for character in characters for one in _same(character, seen)]
    return {
        f"character_gap_{name}": [value for i, j, values in same if low <= j - i <= high for value in values]
        for name, (low, high) in GAPS.items()
    }


def _same(thing: Thing, seen: Sequence[ShotSeen | None]) -> Iterator[tuple[int, int, list[Value]]]:
    """All pairs of its shots with, for each attribute, 1 if it is the same in both; None if a shot is missing."""
    for a, b in combinations(range(len(thing.shots)), 2):
        one, other = _read(thing, a, seen), _read(thing, b, seen)
        if one is None or other is None:
            yield thing.shots[a], thing.shots[b], [None]
        else:
            yield thing.shots[a], thing.shots[b], [float(x == y != UNKNOWN) for x, y in zip(one, other, strict=True)]


def _asked(shot: Shot, story: Story) -> Asked:
    try:
        return read_prompt(shot.prompt)
    except ValueError as error:
        advice = "metrics=[toy] is for stories like those in st_bench/toy"
        raise ValueError(f"{story.title}, {shot.label}: {error}. {advice}") from None


def _plain(shown: ShotSeen) -> dict[str, Any]:
    """What was read, as plain containers."""
    return {**vars(shown.seen), "looks": [dict(vars(look)) for look in shown.seen.looks], "action": shown.action}


def _as_asked(shown: ShotSeen, shot: Shot, story: Story) -> float:
    """Share of place, time, framing and action that are read as in the prompt."""
    asked, read = _asked(shot, story), {**vars(shown.seen), "action": shown.action}
    return float(np.mean([read[name] == getattr(asked, name) for name in ASKED]))


def _undefined(compared: Sequence[_Comparison], alone: bool, apart: Sequence[Value]) -> dict[str, str]:
    """Columns that the story cannot have, and why."""
    reasons: dict[str, str] = {}
    characters = any(one.of_character for one in compared)
    if not compared:
        reasons |= dict.fromkeys(("attribute_consistency", "attribute_chance"), "nothing appears in two shots")
    if not characters:
        reasons["character_consistency"] = "no character is listed in two shots"
    if not any(not one.of_character for one in compared):
        reasons["place_consistency"] = "no place is in two shots"
    if not (alone and characters):
        reasons["lone_character_consistency"] = "the story has not one character alone"
    if not apart:
        reasons["characters_apart"] = "the story has no two characters"
    return reasons
