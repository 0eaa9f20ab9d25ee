"""Stopping on SIGINT, SIGTERM and SIGUSR1: at once, or when the work in progress can be saved. Loads no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
_noting = False


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGUSR1 arrived; ``status`` is the exit status that the shell expects (128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 raise :class:`Stopped` in the main thread, once.

    Python delivers signals between bytecodes, so a wait in a library with a timeout ends within that timeout. Inside a
    block of :func:`noting_signals` this does nothing.
    """

    def stop(number: int, _frame: Any) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # what is being saved is not interrupted again
        raise Stopped(number)

    if _noting:
        yield
    else:
        with _handled_by(stop):
            yield


class NotedSignals:
    """The first of SIGINT, SIGTERM and SIGUSR1 that arrived in a block of :func:`noting_signals`.

    Attributes:
        number: of the signal; 0: none has arrived.
    """

    def __init__(self) -> None:
        self.number = 0
        self._raising = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside the block a signal raises :class:`Stopped` at once, as one that has arrived does: for waits."""
        self._raising = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._raising = False

    def _note(self, number: int, _frame: Any) -> None:
        self.number = self.number or number
        if self._raising:
            self._raising = False
            raise Stopped(self.number)


@contextmanager
def noting_signals() -> Iterator[NotedSignals]:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 are noted, for work that must not be interrupted anywhere."""
    global _noting
    noted = NotedSignals()
    before, _noting = _noting, _noting or threading.current_thread() is threading.main_thread()
    try:
        with _handled_by(noted._note):
            yield noted
    finally:
        _noting = before


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Python allows handlers in the main thread only; in other threads this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
