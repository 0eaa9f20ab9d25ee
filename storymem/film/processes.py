"""One film by several processes: the first runs the shot loop, the others generate each shot together with it.

Only the first process reads the story, selects keyframes and writes files. It broadcasts every call of its shot
generator, so all processes agree, and a film is resumed as by one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from storymem.film.parts import ShotGenerator
from storymem.wan.parallel import join, leave, take_accelerator
from storymem.wan.processes import Launch
from storymem.wan.settings import VideoSettings
from storymem.wan.shots import Candidates, OnStep, ShotRequest
from storymem.wan.spec import Expert

_PATIENCE = timedelta(days=1)  # for which the others wait while the first scores frames and writes files

LOST = "another process of this film has ended, so this one ends too; the same command resumes at the unfinished shot"


class SharedGenerator:
    """The shot generator of the first process: all processes run each call; see ``ShotGenerator`` for the methods.

    Args:
        generator: this process's own.
        group: the processes, for messages between CPUs.
    """

    def __init__(self, generator: ShotGenerator, group: dist.ProcessGroup) -> None:
        self.generator, self.group = generator, group
        self._calling = False

    @property
    def video(self) -> VideoSettings:
        return self.generator.video

    @property
    def expert_names(self) -> tuple[Expert, ...]:
        return self.generator.expert_names

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        self._call("prepare", list(prompts), list(negative_prompts))

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        return self._call("first", request, on_step=on_step)

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        return self._call("generate", request, on_step=on_step)

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]:
        return self._call("encode_keyframes", list(frames))

    def choose(self, candidates: Candidates, local: int, whole: int, expert: Expert | None = None) -> list[int]:
        return self._call("choose", candidates, local, whole, expert)

    def dismiss(self) -> None:
        """End the others, unless they are inside a call, where no message reaches them."""
        if not self._calling:
            dist.broadcast_object_list([None], src=0, group=self.group)

    def _call(self, name: str, *arguments: Any, **own: Any) -> Any:
        """Call a method here and on all others; ``own`` arguments are for this process alone."""
        self._calling = True
        dist.broadcast_object_list([(name, arguments)], src=0, group=self.group)
        result = getattr(self.generator, name)(*arguments, **own)
        self._calling = False
        return result


@contextmanager
def among_processes(generator: ShotGenerator, launch: Launch, device: torch.device) -> Iterator[ShotGenerator | None]:
    """A generator that works together with those of the other processes; with one process, ``generator`` itself.

    The first process makes the film in the block. The others do their part before the block begins, and get None.

    Raises:
        SystemExit: if another process has ended; the first to notice prints it.
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
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo has no exception of its own
            _end(store)
        raise
    leave()


def _follow(generator: ShotGenerator, group: dist.ProcessGroup) -> None:
    """Run the calls of the first process until it dismisses this one."""
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
    except KeyboardInterrupt as stop:  # Ctrl-C reaches all processes, and the first prints the message
        raise SystemExit(getattr(stop, "status", 130)) from None


def _end(store: dist.Store) -> NoReturn:
    try:
        is_first_to_notice = store.add("storymem/lost", 1) == 1
    except RuntimeError:  # the store ended with the process that held it
        is_first_to_notice = True
    raise SystemExit(LOST if is_first_to_notice else 1)
