"""``storymem memory FOLDER``: the keyframes of a film, why they are there, and edits of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings
from storymem.film import memory_edits as edits
from storymem.film.folder import Film, edited_film
from storymem.film.tables import NO_MEMORY, candidates_table, counted, memory_table, summary
from storymem.memory.bank import read_entries
from storymem.stopping import stopping_on_signals

_ARGUMENTS = {"show": (), "add": ("picture.png",), "drop": ("3",), "pin": ("3",), "unpin": ("3",)} | {
    "replace": ("3", "picture.png")
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryEditSettings:
    """The settings of ``storymem memory``.

    Args:
        folder: of the film; then a keyframe's number or id, and a picture, as the action needs them.
        action: show: print the keyframes; add, drop, pin, unpin, replace: change them.
        character: who is shown in an added picture (for=Ada).
        shot: print why frames of this shot became keyframes or not; of an added picture, the first shot that may
            recall it, by default every shot.
    """

    folder: UserPath | tuple[UserPath, ...]
    action: Literal["show", "add", "drop", "pin", "unpin", "replace"] = "show"
    character: str | None = None
    shot: int | None = None


def memory_command(config: Mapping[str, Any]) -> None:
    """Run ``storymem memory`` with a composed configuration."""
    settings = build_settings(MemoryEditSettings, config)
    given = (settings.folder,) if isinstance(settings.folder, str) else settings.folder
    folder, arguments = Path(given[0] if given else "FOLDER"), given[1:]
    if len(arguments) != len(_ARGUMENTS[settings.action]) or not given:
        if settings.action == "show" and arguments:
            raise ValueError(f"{arguments[0]}: write add, drop, pin, unpin or replace, or nothing")
        needed = " ".join([settings.action, *_ARGUMENTS[settings.action]]).removeprefix("show")
        raise ValueError(f"write: storymem memory {folder} {needed}".rstrip())
    if settings.character is not None and settings.action != "add":
        raise ValueError(f"for={settings.character} is for add: leave it out")
    if settings.shot is not None and settings.action not in ("show", "add"):
        raise ValueError(f"shot={settings.shot} is for add, and to print a shot's frames: leave it out")
    if settings.action == "show":
        film = Film.open(folder)
        print(listed(film) if settings.shot is None else explained(film, settings.shot), flush=True)
        return
    actions: dict[str, Callable[..., edits.Edit]] = {
        "add": partial(edits.add, character=settings.character, shot=settings.shot),
        "drop": edits.drop,
        "pin": edits.pin,
        "unpin": partial(edits.pin, pinned=False),
        "replace": edits.replace,
    }
    with stopping_on_signals(), edited_film(folder) as film:
        edit = actions[settings.action](film, *arguments)
        unchanged = f"nothing changed: keyframe {arguments[0]} is {'not ' if settings.action == 'unpin' else ''}pinned"
        print(edit.command or unchanged)
        for shot, reason in edit.stale.items():
            print(f"shot {shot} is not what would be made now: {reason}")


def listed(film: Film) -> str:
    """The keyframes in text, what became of the frames of each shot, and the edits that were made."""
    entries = read_entries(film.folder) or []
    parts = [f"{film.story['title']}: {NO_MEMORY if film.lacks_memory else counted(len(entries), 'keyframe')}"]
    parts += [memory_table(film, entries)] if entries else []
    notes, videos = [], film.other_videos()
    for take in film.shots:
        video = videos.get(take.file)
        other = None if video is None else f"video {video}: its keyframes are frames of the generated one"
        notes += [f"shot {take.shot}: {text}" for text in (summary(take), other) if text]
    parts += ["\n".join(notes)] if notes else []
    if film.edits:
        parts.append("\n".join(["edits:", *(f"  {edits.command_of(film.folder, edit)}" for edit in film.edits)]))
    return "\n\n".join(parts)


def explained(film: Film, shot: int) -> str:
    """Why each examined frame of a shot became a keyframe or not, in text."""
    if not 1 <= shot <= len(film.slots):
        raise ValueError(f"shot={shot}: the film has shots 1 to {len(film.slots)}")
    take = film.take_of(shot - 1)
    if take is None:
        raise ValueError(f"shot {shot} has no take yet: storymem generate makes one")
    if not take.candidates:
        return f"shot {shot}, take {take.take}: its frames' scores were not recorded; a new take records them"
    return f"shot {shot}, take {take.take}: {summary(take)}\n\n{candidates_table(take)}"
