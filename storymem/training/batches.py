"""Batches for the training loop: samples of one size, read ahead of the training.

Everything random in a sample follows from the run's seed, the step and the sample's place in the step, and from nothing
else: not from the number of processes or readers, nor from where a run was interrupted. What a sample is made of is the
objective's choice; see :mod:`storymem.training.objectives`.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from storymem.data.manifest import digest
from storymem.training.objectives.samples import Batch, Samples, collate

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache

_AHEAD = 4  # batches that each reader is ahead of the training
_SLOW_SECONDS = 60  # after which a wait for data is reported
_END_SECONDS = 2.0  # how long readers are waited for: a read that hangs cannot be interrupted


def training_set_digest(latents: LatentCache) -> str:
    """A short hash of all that decides which samples a seed draws from a training set."""
    clips = [(clip.id, clip.bucket, clip.keyframes, clip.mask) for clip in latents.clips]
    return digest(clips, latents.groups("train"))


def train_batches(
    samples: Samples,
    *,
    size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
) -> Generator[Batch, None, None]:
    """The batches of one process from step ``start`` on, without end. Close it to end the threads that read.

    Args:
        size: samples of a batch; divides the process's share of a step.
        workers: threads that read ahead; 0: a batch is read when it is needed.
        rank: the number of the process, of ``world`` processes.
    """
    share = samples.count // world

    def plans() -> Iterator[Sequence[Any]]:
        for step in itertools.count(start):
            mine = samples.plan(step)[rank * share : (rank + 1) * share]
            yield from (mine[first : first + size] for first in range(0, share, size))

    def read(plans: Sequence[Any]) -> Batch:
        return collate([samples.read(plan) for plan in plans])

    yield from map(read, plans()) if workers == 0 else _read_ahead(read, plans(), workers)


def _read_ahead(
    read: Callable[[Sequence[Any]], Batch], turns: Iterator[Sequence[Any]], workers: int
) -> Generator[Batch, None, None]:
    """``read`` of each turn, in order, by threads that stay a few turns ahead; their errors are raised here.

    Threads and not processes, as reading tensors releases the interpreter lock and nothing passes through shared
    memory; not an executor, whose threads cannot be daemons.
    """
    asked: queue.SimpleQueue[tuple[Future[Batch], Sequence[Any]] | None] = queue.SimpleQueue()
    waiting: deque[Future[Batch]] = deque()

    def work() -> None:
        while (job := asked.get()) is not None:
            future, plans = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(read(plans))
                except Exception as error:
                    future.set_exception(error)

    # Daemons: a read that hangs must not keep the process from ending.
    threads = [threading.Thread(target=work, name=f"reader-{number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            while len(waiting) < _AHEAD * workers:
                waiting.append(Future())
                asked.put((waiting[-1], next(turns)))
            future = waiting.popleft()
            if not wait([future], timeout=_SLOW_SECONDS).done:
                print(f"no data for {_SLOW_SECONDS} s: is the disk of the training set available?", file=sys.stderr)
            yield future.result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            asked.put(None)
        deadline = time.monotonic() + _END_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
