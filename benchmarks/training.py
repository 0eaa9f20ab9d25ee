"""Where the time of a training step goes, and what a second process brings.

    python -m benchmarks.training [--quick]

Trains the toy experiment's adapter on random latents of the toy's size, with a data worker: with one process, and with
two gloo processes, whole (ddp) and sharded (fsdp). The batch of a step is the same in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem.composition import composed
from storymem.wan.spec import A14B

SHAPE = (5, 8, 12)  # latent frames, height and width of 17 frames of 96x64 pixels
TEXT = (80, 128)  # tokens and width


@dataclass(frozen=True, kw_only=True)
class DrawnClip:
    id: str
    group: int
    split: str = "train"
    bucket: tuple[int, int, int] = (17, 64, 96)
    keyframes: int = 3
    mask: bool = False


class DrawnLatents:
    """A training set of random latents: 64 clips in groups of 8."""

    spec = A14B
    clips = tuple(DrawnClip(id=str(number), group=number // 8) for number in range(64))

    @cached_property
    def _all(self) -> Tensor:
        return torch.randn(len(self.clips), 16, *SHAPE, generator=torch.Generator().manual_seed(0))

    def video(self, index: int) -> Tensor:
        return self._all[index]

    def keyframes(self, index: int) -> Tensor:
        return self._all[index, :, :3].movedim(1, 0).unsqueeze(2)

    def given(self, index: int, frames: int) -> Tensor:
        return torch.zeros(16, *SHAPE)

    def mask(self, index: int) -> Tensor:
        return torch.zeros(SHAPE)

    def text(self, index: int) -> Tensor:
        return torch.full(TEXT, index / 64)

    def empty_text(self) -> Tensor:
        return torch.zeros(TEXT)

    def cure(self, index: int) -> str:
        return ""

    def groups(self, split: str) -> dict[int, list[int]]:
        return {first: list(range(first, first + 8)) for first in range(0, 64, 8)}


class Watch:
    """Callback: wall time from the second step on, how much of it steps took, and they waited for data."""

    def __init__(self) -> None:
        self.steps = 0
        self.in_steps = self.waited = 0.0
        self.began = self.ended = 0.0

    def __call__(self, trainer: Any, report: Any) -> None:
        self.ended = time.perf_counter()
        if not self.began:
            self.began = self.ended
            return
        self.steps += 1
        self.in_steps += report.seconds
        self.waited += report.seconds_data


def measure(strategy: str, steps: int) -> dict[str, Any] | None:
    """One run; the row of the main process."""
    from storymem.config import build_settings
    from storymem.training.callbacks import peak_gb
    from storymem.training.session import Run
    from storymem.training.settings import TrainSettings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *("experiment=toy_m2v", "dataset=none", f"output={folder}", "runtime=cpu"),
            *(f"steps={steps + 1}", "validation.every=0", "samples.every=0", f"parallel.strategy={strategy}"),
        ]
        config = composed("train", overrides)
        settings = build_settings(TrainSettings, config)
        world = _world()
        settings = replace(settings, batch=replace(settings.batch, size=settings.batch.size // world))
        run = Run(settings, config, DrawnLatents())
        watch = Watch()
        # Last of the callbacks, so that what the others do counts as other.
        run.trainer.callbacks.append(watch)
        run.trainer.run()
        if not run.accelerator.is_main_process:
            run.accelerator.end_training()
            return None
        wall = watch.ended - watch.began
        row = {
            "benchmark": "training",
            "processes": world,
            "strategy": strategy if world > 1 else "one process",
            "batch": settings.batch.size * world,
            "steps": watch.steps,
            "steps_per_second": round(watch.steps / wall, 3),
            "outside": round(1 - (watch.in_steps - watch.waited) / wall, 4),
            "waiting_for_data": round(watch.waited / wall, 4),
            "peak_gb_per_process": round(peak_gb(run.accelerator.device), 3),
        }
        run.accelerator.end_training()
        return row


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def in_processes(count: int, strategy: str, steps: int) -> dict[str, Any]:
    """The row of a run in ``count`` processes of its own."""
    launch = [sys.executable, "-m"]
    if count > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    command = [*launch, "benchmarks.training", "--strategy", strategy, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 steps in place of 16")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=16, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.strategy:
        row = measure(arguments.strategy, arguments.steps)
        if row is not None:
            print(json.dumps(row))
        return
    steps = 5 if arguments.quick else arguments.steps
    print("processes  strategy      steps/s  outside forward, backward, optimizer  memory a process")
    for count, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        row = in_processes(count, strategy, steps)
        target = "  (target: at most 5 %)" if count == 1 else ""
        print(
            f"{count:9}  {row['strategy']:12}  {row['steps_per_second']:7.3f}  {100 * row['outside']:5.1f} %"
            f"{target:27}  {row['peak_gb_per_process']:.2f} GB"
        )
        print(json.dumps(row))


if __name__ == "__main__":
    main()
