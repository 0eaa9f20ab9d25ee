"""Methods: systems that make films. One file for each, a class that turns a story into a folder.

To compare another system, write a class with :meth:`Method.run` and name it by ``_target_``::

    class Memento:
        def __init__(self, *, checkpoint: str) -> None: ...  # keys of the config node; load models on first use

        def check(self, story: Story) -> None: ...

        def run(self, story: Story, folder: Path) -> None: ...  # writes folder/01_02.mp4 for scene 1, shot 2

    storymem evaluate method._target_=memento.Memento method.checkpoint=... label=memento

A file ``configs/method/memento.yaml`` with the same keys makes it ``method=memento``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from storymem.story import Story
from storymem.weights import MissingWeights

__all__ = ["ChecksFilms", "Method", "causes_of", "check_all"]


@runtime_checkable
class Method(Protocol):
    """Makes films of stories."""

    def check(self, story: Story) -> None:
        """Raise ``ValueError`` or ``FileNotFoundError`` if the film of ``story`` cannot be made; see :func:`check_all`.

        All stories are checked before the first film is made.
        """
        ...

    def run(self, story: Story, folder: Path) -> None:
        """Make the film of ``story`` in ``folder``; resume an unfinished one and leave a finished one as it is.

        Afterwards ``folder`` holds a film of StoryMem (``film.json``), or a video for each shot under a name with its
        scene and its number in the scene (``01_02.mp4``). Raises ``ValueError`` if it holds another film.
        """
        ...


@runtime_checkable
class ChecksFilms(Protocol):
    """A method that knows, before it runs, whether it can resume what a folder holds."""

    def check_film(self, story: Story, folder: Path) -> None:
        """Raise ``ValueError`` if ``folder`` holds another film than :meth:`Method.run` makes; nothing is changed."""
        ...


class SeveralErrors(ValueError, MissingWeights):
    """What several checks raised: ``causes``, of either type."""

    def __init__(self, causes: list[Exception]) -> None:
        super().__init__("\n".join(map(str, causes)))
        self.causes = causes


def causes_of(error: Exception) -> list[Exception]:
    """The causes of an error of :func:`check_all`; of any other error itself."""
    return error.causes if isinstance(error, SeveralErrors) else [error]


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks and raise what they raise: a single error as it is, of several with equal messages the first."""
    causes: dict[str, Exception] = {}
    for check in checks:
        try:
            check()
        except (ValueError, OSError, ImportError) as error:
            for cause in causes_of(error):
                causes.setdefault(str(cause), cause)
    if len(causes) > 1:
        raise SeveralErrors(list(causes.values()))
    for cause in causes.values():
        raise cause
