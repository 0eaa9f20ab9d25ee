"""What a person sees while a film is made: two bars in a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from storymem.film.folder import Film, ShotRecord
from storymem.story import Shot


class Progress:
    """Tells of shots and denoising steps, with the time left.

    Args:
        enabled: False shows neither shots nor steps.
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

    def begin(self, *, total: int, finished: int) -> None:
        """A film of ``total`` shots begins, of which ``finished`` exist already."""
        self._total, self._finished, self._made = total, finished, 0
        self._started = time.perf_counter()
        if self._bars:
            self._shots = tqdm(total=total, initial=finished, desc="shots", unit="shot", file=self._stream)
        elif finished:
            self._say(f"{finished} of {total} shots are finished already")

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
        """A shot is saved."""
        self._made += 1
        if self._steps is not None:
            self._steps.close()
        if self._shots is not None:
            self._shots.update()
        elif self._enabled:
            done = self._finished + self._made
            left = (time.perf_counter() - self._started) / self._made * (self._total - done)
            self._say(
                f"shot {done} of {self._total} (scene {record.scene}, shot {record.number}; {record.mode}): "
                f"{sum(record.seconds.values()):.1f} s, memory {len(record.memory)}, "
                f"kept {len(record.keyframes)} keyframes; about {duration(left)} left"
            )

    def say(self, line: str) -> None:
        """Something about the film that a person must know; it is said even if nothing else is."""
        if self._bars:
            tqdm.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def end(self) -> None:
        """The film is finished."""
        if self._shots is not None:
            self._shots.close()

    def _say(self, line: str) -> None:
        if self._enabled:
            print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours are added where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def film_table(film: Film) -> str:
    """A line per shot: how it was made, seconds, frames, memory it saw, keyframes it left."""
    rows = [("shot", "scene", "mode", "frames", "seconds", "memory", "keyframes kept (frames)")]
    for shot in film.shots:
        kept = ", ".join(str(keyframe.frame) for keyframe in shot.keyframes)
        rows.append(
            (
                str(shot.index + 1),
                f"{shot.scene}.{shot.number}",
                shot.mode,
                str(shot.frames),
                f"{sum(shot.seconds.values()):.1f}",
                str(len(shot.memory)),
                f"{len(shot.keyframes)} ({kept})" if kept else "0",
            )
        )
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as right-aligned columns, the first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
