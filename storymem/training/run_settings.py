"""Settings of a training run, but for its objective; loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, StoryPath, UserPath, check_bounds
from storymem.film.settings import MemorySettings
from storymem.scorers import ScorerSettings
from storymem.wan.settings import MAX_SEED, Continuity, ModelSettings, SamplerSettings
from storymem.wan.spec import Expert

Conditioning = Literal["m2v", "mi2v", "mm2v"]
LayoutName = Literal["storymem", "released", "diffusers", "comfyui"]
#: How many first frames of the target a sample may be given: none, its first frame, or its motion frames.
GIVEN_FRAMES: dict[Conditioning, int] = {"m2v": 0, "mi2v": 1, "mm2v": 5}
#: How shots of the sample film continue the shot before.
CONTINUITY: dict[Conditioning, Continuity] = {"m2v": "none", "mi2v": "mi2v", "mm2v": "mm2v"}
MAX_STEPS = 99_999_999  # the names of checkpoints have eight digits
_ABOVE_0, _BELOW_1 = 1e-12, 1 - 1e-9


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterTrainingSettings:
    """The LoRA that is trained, by default the published one.

    Args:
        rank: of the low-rank matrices.
        alpha: W + scale * B @ A with scale = alpha / sqrt(rank) under rsLoRA, else alpha / rank.
        use_rslora: which of the two.
        dropout: on the input of the low-rank path.
        start: an adapter to begin from (a folder in any layout, or a hub id on this machine); null begins at zero.
    """

    rank: int = 128
    alpha: float = 128.0
    use_rslora: bool = True
    dropout: float = 0.05
    start: UserPath | None = None

    def __post_init__(self) -> None:
        check_bounds(self, rank=(1, 4096), alpha=(_ABOVE_0, 1e6), dropout=(0, 0.999))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchSettings:
    """What a training step consists of (paper section 3.3).

    Args:
        size: samples that a process computes at once.
        accumulation: how many such batches a process adds up in one step; a step has
            ``size * accumulation * processes`` samples.
        max_memory: the most memory frames M; each step draws its M from 0..max_memory (objective=memory).
        given_probability: how often a sample is given its first frame (mi2v) or motion frames (mm2v).
        text_dropout: how often the text is left out.
        workers: threads that read the cache ahead of the training; 0 reads each batch when it is needed.
    """

    size: int = 1
    accumulation: int = 1
    max_memory: int = 10
    given_probability: float = 0.5
    text_dropout: float = 0.1
    workers: int = 2

    def __post_init__(self) -> None:
        check_bounds(self, size=(1, 4096), accumulation=(1, 65536), max_memory=(0, 1000), workers=(0, 256))
        check_bounds(self, given_probability=(0, 1), text_dropout=(0, 1))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSettings:
    """AdamW, its schedule and the moving average.

    Args:
        lr: the learning rate after the warm-up.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: over which the rate rises from 0.
        schedule: constant_with_warmup, cosine or linear: the rate from then to the last step.
        max_grad_norm: gradients are clipped to this norm; null: never.
        ema_decay: of the moving average of the parameters, which is then what is validated, sampled and exported; it
            follows faster in the first steps. null: no average.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_bounds(self, lr=(_ABOVE_0, 1), weight_decay=(0, 1), warmup_steps=(0, MAX_STEPS))
        check_bounds(self, max_grad_norm=(_ABOVE_0, 1e9), ema_decay=(_ABOVE_0, _BELOW_1))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {list(self.betas)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelSettings:
    """How the networks lie on the processes that ``torchrun`` or ``accelerate launch`` starts.

    Args:
        strategy: "ddp": every process has the whole experts, and an idle expert lies in RAM; "fsdp": every process has
            a share of every expert (FSDP2).
        gradient_checkpointing: recompute each block in the backward pass instead of storing its activations.
        alternate_every: with both experts in one run, the number of steps until the other trains. Each change moves
            two experts between RAM and accelerator, unless they are sharded.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    alternate_every: int = 1

    def __post_init__(self) -> None:
        check_bounds(self, alternate_every=(1, MAX_STEPS))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointSettings:
    """When the state of the run is saved.

    Args:
        every: steps between checkpoints; the last step and a stop by SIGTERM, SIGINT or SIGUSR1 save too.
        keep: how many checkpoints stay; older ones are removed.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_bounds(self, every=(1, MAX_STEPS), keep=(1, 100_000))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationSettings:
    """Loss on held-out groups, each time with the same noise and timesteps.

    Args:
        every: steps between validations; 0: none.
        samples: how many.
    """

    every: int = 0
    samples: int = 16

    def __post_init__(self) -> None:
        check_bounds(self, every=(0, MAX_STEPS), samples=(1, 1_000_000))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleSettings:
    """A film of a fixed story, generated while training.

    Args:
        every: steps between films; 0: none.
        story: the story file.
        seed: of the film, the same each time.
    """

    every: int = 0
    story: StoryPath | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, every=(0, MAX_STEPS), seed=(0, MAX_SEED))
        if self.every and self.story is None:
            raise ValueError("story must name a story file if every is above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogSettings:
    """Where metrics go; the run's folder has all of them, with or without wandb.

    Args:
        every: steps between rows of ``metrics.jsonl``.
        wandb: "offline" writes into the run's folder, for ``wandb sync``; "online" sends at once; "disabled".
        project: of wandb.
    """

    every: int = 10
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "storymem"

    def __post_init__(self) -> None:
        check_bounds(self, every=(1, MAX_STEPS))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingRuntimeSettings:
    """Where training runs; how the networks lie on several devices is set by ``parallel``.

    Args:
        device: "auto" (the accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
    """

    device: str = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunSettings:
    """Everything ``train`` can be given, but what is trained.

    Args:
        dataset: the output folder of ``prepare_data``, or a cache in it.
        output: the run's folder.
        model: the base; the memory adapter it may name is not loaded, see ``adapter.start``.
        expert: high, low, or both in turns in one run.
        conditioning: beyond memory, what a sample may be given of its target: nothing (m2v), its first frame (mi2v),
            its first five frames (mm2v).
        steps: of the optimizer; with both experts, of the two together.
        seed: of everything random.
        resume: "auto" resumes from the newest checkpoint in ``output``; "never" refuses a folder that holds a run.
        export: layouts of the finished adapter: storymem, released, diffusers, comfyui. Without an adapter the whole
            base is written instead, as a folder ``model`` that ``model.weights.source`` loads.
        adapter: null: no adapter; all parameters of the experts train.
        sampler: of the sample film, as ``memory``, ``scorer``.
        dry_run: check everything and print the plan.
    """

    dataset: UserPath
    model: ModelSettings
    sampler: SamplerSettings
    memory: MemorySettings
    scorer: ScorerSettings
    output: UserPath = "runs/memory"
    runtime: TrainingRuntimeSettings = field(default_factory=TrainingRuntimeSettings)
    expert: Literal["high", "low", "both"] = "both"
    conditioning: Conditioning = "m2v"
    steps: int = 20000
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    export: tuple[LayoutName, ...] = ("storymem",)
    adapter: AdapterTrainingSettings | None = field(default_factory=AdapterTrainingSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    log: LogSettings = field(default_factory=LogSettings)
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, steps=(1, MAX_STEPS), seed=(0, MAX_SEED))
        if not set(self.trained) <= set(self.model.spec.experts):
            raise ValueError(f"expert={self.expert}: {self.model.spec.name} has one expert; write expert=both")
        if self.model.dtype == "float16":
            raise ValueError("model.dtype=float16 overflows in training: use bfloat16 or float32")
        if self.adapter is None and self.model.gguf is not None:
            raise ValueError("adapter=null trains all parameters, and model.gguf is quantised: set it to null")
        if self.sampler.adapter is not None:
            raise ValueError("sampler.adapter is for generation: the sample film uses the trained networks alone")
        if not self.export or len(set(self.export)) < len(self.export):
            raise ValueError("export must name one or more of storymem, released, diffusers, comfyui, each once")

    @property
    def splits(self) -> tuple[Literal["train", "valid"], ...]:
        """The parts of the training set that the run reads."""
        return ("train", "valid") if self.validation.every else ("train",)

    @property
    def trained(self) -> tuple[Expert, ...]:
        """The experts of the base that train."""
        named: dict[str, tuple[Expert, ...]] = {"high": ("high_noise",), "low": ("low_noise",)}
        return named.get(self.expert, self.model.spec.experts)
