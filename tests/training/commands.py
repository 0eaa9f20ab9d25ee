"""``scripts/train.py`` run as a command, on a small training set that ``prepare_data`` has made."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import storymem.training.callbacks
import storymem.wan.loading  # noqa: F401  once here, and not in every process that is forked
from storymem.data.prepare import prepare
from tests.composing import composed
from tests.data.drawn_clips import FRAMES, HEIGHT, WIDTH, scene, video

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SMALL = (
    "model=tiny",
    "runtime=cpu",
    f"model.video={{height:{HEIGHT},width:{WIDTH},frames:{FRAMES},fps:8}}",
    "model.network.text_tokens=16",
    "model.network.vae.dim_mult=[1,1,1,1]",
)
TRAIN = (
    *SMALL,
    "model.network.transformer.num_layers=1",
    *("expert=high", "adapter={rank:4,alpha:4}", "optimizer.lr=0.01", "optimizer.warmup_steps=0"),
    *("batch.size=2", "batch.max_memory=2", "log.wandb=disabled", "log.every=1", "steps=6", "checkpoint.every=3"),
)


def make_set(folder: Path) -> Path:
    """Nine clips of three groups, of which one is held out; returns the set's folder."""
    for number in range(9):
        video(folder / "videos" / str(number // 3) / f"{number}.mp4", scene(number, FRAMES), caption=f"Tiles {number}.")
    prepare_set(folder)
    return folder / "set"


def prepare_set(folder: Path) -> None:
    """``prepare_data`` again, with the settings of :func:`make_set`."""
    overrides = [
        *(f"videos={folder / 'videos'}", f"output={folder / 'set'}", *SMALL, "scorer/quality=none", "cache.given=[1]"),
        f"data.buckets=[{{frames:{FRAMES},height:{HEIGHT},width:{WIDTH}}}]",
        *("group.within=folder", "group.similarity=-1", "group.near_duplicate=0.999999", "group.valid_fraction=0.3"),
    ]
    prepare(composed(*overrides, name="prepare_data"))


class Command:
    """A command that runs in a process of its own, forked from this one: torch is imported already.

    Args:
        arguments: of ``scripts/train.py``, after those of :data:`TRAIN`.
        folder: of the file with its output.
        before: done in the process first.
    """

    def __init__(self, *arguments: str, folder: Path, before: Callable[[], object] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._printed = folder / "printed.txt"
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run([*TRAIN, *arguments], before))

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._printed.read_text() if self._printed.exists() else ""

    def until_it_prints(self, *texts: str) -> None:
        """Return once it has printed all of these."""
        deadline = time.monotonic() + 30
        while not all(text in self.printed for text in texts):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert ended is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def wait(self, seconds: float = 60) -> int:
        """Its exit status; minus the signal's number if it was killed."""
        deadline = time.monotonic() + seconds
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it does not end: {self.printed}")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(found[1])

    def _run(self, arguments: list[str], before: Callable[[], object] | None) -> int:
        """What an interpreter that runs the script would return at its end."""
        stream = os.open(self._printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for _ in range(2))
        sys.argv = [str(SCRIPT), *arguments]
        if before is None and not _autograd_works():
            for number in (1, 2):
                os.dup2(stream, number)
            os.execv(sys.executable, [sys.executable, *sys.argv])
        try:
            if before is not None:
                before()
            runpy.run_path(str(SCRIPT), run_name="__main__")
            return 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _autograd_works() -> bool:
    """Whether a forked process can train: not if threads of autograd ran before the fork."""
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        return False
    return True


def train(*arguments: str, folder: Path, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """Exit status of a command, and what it printed."""
    command = Command(*arguments, folder=folder, before=before)
    return command.wait(), command.printed
