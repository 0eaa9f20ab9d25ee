"""One film by several processes: the first tells the story, the others make each shot together with it.

Only the first process reads the story, chooses keyframes, and writes. What it asks of its shot generator it asks of
all, so they agree on every decision by being told of it, and a film is resumed as by one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from storymem.wan.parallel import join, leave, take_accelerator
from storymem.wan.processes import Launch
from storymem.wan.settings import VideoSettings
from storymem.wan.shots import OnStep, ShotRequest

if TYPE_CHECKING:
    from storymem.film.storyteller import ShotGenerator

# How long the others wait for the first while it scores frames and writes files.
_PATIENCE = timedelta(days=1)

LOST = "another process of this film has ended, so this one ends too; the same command goes on with the unfinished shot"


class SharedGenerator:
    """The shot generator of the first process: the others do all that is asked of it.

    Args:
        generator: makes this process's part.
        group: the processes, for messages between CPUs.
    """

    def __init__(self, generator: ShotGenerator, group: dist.ProcessGroup) -> None:
        self.generator, self.group = generator, group
        self._at_work = False

    @property
    def video(self) -> VideoSettings:
        """Size, length and rate of the shots."""
        return self.generator.video

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        """See :class:`storymem.film.storyteller.ShotGenerator`, as for the other methods."""
        self._together("prepare", list(prompts), list(negative_prompts))

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        return self._together("first", request, on_step=on_step)

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        return self._together("generate", request, on_step=on_step)

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]:
        return self._together("encode_keyframes", list(frames))

    def dismiss(self) -> None:
        """Let the others go, unless they are in the middle of something, from which they cannot be called."""
        if not self._at_work:
            dist.broadcast_object_list([None], src=0, group=self.group)

    def _together(self, name: str, *arguments: Any, **own: Any) -> Any:
        """Call a method here and on all others; ``own`` is for this process alone."""
        self._at_work = True
        dist.broadcast_object_list([(name, arguments)], src=0, group=self.group)
        result = getattr(self.generator, name)(*arguments, **own)
        self._at_work = False
        return result


@contextmanager
def among_ranks(generator: ShotGenerator, launch: Launch, device: torch.device) -> Iterator[ShotGenerator | None]:
    """A generator that works together with those of the other processes; with one process, ``generator`` itself.

    In the first process the block tells the story. The others do their part before the block begins, and get None.

    Raises:
        SystemExit: if another process has ended; the first to notice says so.
        ValueError: if the machine lacks accelerators.
    """
    if launch.world == 1:
        if launch.teams > 1:
            take_accelerator(launch, device)
        yield generator
        return
    store = join(launch, device)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "all processes are in it"
    try:
        if launch.is_first:
            shared = SharedGenerator(generator, group)
            try:
                yield shared
            finally:
                shared.dismiss()
        else:
            _follow(generator, group)
            yield None
    except RuntimeError as error:
        if _is_loss(error):
            _end(store)
        raise
    leave()


def _follow(generator: ShotGenerator, group: dist.ProcessGroup) -> None:
    """Do what the first process asks for, until it asks for nothing more."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    message: list[Any] = [None]
    try:
        while True:
            dist.broadcast_object_list(message, src=0, group=group)
            if message[0] is None:
                return
            name, arguments = message[0]
            getattr(generator, name)(*arguments)
    except KeyboardInterrupt as stop:  # Ctrl-C reaches all, and the first says so
        raise SystemExit(getattr(stop, "status", 130)) from None


def _is_loss(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone. gloo has no exception of its own for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _end(store: dist.Store) -> NoReturn:
    try:
        is_first_to_say = store.add("storymem/lost", 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        is_first_to_say = True
    raise SystemExit(LOST if is_first_to_say else 1)
