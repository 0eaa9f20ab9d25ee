"""What a person sees while a step runs: a bar in a terminal, a line now and then elsewhere, both with the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class StepProgress:
    """Counts the items of one step.

    Args:
        name: of the step.
        total: number of items, those finished earlier included.
        finished: how many were finished earlier.
        stream: where to; standard error by default.
    """

    def __init__(self, name: str, *, total: int, finished: int = 0, stream: TextIO | None = None) -> None:
        self.name, self.total, self.finished = name, total, finished
        self._stream = stream or sys.stderr
        self._done = 0
        self._started = self._told = time.perf_counter()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=finished, desc=name, file=self._stream)
        elif finished:
            self._say(f"{name}: {finished} of {total} are done already")

    def advance(self, count: int = 1) -> None:
        """``count`` more items are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.perf_counter() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.perf_counter()
            rate = self._done / (self._told - self._started)
            left = (self.total - self.finished - self._done) / rate
            self._say(
                f"{self.name}: {self.finished + self._done} of {self.total}, {rate:.3g} a second, "
                f"about {tqdm.format_interval(left)} left"
            )

    def end(self, summary: str) -> None:
        """The step is over."""
        if self._bar is not None:
            self._bar.close()
        self._say(f"{self.name}: {summary} ({tqdm.format_interval(time.perf_counter() - self._started)})")

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
