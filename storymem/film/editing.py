"""A film that exists, opened to be changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storymem.film.folder import Film
from storymem.film.manifest import film_folder
from storymem.film.storyboard import storyboard


@contextmanager
def edited_film(folder: str | Path) -> Iterator[Film]:
    """The film in ``folder``, which is locked until the end of the block; ``film.mp4`` and the page then follow it.

    Raises:
        FilmError: if there is no film, and then nothing is locked; see :func:`storymem.film.manifest.read_manifest`.
        FileError: if another process has locked it.
    """
    Film.open(folder)
    with film_folder(folder):
        film = Film.open(folder)
        film.remove_unfinished()
        yield film
        film.refresh(storyboard(film))
