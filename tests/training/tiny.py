"""A training set in memory and a run of real classes at the smallest size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from storymem.config import build_settings
from storymem.data.cache import Split
from storymem.training.batches import train_batches
from storymem.training.experts import Experts, load_start, make_accelerator, prepare_expert
from storymem.training.method import ExpertTraining
from storymem.training.objectives.memory import MemoryObjective, MemorySamples
from storymem.training.objectives.samples import Source
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.training.run_log import METRICS
from storymem.training.run_settings import AdapterTrainingSettings, BatchSettings, OptimizerSettings, ParallelSettings
from storymem.training.session import Run
from storymem.training.settings import TrainSettings
from storymem.training.trainer import Trainer
from storymem.wan.lora import AdapterInfo
from storymem.wan.segments import Layout
from storymem.wan.spec import A14B, ModelSpec
from storymem.wan.transformer import enable_layouts
from tests import stories

ADAPTER = AdapterTrainingSettings(rank=4, alpha=4.0, dropout=0.1)
BATCH = BatchSettings(size=2, max_memory=2, workers=0)
OPTIMIZER = OptimizerSettings(lr=1e-2, warmup_steps=0)


@dataclass(frozen=True)
class TinyClip:
    id: str
    group: int
    split: Split
    bucket: tuple[int, int, int]
    keyframes: int
    mask: bool = True
    caption: str = ""


@dataclass(frozen=True)
class MemoryLatents:
    """Random latents by seed, made when they are asked for."""

    clips: tuple[TinyClip, ...]
    spec: ModelSpec = A14B

    def _drawn(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def _shape(self, index: int) -> tuple[int, int, int]:
        frames, height, width = self.clips[index].bucket
        return (frames - 1) // 4 + 1, height // 8, width // 8

    def video(self, index: int) -> Tensor:
        return self._drawn(10 * index, 16, *self._shape(index))

    def keyframes(self, index: int) -> Tensor:
        return self._drawn(10 * index + 1, self.clips[index].keyframes, 16, 1, *self._shape(index)[1:])

    def given(self, index: int, frames: int) -> Tensor:
        blank = torch.full((16, *self._shape(index)), 0.5)
        slots = {0: 0, 1: 1, 5: 2}[frames]
        blank[:, :slots] = self.video(index)[:, :slots]
        return blank

    def mask(self, index: int) -> Tensor:
        """The left half of even clips."""
        mask = torch.zeros(self._shape(index))
        mask[..., : mask.shape[-1] // 2 if index % 2 == 0 else 0] = 1.0
        return mask

    def text(self, index: int) -> Tensor:
        return self._drawn(10 * index + 2, 16, 16)

    def empty_text(self) -> Tensor:
        return torch.zeros(16, 16)

    def cure(self, index: int) -> str:
        return "draw them again"

    def groups(self, split: Split) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index, clip in enumerate(self.clips):
            if clip.split == split:
                found.setdefault(clip.group, []).append(index)
        return found

    @cached_property
    def by_id(self) -> dict[str, TinyClip]:
        return {clip.id: clip for clip in self.clips}


class Broken(MemoryLatents):
    """One clip of the set holds a NaN."""

    def video(self, index: int) -> Tensor:
        found = super().video(index)
        return found * float("nan") if self.clips[index].id == "clip1_0" else found


class Huge(MemoryLatents):
    """One clip of the set is finite, and the square of its latents is not."""

    def video(self, index: int) -> Tensor:
        found = super().video(index)
        return found * 1e30 if self.clips[index].id == "clip1_0" else found


class Recorder(nn.Module):
    """A network that notes what it was called with."""

    dtype = torch.float32

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, layout: Layout, **_: object) -> tuple[Tensor]:
        self.seen = (x, timestep, text, layout)
        return (torch.zeros_like(x[:, :16]),)


def latents(groups: int = 2, size: int = 3, keyframes: int = 2, valid: int = 1) -> MemoryLatents:
    """Groups of equal size; the last ``valid`` are held out. All at the size of ``tests.stories.MODEL``."""
    return MemoryLatents(
        tuple(
            TinyClip(f"clip{group}_{k}", group, "train" if group < groups else "valid", (9, 32, 48), keyframes)
            for group in range(groups + valid)
            for k in range(size)
        )
    )


def expert(seed: int = 0, width: int = 12) -> WanTransformer3DModel:
    """A transformer of two blocks and two heads of ``width`` channels."""
    shape = stories.MODEL.network.transformer | {"num_layers": 2, "attention_head_dim": width}
    torch.manual_seed(seed)
    made = WanTransformer3DModel(**shape, in_channels=36)
    enable_layouts(made)
    return made


def method(
    *names: Any,
    adapter: AdapterTrainingSettings = ADAPTER,
    parallel: ParallelSettings | None = None,
    accelerator: Accelerator | None = None,
    width: int = 12,
) -> ExpertTraining:
    """The method over freshly drawn experts of two blocks."""
    parallel = parallel or ParallelSettings()
    transformers = {name: expert(number, width) for number, name in enumerate(names)}
    for number, (name, transformer) in enumerate(transformers.items()):
        prepare_expert(transformer, adapter, seed=number)
        if adapter.start is not None:
            load_start(transformer, name, adapter.start)
    experts = Experts(transformers, trained=names, accelerator=accelerator or make_accelerator(CPU), parallel=parallel)
    objective = MemoryObjective(settings=MemoryObjectiveSettings(), boundary=0.9, rope_stride=5)
    numbers = {"rank": adapter.rank, "alpha": adapter.alpha, "use_rslora": adapter.use_rslora}
    info = AdapterInfo(**numbers, conditioning="m2v", training={"note": "a test"})
    return ExpertTraining(experts, objective, info=info, alternate_every=parallel.alternate_every)


def source(
    data: MemoryLatents, *, count: int = 8, split: Split = "train", encodings: Any = None, **changes: Any
) -> Source:
    """Where samples are drawn from; ``changes`` are to the settings of the run."""
    values = config(Path("nowhere"), **{"batch": asdict(changes.pop("batch", BATCH))} | changes)
    train = build_settings(TrainSettings, values)
    return Source(train=train, latents=data, encodings=encodings, count=count, split=split)  # type: ignore[arg-type]


def trainer(
    of: ExpertTraining,
    *,
    accelerator: Accelerator | None = None,
    batch: BatchSettings = BATCH,
    data: MemoryLatents | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer over ``latents()``; ``changes`` are its arguments."""
    accelerator = accelerator or make_accelerator(CPU)
    data = data or latents()
    world, rank = accelerator.num_processes, accelerator.process_index
    count = batch.size * batch.accumulation * world
    samples = MemorySamples(MemoryObjectiveSettings(), source(data, batch=batch, count=count))
    arguments: dict[str, Any] = {"optimizer": OPTIMIZER, "steps": 3, "accumulation": batch.accumulation}
    return Trainer(
        of,
        lambda start: train_batches(
            samples, size=batch.size, workers=batch.workers, rank=rank, world=world, start=start
        ),
        accelerator=accelerator,
        **arguments | changes,
    )


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A composed configuration of a small run into ``folder``, as plain containers."""
    clip = {"_target_": "storymem.scorers.clip.ClipScorer.from_config", "config": stories.CLIP}
    values: dict[str, Any] = {
        "dataset": "in memory",
        "output": str(folder),
        "model": asdict(stories.MODEL),
        "sampler": asdict(stories.SAMPLER),
        "memory": {
            "recall": {"_target_": "storymem.memory.SinkAndRecent", "capacity": 2, "sink": 1},
            "selector": {"_target_": "storymem.memory.KeyframeSelector"},
        },
        "scorer": {"clip": clip, "quality": {"_target_": "storymem.scorers.scorer.NoQuality"}},
        "runtime": {"device": "cpu"},
        "steps": 6,
        "seed": 0,
        "adapter": asdict(ADAPTER),
        "batch": asdict(BATCH),
        "optimizer": {"lr": 0.01, "warmup_steps": 2, "ema_decay": 0.9},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 1, "wandb": "disabled"},
    }
    return values | changes


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def run(folder: Path, data: MemoryLatents | None = None, **changes: Any) -> Run:
    """A run of a training set in memory, ready to go."""
    values = config(folder, **changes)
    return Run(build_settings(TrainSettings, values), values, data or latents())


CPU = torch.device("cpu")
