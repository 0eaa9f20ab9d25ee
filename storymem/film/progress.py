"""Progress of a film: two bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from storymem.film.manifest import Take
from storymem.film.tables import counted
from storymem.story import Shot


class Progress:
    """Shows shots and denoising steps, with the time left.

    Args:
        enabled: False shows nothing.
        stream: where to; bars are drawn only if it is a terminal.

    Attributes:
        on_preview: what is called with previews of a shot, uint8 [h, w, 3]; None: there are none.
    """

    on_preview: Callable[[np.ndarray], None] | None = None

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._bars = enabled and self._stream.isatty()
        self._total = self._making = self._made = 0
        self._started = time.perf_counter()
        self._shots: tqdm | None = None
        self._steps: tqdm | None = None

    @contextmanager
    def film(self, *, total: int, finished: int, making: int) -> Iterator[None]:
        """Inside the block ``making`` takes are made of a film of ``total`` shots, of which ``finished`` have one."""
        self._total, self._making, self._made = total, making, 0
        self._started = time.perf_counter()
        if not self._bars:
            if finished:
                self.print(f"{finished} of {total} shots are finished already")
            yield
            return
        self._shots = tqdm(total=finished + making, initial=finished, desc="shots", unit="shot", file=self._stream)
        with self._shots, logging_redirect_tqdm([logging.getLogger("storymem")]):
            yield

    def begin_shot(self, shot: Shot) -> None:
        """A shot begins."""
        self.begin(shot.label)

    def begin(self, label: str) -> None:
        """Denoising of what ``label`` names begins."""
        if self._bars:
            self._steps = tqdm(total=0, desc=f"  {label}", unit="step", file=self._stream, leave=False)

    def step(self, step: int, total: int) -> None:
        """``step`` of ``total`` denoising steps are done."""
        if self._steps is not None:
            self._steps.total = total
            self._steps.update(step - self._steps.n)

    def end_shot(self, take: Take) -> None:
        """A take is finished."""
        self._made += 1
        left = (time.perf_counter() - self._started) / self._made * (self._making - self._made)
        number = f", take {take.take}" if take.take > 1 else ""
        self.end(
            f"shot {take.shot} of {self._total} (scene {take.scene}, shot {take.number}; {take.mode}){number}: "
            f"{sum(take.seconds.values()):.1f} s, {counted(len(take.memory), 'keyframe')} recalled, "
            f"{len(take.keyframes)} added; about {duration(left)} left"
        )

    def end(self, line: str, takes: int = 1) -> None:
        """What :meth:`begin` began is finished, ``takes`` takes; ``line`` is printed where there are no bars."""
        if self._steps is not None and self._shots is not None:
            self._steps.close()
            self._shots.update(takes)
        else:
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line, unless nothing is shown."""
        if self._enabled:
            print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours are added where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
