"""Which folder may hold a film: one that is empty or holds a film of ours, and that no other process uses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from storymem.film.manifest import FOLDERS, MANIFEST, MEMORY, PAGE, VIDEO, FilmError
from storymem.io import folder_lock


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that a film would do harm to, or could not be finished in; nothing in it changes.

    Raises:
        FilmError: if it is not empty and holds no film of ours, lies among another film's own files, holds folders or
            links where a film has files, or cannot be written.
    """
    try:
        real = Path(folder).resolve()
        _check_place(Path(folder), real)
        if real.is_dir():
            _check_content(Path(folder), sorted(path.name for path in real.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, FilmError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise FilmError(f"the film's folder {folder} cannot be used ({reason}): choose another output") from None


def _check_place(folder: Path, real: Path) -> None:
    for ancestor in real.parents:
        name = real.relative_to(ancestor).parts[0]
        if name in (*FOLDERS, VIDEO, PAGE, MEMORY, MANIFEST) and (ancestor / MANIFEST).is_file():
            raise FilmError(f"{folder} would lie in {name} of the film in {ancestor}: choose another output")
    existing = next(path for path in (real, *real.parents) if path.exists())
    if not existing.is_dir():
        raise FilmError(f"the film's folder {folder} cannot be written ({existing} is a file): choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FilmError(f"the film's folder {folder} cannot be written (permission denied): choose another output")


def _check_content(folder: Path, names: Sequence[str]) -> None:
    if MANIFEST not in names:
        foreign = [name for name in names if not (name.startswith(".") and (folder / name).is_file())]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise FilmError(
                f"{folder} is not empty and holds no film that can be gone on with ({shown}): "
                "choose another output, or an empty folder"
            )
        return
    for name in names:
        path = folder / name
        if name in FOLDERS and (path.is_symlink() or not path.is_dir()):
            raise FilmError(f"{path} must be a folder, not a link or a file: move it away, or choose another output")
        if name in (VIDEO, PAGE, MEMORY) and path.is_dir():
            raise FilmError(f"{path} is a folder, and a film has a file of that name: move it away")


@contextmanager
def film_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that may hold a film, exists, can be written, and is this process's alone until the end of the block.

    Raises:
        FileError: if one of these is not so.
    """
    check_folder(folder)
    with folder_lock(folder, "making the film in") as folder:
        yield folder
