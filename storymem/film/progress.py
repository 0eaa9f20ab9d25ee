"""Progress of a film: two bars in a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from storymem.film.folder import Film, ShotRecord
from storymem.story import Shot


class Progress:
    """Shows shots and denoising steps, with the time left.

    Args:
        enabled: False shows nothing.
        stream: where to; bars are drawn only if it is a terminal.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._bars = enabled and self._stream.isatty()
        self._total = self._finished = self._made = 0
        self._started = time.perf_counter()
        self._shots: tqdm | None = None
        self._steps: tqdm | None = None

    @contextmanager
    def film(self, *, total: int, finished: int) -> Iterator[None]:
        """Inside the block a film of ``total`` shots is made, of which ``finished`` exist already."""
        self._total, self._finished, self._made = total, finished, 0
        self._started = time.perf_counter()
        if not self._bars:
            if finished:
                self._print(f"{finished} of {total} shots are finished already")
            yield
            return
        self._shots = tqdm(total=total, initial=finished, desc="shots", unit="shot", file=self._stream)
        with self._shots, logging_redirect_tqdm([logging.getLogger("storymem")]):
            yield

    def begin_shot(self, shot: Shot) -> None:
        """A shot begins."""
        if self._bars:
            self._steps = tqdm(total=0, desc=f"  {shot.label}", unit="step", file=self._stream, leave=False)

    def step(self, step: int, total: int) -> None:
        """``step`` of ``total`` denoising steps are done."""
        if self._steps is not None:
            self._steps.total = total
            self._steps.update(step - self._steps.n)

    def end_shot(self, record: ShotRecord) -> None:
        """A shot is finished."""
        self._made += 1
        if self._steps is not None and self._shots is not None:
            self._steps.close()
            self._shots.update()
            return
        done = self._finished + self._made
        left = (time.perf_counter() - self._started) / self._made * (self._total - done)
        self._print(
            f"shot {done} of {self._total} (scene {record.scene}, shot {record.number}; {record.mode}): "
            f"{sum(record.seconds.values()):.1f} s, {len(record.memory)} keyframes recalled, "
            f"{len(record.keyframes)} added; about {duration(left)} left"
        )

    def _print(self, line: str) -> None:
        if self._enabled:
            print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours are added where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def film_table(film: Film) -> str:
    """A line per shot: how it was made, frames, seconds, keyframes recalled and added."""
    rows = [("shot", "scene", "mode", "frames", "seconds", "recalled", "added (frames)")]
    for shot in film.shots:
        added = ", ".join(str(keyframe.frame) for keyframe in shot.keyframes)
        rows.append(
            (
                *(str(shot.shot), f"{shot.scene}.{shot.number}", shot.mode, str(shot.frames)),
                *(f"{sum(shot.seconds.values()):.1f}", str(len(shot.memory))),
                f"{len(shot.keyframes)} ({added})" if added else "0",
            )
        )
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as right-aligned columns, the first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
