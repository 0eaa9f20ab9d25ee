"""The settings of ``train.yaml``. Loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.film.settings import MemorySettings, ScorerSettings
from storymem.training.settings import (
    MAX_STEPS,
    AdapterTrainingSettings,
    BatchSettings,
    CheckpointSettings,
    Conditioning,
    LayoutName,
    LogSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ParallelSettings,
    SampleSettings,
    ValidationSettings,
    WhichExpert,
    check_memory_weight,
    refuse_generation_settings,
)
from storymem.wan.settings import MAX_SEED, Continuity, ModelSettings, RuntimeSettings, SamplerSettings
from storymem.wan.spec import Expert


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainSettings:
    """Everything ``scripts/train.py`` can be told.

    Args:
        dataset: the output folder of ``prepare_data``, or a cache in it.
        output: the run's folder.
        model: the base; the adapter it may name is not loaded, see ``adapter.start``.
        expert: which of the two trains; both take turns in one run.
        conditioning: beyond memory, what a sample may be given of its target: nothing (m2v), its first frame (mi2v),
            its first five frames (mm2v).
        steps: of the optimizer; with both experts, of the two together.
        seed: of everything random.
        resume: "auto" goes on from the newest checkpoint in ``output``; "never" refuses a folder that holds a run.
        export: in which layouts the finished adapter is written.
        sampler: of the story that is told while training, as ``memory``, ``scorer``.
        runtime: ``device`` alone; how networks lie on several is said by ``parallel``.
    """

    dataset: UserPath
    output: UserPath
    model: ModelSettings
    sampler: SamplerSettings
    memory: MemorySettings
    scorer: ScorerSettings
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    expert: WhichExpert = "both"
    conditioning: Conditioning = "m2v"
    steps: int = 20000
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    export: tuple[LayoutName, ...] = ("storymem",)
    adapter: AdapterTrainingSettings = field(default_factory=AdapterTrainingSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def trained(self) -> tuple[Expert, ...]:
        """The experts of the base that train."""
        named: dict[WhichExpert, tuple[Expert, ...]] = {"high": ("high_noise",), "low": ("low_noise",)}
        return named.get(self.expert, self.model.spec.experts)

    def __post_init__(self) -> None:
        if not set(self.trained) <= set(self.model.spec.experts):
            raise ValueError(f"expert={self.expert}: {self.model.spec.name} has one expert; write expert=both")
        check_bounds(self, steps=(1, MAX_STEPS), seed=(0, MAX_SEED))
        if self.model.dtype == "float16":
            raise ValueError("model.dtype=float16 overflows in training: use bfloat16 or float32")
        check_memory_weight(self.objective, self.model.memory_attention)
        if self.runtime.offload not in ("none", "auto"):
            raise ValueError("runtime.offload is for generation; to save memory in training see parallel")
        refuse_generation_settings(self.runtime, "training")
        if self.runtime.spread:
            raise ValueError(
                "runtime.context_parallel, guidance_parallel and shard_weights are for generation; in training several "
                "processes are for the batch: see parallel"
            )
        if self.sampler.adapter is not None:
            raise ValueError("sampler.adapter is for generation: an adapter in training is sampled without another")
        if not self.export or len(set(self.export)) < len(self.export):
            raise ValueError("export must name one or more of storymem, released, diffusers, comfyui, each once")


#: How the story is gone on with that is told while training.
CONTINUITY: dict[Conditioning, Continuity] = {"m2v": "none", "mi2v": "mi2v", "mm2v": "mm2v"}
