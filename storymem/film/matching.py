"""Which takes belong to which shots of a story that was edited, and what the memory is then. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from storymem.film.manifest import Manifest, Script, Slot, Take, scripts, unused_folder
from storymem.film.tables import counted
from storymem.io import hash_json
from storymem.memory import Keyframe
from storymem.memory.bank import Entry, KeyframeRecord, known_to, with_frames


def match(
    slots: Sequence[Slot], takes: Sequence[Take], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Slot]:
    """The shots of the story ``now``, with the takes that they have.

    A shot that is in both stories keeps its takes and its choice, wherever it stands; of several alike first that at
    the same place, then one of the same scene. A shot that was in an earlier version finds its takes again. A shot
    that was edited keeps the takes at its place, and none of them is chosen.

    Args:
        slots: the shots of the story ``before``.
        takes: all takes of the film.
        before, now: records of the two stories; see :func:`storymem.film.resume.story_record`.
    """
    old, new = scripts(before), scripts(now)
    at = {slot.folder: (script.scene, script.number) for slot, script in zip(slots, old, strict=True)}
    unchanged = {slot.folder: _key(script) for slot, script in zip(slots, old, strict=True)}
    known = {slot.folder: slot for slot in slots}
    made: dict[str, dict[str, int]] = {}  # folder -> content of takes -> number of the newest
    for take in takes:
        made.setdefault(take.folder, {})[hash_json(take.script)] = take.take
    holding: dict[str, dict[str, None]] = {}  # content -> folders, those of the story first
    for folder, key in [*unchanged.items(), *((folder, key) for folder, keys in made.items() for key in keys)]:
        holding.setdefault(key, {})[folder] = None
    free = {**dict.fromkeys(known), **dict.fromkeys(made)}
    found: dict[int, str] = {}

    def assign(fits: Any) -> None:
        for place, script in enumerate(new):
            if place not in found and (folder := next((f for f in fits(script) if f in free), None)) is not None:
                found[place] = folder
                del free[folder]

    def alike(script: Script) -> Iterable[str]:
        return holding.get(_key(script), {})

    assign(lambda script: (f for f in alike(script) if at.get(f) == (script.scene, script.number)))
    assign(lambda script: (f for f in alike(script) if f in at and at[f][0] == script.scene))
    assign(alike)
    places = {place: folder for folder, place in at.items()}
    assign(lambda script: [places.get((script.scene, script.number))])
    taken = {*known, *made}
    matched: list[Slot] = []
    for place, script in enumerate(new):
        folder = found.get(place) or unused_folder(script.scene, script.number, taken)
        taken.add(folder)
        slot = known.get(folder, Slot(folder=folder))
        if unchanged.get(folder) != _key(script):
            slot = Slot(folder=folder, take=made.get(folder, {}).get(_key(script)))
        matched.append(slot)
    return matched


def _key(script: Script) -> str:
    return hash_json(script.content)


def matches(film: Manifest, before: Manifest) -> Iterator[str]:
    """A line for each shot of ``film`` that the film ``before`` its story was edited has not at its place."""
    old, new = scripts(before.story), scripts(film.story)
    numbers = {slot.folder: number for number, slot in enumerate(before.slots, start=1)}
    for number, (slot, script) in enumerate(zip(film.slots, new, strict=True), start=1):
        label = f"shot {number} (scene {script.scene}, shot {script.number})"
        count = len(film.takes_of(number - 1))
        kept = f"keeps {counted(count, 'take')}, and shows take {slot.take}"
        if slot.folder not in numbers:
            yield f"{label} " + (f"is in the story again: it {kept}" if slot.take else "is new")
        elif _key(script) != _key(old[numbers[slot.folder] - 1]):
            if slot.take:
                yield f"{label} is as in an earlier version of the story: it {kept}"
            else:
                yield f"{label} was edited" + (f"; its takes from the former text stay: {count}" if count else "")
        elif numbers[slot.folder] != number and slot.take:
            yield f"{label} was shot {numbers[slot.folder]}: it {kept}"
    for number, slot in enumerate(before.slots, start=1):
        if slot.folder not in {slot.folder for slot in film.slots}:
            count = sum(1 for take in film.takes if take.folder == slot.folder)
            yield f"shot {number} of before is no longer in the story" + (f"; its takes stay: {count}" if count else "")


def bank_digest(keyframes: Iterable[Keyframe | Entry]) -> str:
    """Identifies the memory before a shot; see :func:`storymem.memory.bank.known_to`."""
    return hash_json([(k.id, k.sha256, *(["pinned"] if k.pinned else [])) for k in keyframes])[:16]


def arranged(film: Manifest, was: Sequence[Slot], entries: Sequence[Entry]) -> list[Entry]:
    """The memory of a film whose story or choice of takes has changed.

    The keyframes of takes that are no longer chosen leave it, as the user left them: their takes get them back. Those
    of takes that are chosen now come before those of later shots. All else stays, in its order, unless shots have
    changed places.

    Args:
        film: with the shots and takes of now; the records of takes that are no longer chosen are updated.
        was: the shots when ``entries`` were the memory.
        entries: of ``memory.json``.
    """
    place = {slot.folder: number for number, slot in enumerate(film.slots, start=1)}
    chosen = {(slot.folder, slot.take) for slot in film.slots}
    stay: list[Entry] = []
    leave: dict[tuple[str, int | None], list[Entry]] = {(s.folder, s.take): [] for s in was if s.take}
    leave = {name: gone for name, gone in leave.items() if name not in chosen}
    for entry in entries:
        slot = was[entry.shot - 1] if entry.shot and entry.shot <= len(was) else None
        if slot is None:
            stay.append(entry)
        elif entry.is_frame and (slot.folder, slot.take) in leave:
            leave[slot.folder, slot.take].append(entry)
        elif slot.folder in place:
            stay.append(replace(entry, shot=place[slot.folder]))
        elif entry.source is None:  # an image of the user for a shot that is no longer there
            stay.append(replace(entry, shot=min(entry.shot or 1, len(film.slots))))
    for number, take in enumerate(film.takes):
        if (gone := leave.get((take.folder, take.take))) is not None:
            film.takes[number] = replace(take, keyframes=tuple(map(KeyframeRecord.of, gone)))
    order = [place[slot.folder] for slot in was if slot.folder in place]
    if order != sorted(order):
        stay = _by_shot(stay)
    held = {(slot.folder, slot.take) for slot in was}
    for take in film.shots:
        if (take.folder, take.take) not in held:
            stay = with_frames(stay, take.shot, [Entry(**vars(one), shot=take.shot) for one in take.keyframes])
    return stay


def _by_shot(entries: Sequence[Entry]) -> list[Entry]:
    """In the order of shots; what belongs to no shot stays behind what it stood behind."""
    shots: list[int] = []
    for entry in entries:
        shots.append(entry.shot if entry.shot is not None else shots[-1] if shots else 0)
    return [entry for _, entry in sorted(zip(shots, entries, strict=True), key=lambda pair: pair[0])]


def stale(film: Manifest, entries: Sequence[Entry] | None) -> dict[int, str]:
    """Shot (from 1) -> why its chosen take is not what would be made now, with this memory; where that is known.

    ``entries`` are None if ``memory.json`` is missing: then memory is no reason.
    """
    found = {}
    now = scripts(film.story)
    for take in film.shots:
        seen = known_to(take.shot, entries or ())
        gone = [id for id in take.memory if id not in {entry.id for entry in seen}]
        before = film.take_of(take.index - 1) if take.index else None
        if take.script != now[take.index].content:
            found[take.shot] = "made from another text"
        elif take.follows is not None and (before is None or take.follows != before.sha256.get(before.file)):
            found[take.shot] = f"continues another {'video' if before is not None and before.is_replaced else 'take'}"
        elif entries is None:
            continue
        elif gone:
            found[take.shot] = f"recalled {', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}, now gone"
        elif take.shot == 1 and take.mode == "t2v" and not any(entry.source for entry in seen):
            continue  # it sees no memory, now as then
        elif take.bank is not None and take.bank != bank_digest(seen):
            found[take.shot] = "the memory before it has changed"
    return found
