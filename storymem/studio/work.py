"""Films that are made one after another beside the page, with their progress."""

from __future__ import annotations

import io
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from storymem.film.progress import Progress
from storymem.io import describe_os_error
from storymem.stopping import Stopped
from storymem.story import Shot

_SHOWN = 20  # jobs that are over


class Watched(Progress):
    """Progress that a page reads from another thread, and can stop.

    Attributes:
        label: of the shot that is being made; empty before the first.
        step_done, steps: denoising steps done, of how many.
        preview: of the shot, PNG.
    """

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.label, self.step_done, self.steps = "", 0, 0
        self.preview: bytes | None = None
        self.stopping = threading.Event()

    @property
    def made(self) -> int:
        """Takes done."""
        return self._made

    @property
    def making(self) -> int:
        """Takes to be made."""
        return self._making

    def begin_shot(self, shot: Shot) -> None:
        self.label, self.step_done, self.steps, self.preview = shot.label, 0, 0, None
        self._stop_if_asked()

    def step(self, step: int, total: int) -> None:
        self._stop_if_asked()
        self.step_done, self.steps = step, total

    def on_preview(self, image: np.ndarray) -> None:
        file = io.BytesIO()
        Image.fromarray(image).resize((image.shape[1] * 4, image.shape[0] * 4)).save(file, "PNG")
        self.preview = file.getvalue()

    def _stop_if_asked(self) -> None:
        if self.stopping.is_set():
            raise Stopped(signal.SIGINT)


@dataclass(eq=False)
class Job:
    """A command that makes takes, and what has become of it.

    Args:
        command: as it is typed.
        run: runs it.
    """

    command: str
    run: Callable[[Progress], object]
    progress: Watched = field(default_factory=Watched)
    state: str = "waiting"
    warnings: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor waits."""
        return self.state not in ("running", "waiting")


class Worker:
    """Runs jobs one after another in a thread of its own.

    Attributes:
        jobs: those that run or wait, and the last 20 before them; oldest first. The list is replaced, not changed.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._adding = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio-worker")

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return not all(job.is_over for job in self.jobs)

    def add(self, job: Job) -> None:
        """Run ``job`` after those before it."""
        with self._adding:
            over = [one for one in self.jobs if one.is_over]
            self.jobs = [*over[-_SHOWN:], *(one for one in self.jobs if one not in over), job]
            self._thread.submit(_work, job)

    def stop(self) -> None:
        """Stop the job that runs at its next step, and drop those that wait."""
        for job in self.jobs:
            job.progress.stopping.set()

    def close(self) -> None:
        """Stop all jobs and end the thread."""
        self.stop()
        self._thread.shutdown()


def _work(job: Job) -> None:
    if job.progress.stopping.is_set():
        job.state = "stopped before it began"
        return
    job.state = "running"
    with _noting(job.warnings):
        job.state = outcome(lambda: job.run(job.progress))


@contextmanager
def _noting(lines: list[str]) -> Iterator[None]:
    """Inside the block warnings of this thread are added to ``lines``, and printed."""
    handler, thread = logging.StreamHandler(sys.stderr), threading.get_ident()

    def note(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            lines.append(record.getMessage())
        return True

    handler.setLevel(logging.WARNING)
    handler.addFilter(note)
    logger = logging.getLogger("storymem")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def outcome(run: Callable[[], object]) -> str:
    """Run something: "done", or why not, for the user. Faults of the program are printed in full."""
    try:
        run()
    except Stopped as stop:
        return "; ".join(["stopped", *getattr(stop, "__notes__", [])])
    except (ValueError, OSError) as error:
        return "not done: " + ((describe_os_error(error) if isinstance(error, OSError) else None) or str(error))
    except Exception as error:
        traceback.print_exc()
        return f"not done, by a fault of the program ({type(error).__name__}: {error}); the terminal shows more"
    return "done"
