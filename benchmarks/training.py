"""Where the time of a training step goes, and what a second process brings; a step at true size.

    python -m benchmarks.training [--quick]
    python -m benchmarks.training --model wan2.2-a14b --memory 4 10 --steps 3 --json training.json

The first trains the toy experiment's adapter on random latents of the toy's size, with a data worker: with one process,
and with two gloo processes, whole (ddp) and sharded (fsdp). The batch of a step is the same in all.

The second trains the adapter of configs/experiment/MODEL_m2v*.yaml on one expert with random weights and on random
latents, one sample a step, for each size of memory, and for the last size also with cached memory. The first step is
not measured. It downloads nothing and needs no PyAV. Each case is saved as soon as it is measured; one that fails is
named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import show
from storymem.composition import composed
from storymem.wan.spec import A14B, ModelSpec

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


@dataclass(frozen=True)
class DrawnLatents:
    """A training set of random latents: 64 clips in groups of 8."""

    shape: tuple[int, int, int] = SHAPE
    text_shape: tuple[int, int] = TEXT
    spec: ModelSpec = field(default_factory=lambda: A14B)
    clips = tuple(DrawnClip(id=str(number), group=number // 8) for number in range(64))

    @cached_property
    def _all(self) -> Tensor:
        return torch.randn(
            len(self.clips), self.spec.latent_channels, *self.shape, generator=torch.Generator().manual_seed(0)
        )

    def video(self, index: int) -> Tensor:
        return self._all[index]

    def keyframes(self, index: int) -> Tensor:
        return self._all[index, :, :3].movedim(1, 0).unsqueeze(2)

    def given(self, index: int, frames: int) -> Tensor:
        return torch.zeros(self.spec.latent_channels, *self.shape)

    def mask(self, index: int) -> Tensor:
        return torch.zeros(self.shape)

    def text(self, index: int) -> Tensor:
        return torch.full(self.text_shape, index / 64)

    def empty_text(self) -> Tensor:
        return torch.zeros(self.text_shape)

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


# True size


def true_size(arguments: argparse.Namespace) -> None:
    """Measure training steps of a model at its own size, on the accelerator if there is one."""
    from storymem.commands.benchmark import matmul_ceiling, random_expert, reason_of, save
    from storymem.config import build_settings
    from storymem.training.experts import Experts, make_accelerator, prepare_expert
    from storymem.training.settings import TrainSettings
    from storymem.wan.runtime import release_memory

    (experiment,) = (Path(__file__).parents[1] / "configs/experiment").glob(f"{arguments.model}_m2v*.yaml")
    overrides = [f"experiment={experiment.stem}", "dataset=none", "parallel.strategy=ddp", "batch.accumulation=1"]
    overrides += ["expert=high"] if arguments.model == "wan2.2-a14b" else []
    overrides += ["validation.every=0", "samples.every=0", f"steps={arguments.steps}", *arguments.overrides]
    settings = build_settings(TrainSettings, composed("train", overrides))
    model, (expert,) = replace(settings.model, adapter=None), settings.trained
    if arguments.layers:
        network = model.network.transformer | {"num_layers": arguments.layers}
        model = replace(model, network=replace(model.network, transformer=network))
    accelerator = make_accelerator(None)
    device, rows = accelerator.device, []
    ceiling = matmul_ceiling(device, getattr(torch, model.dtype))
    transformer = random_expert(model, device)
    with device:
        prepare_expert(transformer, settings.adapter, seed=settings.seed)
    experts = Experts({expert: transformer}, trained=[expert], accelerator=accelerator, parallel=settings.parallel)
    cases = [*(("joint", memory) for memory in arguments.memory), ("cached", arguments.memory[-1])]
    for attention, memory in cases:
        case = replace(settings, model=replace(model, memory_attention=attention))
        row = {"benchmark": "training at true size", "model": model.name, "memory_attention": attention}
        row |= {"layers": model.network.transformer["num_layers"], "memory": memory, "ceiling_tflops": ceiling}
        try:
            row |= measure_steps(case, experts, accelerator, memory)
        except (ValueError, RuntimeError, ImportError, AssertionError) as error:
            row["refused"] = reason_of(error)
        transformer.zero_grad(set_to_none=True)
        release_memory()
        rows.append(row)
        save(arguments.json, device, rows)
        print(json.dumps(row), flush=True)


def measure_steps(settings: Any, experts: Any, accelerator: Any, memory: int) -> dict[str, Any]:
    """Seconds and VRAM of steps with ``memory`` keyframes; the first step is not measured."""
    from storymem.commands.benchmark import peak_gb, reset_peak
    from storymem.training.method import ExpertTraining
    from storymem.training.objectives.flow import loss_of
    from storymem.training.objectives.memory import SamplePlan
    from storymem.training.objectives.samples import Source, samples_of
    from storymem.training.trainer import StepReport, Trainer
    from storymem.wan.estimate import forward_flops

    model, device = settings.model, accelerator.device
    video, spec, network = model.video, model.spec, model.network
    size = spec.latent_size(video.height, video.width)
    text = (network.text_tokens, network.transformer["text_dim"])
    latents: Any = DrawnLatents((spec.latent_frames(video.frames), *size), text, spec)
    samples = samples_of(settings.objective)(
        settings.objective, Source(train=settings, latents=latents, encodings=None, count=1)
    )  # type: ignore[arg-type]
    keyframes = tuple((1 + number // 3, number % 3) for number in range(memory))
    batch = samples.read(SamplePlan(clip=0, memory=keyframes, given=0, drop_text=False, seed=0))

    def batches(start: int) -> Iterator[Any]:
        yield from repeat(batch)

    seconds: list[float] = []

    def note(trainer: Trainer, report: StepReport) -> None:
        if report.step == 1:
            reset_peak(device)
        else:
            seconds.append(report.seconds)

    objective, dtype = loss_of(settings.objective, model), getattr(torch, model.dtype)
    trainer = Trainer(
        ExpertTraining(experts, objective, info=None, dtype=dtype),
        batches,  # type: ignore[arg-type]
        accelerator=accelerator,
        optimizer=settings.optimizer,
        steps=settings.steps,
        callbacks=[note],
    )
    trainer.run()
    flops = forward_flops(
        model.transformer,
        objective.layout(batch),
        **{"height": size[0], "width": size[1], "text_tokens": text[0]},
    )
    # Forward and recomputed forward; backward once for frozen linears, which need no gradient of their weights, and
    # twice for attention. The adapter's own operations (about 3 %) are left out.
    tflop = (3 * flops.linear + 4 * flops.attention) / 1e12
    median = statistics.median(seconds)
    return {
        "rank": settings.adapter.rank,
        "trained_parameters": sum(parameter.numel() for parameter in trainer.parameters.values()),
        "video": [video.frames, video.height, video.width],
        "tokens": flops.tokens,
        "seconds": median,
        "all_seconds": seconds,
        "tflop": tflop,
        "tflops": tflop / median,
        "peak_gb": peak_gb(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 steps in place of 16")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=16, help="of each run, the first of which is not measured")
    parser.add_argument("--model", help="measure at true size: wan2.2-a14b or wan2.2-ti2v-5b")
    parser.add_argument("--memory", type=int, nargs="+", default=[4, 10], help="numbers of keyframes, at true size")
    parser.add_argument("--layers", type=int, help="keep so many of the model's layers, for small devices")
    parser.add_argument("--json", type=Path, default=Path("training.json"), help="where figures at true size are saved")
    parser.add_argument("overrides", nargs="*", help="key=value at true size, as for storymem train")
    arguments = parser.parse_args()
    if arguments.model:
        true_size(arguments)
        return
    if arguments.strategy:
        row = measure(arguments.strategy, arguments.steps)
        if row is not None:
            print(json.dumps(row))
        return
    steps = 5 if arguments.quick else arguments.steps
    print("outside: share of the time outside forward, backward and optimizer (target for one process: at most 0.05)")
    show(
        "training", [in_processes(count, strategy, steps) for count, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))]
    )


if __name__ == "__main__":
    main()
