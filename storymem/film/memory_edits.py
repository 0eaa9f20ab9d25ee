"""Edits of a film's memory: add, drop, pin and replace keyframes.

Each function takes a film whose folder is locked (:func:`storymem.film.manifest.film_folder`), and saves the edit with
it. No network is loaded: the next run embeds and encodes new images. Takes stay as they are; see :attr:`Edit.stale`.
What the film does not have (a keyframe, a character, a shot) raises ``FilmError``, and an image that cannot be read
``ImageError``.
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
from storymem.film.differences import flat
from storymem.film.folder import Film
from storymem.film.manifest import FilmError
from storymem.film.matching import stale
from storymem.media.images import fit_image, read_image
from storymem.memory.bank import IMAGES, Entry, ids_on_disk, keyframe_files, read_entries
from storymem.memory.keyframes import reference_id, unused_id


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What an edit did.

    Args:
        command: what to type for the same edit; None: the memory was so already, and nothing is recorded.
        stale: shot (from 1) -> why its take is not what would be made now, for shots of which that is new.
    """

    command: str | None
    stale: dict[int, str]


def command_of(folder: Path, arguments: str) -> str:
    """``storymem memory`` for an edit that ``film.json`` records; images of the film by their paths from here."""
    words = [str(folder / word) if word.startswith(f"{IMAGES}/") else word for word in shlex.split(arguments)]
    return shlex.join(["storymem", "memory", str(folder), *words])


def add(film: Film, picture: str | Path, *, character: str | None = None, shot: int | None = None) -> Edit:
    """Add an image as the newest keyframe.

    Args:
        picture: an image of any size, fitted as references are.
        character: who is shown, a character of the story.
        shot: the first (from 1) that may recall it; None: every shot.
    """
    names = [one["name"] for one in film.story.get("characters", ())]
    if character is not None and character not in names:
        known = f"its characters are {', '.join(names)}" if names else "it has none"
        raise FilmError(f"for={character}: not a character of the film; {known}")
    if shot is not None and not 1 <= shot <= len(film.slots):
        raise FilmError(f"shot={shot}: the film has shots 1 to {len(film.slots)}")
    image = _fitted(film, picture)
    name = character or re.sub(r"^ref_(.+)_\d+$", r"\1", Path(picture).stem)  # the image of an edit that is repeated
    id = reference_id(name, _taken(film))
    entry = Entry(id=id, shot=shot, character=character)
    options = [f"for={character}"] * (character is not None) + [f"shot={shot}"] * (shot is not None)
    return _saved(film, None, entry, ["add", entry.image, *options], image)


def drop(film: Film, which: str) -> Edit:
    """Remove a keyframe, named by its number in the memory (from 1) or its id; its files stay."""
    entry = _find(film, which)
    return _saved(film, entry, None, ["drop", entry.id])


def pin(film: Film, which: str, *, pinned: bool = True) -> Edit:
    """Have every shot that knows a keyframe recall it, before all others; ``pinned=False`` ends that.

    ``FilmError`` if more are pinned than a shot recalls.
    """
    entry = _find(film, which)
    capacity = flat(film.config).get("memory.recall.capacity")
    if pinned and not entry.pinned and capacity is not None and sum(one.pinned for one in _entries(film)) >= capacity:
        raise FilmError(f"{capacity} keyframes are pinned, and a shot recalls no more: unpin one of them")
    return _saved(film, entry, changed(entry, pinned=pinned), ["pin" if pinned else "unpin", entry.id])


def replace(film: Film, which: str, picture: str | Path) -> Edit:
    """Have an image, under an id of its own, in the place of a keyframe, whose files stay."""
    entry = _find(film, which)
    image = _fitted(film, picture)
    id = unused_id(entry.id, _taken(film))
    now = changed(entry, id=id, image=keyframe_files(id)[0], sha256=None, source=None, quality=None, similarity=None)
    return _saved(film, entry, now, ["replace", entry.id, now.image], image)


def _entries(film: Film) -> list[Entry]:
    if not film.has_memory or (film.is_older and not film.is_complete):
        raise FilmError(f"{film.folder} has no memory to edit yet: storymem generate makes or converts it")
    return read_entries(film.folder) or []


def _find(film: Film, which: str) -> Entry:
    entries = _entries(film)
    if which.isdecimal() and 1 <= int(which) <= len(entries):
        return entries[int(which) - 1]
    ids = {entry.id: entry for entry in entries}
    if which not in ids:
        known = f": the memory has 1 to {len(entries)}" if which.isdecimal() else nearest(which, ids)
        raise FilmError(f"there is no keyframe {which}{known}")
    return ids[which]


def _taken(film: Film) -> set[str]:
    return ids_on_disk(film.folder) | {entry.id for entry in _entries(film)}


def _fitted(film: Film, picture: str | Path) -> np.ndarray:
    image, settings = read_image(picture), flat(film.config)
    height, width = (settings.get(f"model.video.{name}") for name in ("height", "width"))
    if height is None or width is None or image.shape[:2] == (height, width):  # the next run fits what is not
        return image
    return fit_image(image, height, width, settings.get("memory.reference_fit", "auto"))


def _saved(
    film: Film, old: Entry | None, new: Entry | None, arguments: Sequence[str], image: np.ndarray | None = None
) -> Edit:
    """Put ``new``, with its image, in the place of ``old``; without it, at the end."""
    before, edit = _entries(film), shlex.join(arguments)
    now = [] if new is None else [new]
    after = [*before, *now] if old is None else [one for entry in before for one in (now if entry == old else [entry])]
    if after == before:
        return Edit(command=None, stale={})
    known = stale(film, before)
    film.edit_memory(after, edit, {} if new is None or image is None else {new.image: image})
    found = {shot: reason for shot, reason in stale(film, after).items() if shot not in known}
    return Edit(command=command_of(film.folder, edit), stale=found)
