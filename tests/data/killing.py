"""Processes that are killed in the middle of writing files, at a moment given by a number."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forking import fork

_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir"}


def run_killed(work: Callable[[], Any], folder: Path, at: int) -> int:
    """Run ``work`` in a process that is killed (SIGKILL) right before it opens, renames, removes or makes anything in
    ``folder`` for the ``at``-th time, counted from 0.

    Returns:
        its exit status: 0 if it ended before that, minus the signal's number if it was killed.
    """
    left = at

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _CHANGES and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted() -> None:
        sys.addaudithook(count)
        work()

    (status,) = fork(1, counted)
    return status


def count_changes(work: Callable[[], Any], folder: Path) -> int:
    """How many moments :func:`run_killed` knows in ``work``, which is done once."""
    reader, writer = os.pipe()
    counted = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        counted += (
            event in _CHANGES and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(folder))
        )

    def printed() -> None:
        sys.addaudithook(count)
        work()
        os.write(writer, str(counted).encode())

    assert fork(1, printed) == [0]
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())
