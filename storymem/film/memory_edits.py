"""Edits of a film's memory: add, drop, pin and replace keyframes.

Each function takes a film whose folder is locked (:func:`storymem.film.manifest.film_folder`), and saves the edit with
it. No network is loaded: the next run embeds and encodes new images. Takes stay as they are; see :attr:`Edit.stale`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import numpy as np

from storymem.config import nearest
from storymem.film.folder import Film
from storymem.film.manifest import FilmError
from storymem.film.matching import stale
from storymem.film.resume import flat
from storymem.media.images import fit_image, read_image
from storymem.memory.bank import IMAGES, Entry, ids_on_disk, keyframe_files, read_entries
from storymem.memory.keyframes import reference_id, unused_id


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What an edit did.

    Args:
        entry: the keyframe as it is now, or that was dropped.
        command: what to type for the same edit.
        stale: shot (from 1) -> why its take is not what would be made now, for shots of which that is new.
    """

    entry: Entry
    command: str
    stale: dict[int, str]


def command_of(folder: Path, arguments: str) -> str:
    """``storymem memory`` for an edit that ``film.json`` records; images of the film by their paths from here."""
    words = [str(folder / word) if word.startswith(f"{IMAGES}/") else word for word in shlex.split(arguments)]
    return shlex.join(["storymem", "memory", str(folder), *words])


def add(film: Film, picture: str | Path, *, character: str | None = None, shot: int | None = None) -> Edit:
    """Add an image as the newest keyframe.

    Args:
        film: of the memory.
        picture: an image of any size, fitted as references are.
        character: who is shown, a character of the story.
        shot: the first (from 1) that may recall it; None: every shot.

    Raises:
        FilmError: for a character or shot that the story does not have.
        ImageError: for an image that cannot be read.
    """
    entries = _entries(film)
    names = [one["name"] for one in film.story.get("characters", ())]
    if character is not None and character not in names:
        known = f"its characters are {', '.join(names)}" if names else "it has none"
        raise FilmError(f"for={character}: not a character of the film; {known}")
    if shot is not None and not 1 <= shot <= len(film.slots):
        raise FilmError(f"shot={shot}: the film has shots 1 to {len(film.slots)}")
    image = _fitted(film, picture)
    name = character or re.sub(r"^ref_(.+)_\d+$", r"\1", Path(picture).stem)  # the image of an edit that is repeated
    id = reference_id(name, _taken(film, entries))
    entry = Entry(id=id, image=keyframe_files(id)[0], shot=shot, character=character)
    options = [f"for={character}"] * (character is not None) + [f"shot={shot}"] * (shot is not None)
    return _saved(film, entries, [*entries, entry], entry, ["add", entry.image, *options], {entry.image: image})


def drop(film: Film, which: str) -> Edit:
    """Remove a keyframe from the memory; its files stay.

    Args:
        film: of the memory.
        which: its number in the memory, from 1, or its id.

    Raises:
        FilmError: if there is no such keyframe.
    """
    entries = _entries(film)
    entry = _find(film, entries, which)
    return _saved(film, entries, [one for one in entries if one != entry], entry, ["drop", entry.id])


def pin(film: Film, which: str, *, pinned: bool = True) -> Edit:
    """Have every shot that knows a keyframe recall it, before all others; ``pinned=False`` ends that.

    Raises:
        FilmError: if there is no such keyframe, or more are pinned than a shot recalls.
    """
    entries = _entries(film)
    entry = _find(film, entries, which)
    capacity = flat(film.config).get("memory.recall.capacity")
    if pinned and not entry.pinned and capacity is not None and sum(one.pinned for one in entries) >= capacity:
        raise FilmError(f"{capacity} keyframes are pinned, and a shot recalls no more: unpin one of them")
    now = changed(entry, pinned=pinned)
    after = [now if one == entry else one for one in entries]
    return _saved(film, entries, after, now, ["pin" if pinned else "unpin", entry.id])


def replace(film: Film, which: str, picture: str | Path) -> Edit:
    """Have an image, under an id of its own, in the place of a keyframe, whose files stay.

    Raises:
        FilmError: if there is no such keyframe.
        ImageError: for an image that cannot be read.
    """
    entries = _entries(film)
    entry = _find(film, entries, which)
    image = _fitted(film, picture)
    id = unused_id(entry.id, _taken(film, entries))
    now = Entry(
        id=id,
        image=keyframe_files(id)[0],
        shot=entry.shot,
        frame=entry.frame,
        character=entry.character,
        pinned=entry.pinned,
    )
    after = [now if one == entry else one for one in entries]
    return _saved(film, entries, after, now, ["replace", entry.id, now.image], {now.image: image})


def _entries(film: Film) -> list[Entry]:
    if not film.has_memory or (film.is_older and not film.is_complete):
        raise FilmError(f"{film.folder} has no memory to edit yet: storymem generate makes or converts it")
    return read_entries(film.folder)


def _find(film: Film, entries: Sequence[Entry], which: str) -> Entry:
    if which.isdecimal() and 1 <= int(which) <= len(entries):
        return entries[int(which) - 1]
    ids = {entry.id: entry for entry in entries}
    if which not in ids:
        known = f": the memory has 1 to {len(entries)}" if which.isdecimal() else nearest(which, ids)
        raise FilmError(f"there is no keyframe {which}{known}")
    return ids[which]


def _taken(film: Film, entries: Sequence[Entry]) -> set[str]:
    return ids_on_disk(film.folder) | {entry.id for entry in entries}


def _fitted(film: Film, picture: str | Path) -> np.ndarray:
    image, settings = read_image(picture), flat(film.config)
    height, width = (settings.get(f"model.video.{name}") for name in ("height", "width"))
    if height is None or width is None or image.shape[:2] == (height, width):  # the next run fits what is not
        return image
    return fit_image(image, height, width, settings.get("memory.reference_fit", "auto"))


def _saved(
    film: Film,
    before: Sequence[Entry],
    after: Sequence[Entry],
    entry: Entry,
    arguments: Sequence[str],
    images: dict[str, np.ndarray] | None = None,
) -> Edit:
    old = stale(film, before)
    edit = shlex.join(arguments)
    film.edit_memory(after, edit, images or {})
    now = stale(film, after)
    new = {shot: reason for shot, reason in now.items() if shot not in old}
    return Edit(entry=entry, command=command_of(film.folder, edit), stale=new)
