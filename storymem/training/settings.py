"""Settings of ``train.yaml``: the adapter, its data, its optimisation, and what is done beside; loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.wan.settings import MAX_SEED, MemoryMode, RuntimeSettings

Conditioning = Literal["m2v", "mi2v", "mm2v"]
#: How many first frames of the target a sample may be given: none, its first frame, or its motion frames.
GIVEN_FRAMES: dict[Conditioning, int] = {"m2v": 0, "mi2v": 1, "mm2v": 5}

WhichExpert = Literal["high", "low", "both"]
#: The names of checkpoints have eight digits.
MAX_STEPS = 99_999_999
LayoutName = Literal["storymem", "released", "diffusers", "comfyui"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterTrainingSettings:
    """The LoRA that is trained, by default the published one.

    Args:
        rank: of the low-rank matrices.
        alpha: W + scale * B @ A with scale = alpha / sqrt(rank) under rsLoRA, else alpha / rank.
        use_rslora: which of the two.
        dropout: on the input of the low-rank path.
        start: an adapter to begin from (a folder in any layout, or a hub id on this machine); None begins at zero.
    """

    rank: int = 128
    alpha: float = 128.0
    use_rslora: bool = True
    dropout: float = 0.05
    start: UserPath | None = None

    def __post_init__(self) -> None:
        _check_above_0(self, "alpha")
        check_bounds(self, rank=(1, 4096), alpha=(0, 1e6))
        _check_probability("dropout", self.dropout)
        if self.dropout == 1:
            raise ValueError("dropout=1 would drop the whole adapter; write less, for example 0.05")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchSettings:
    """What a training step is made of (paper section 3.3).

    Args:
        size: samples that a process runs at once.
        accumulation: how many such batches a process adds up in one step; so a step sees
            ``size * accumulation * processes`` samples.
        max_memory: the most memory frames M; each step draws its M from 0..max_memory.
        given_probability: how often a sample is given its first frame (MI2V) or motion frames (MM2V); M2V never is.
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
        _check_probability("given_probability", self.given_probability)
        _check_probability("text_dropout", self.text_dropout)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveSettings:
    """Flow matching.

    Args:
        shift: of the noise levels, s = shift * u / (1 + (shift - 1) * u) with u uniform; as the sampler's, 4.0.
        memory_weight: weight of the loss of a memory slot against that of a video slot; 0 trains on the video alone,
            and is needed in the ``cached`` memory mode, where memory slots predict nothing.
        mask_weight: how often the loss of a place where a clip's mask is white counts, against one where it is black;
            1, as published, looks at no mask.
        bins: in how many equal bins of s from 0 to 1 the loss is told.
    """

    shift: float = 4.0
    memory_weight: float = 1.0
    mask_weight: float = 1.0
    bins: int = 10

    def __post_init__(self) -> None:
        _check_above_0(self, "shift")
        if self.mask_weight <= 0:
            raise ValueError(f"mask_weight must be above 0, not {self.mask_weight}; 1 looks at no mask")
        check_bounds(self, shift=(0, 1000), memory_weight=(0, 1e6), mask_weight=(0, 1e6), bins=(1, 1000))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSettings:
    """AdamW and what goes with it.

    Args:
        name: "adamw", or "adamw_8bit" (bitsandbytes, on an accelerator), whose state is a quarter in size.
        lr: the learning rate after the warm-up.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: over which the rate rises from 0.
        schedule: what it does then, until the last step.
        max_grad_norm: gradients are clipped to this norm; None: never.
        ema_decay: of the moving average of the adapter, which is then what is validated, sampled and exported; it
            follows faster in the first steps. None: no average is kept.
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        _check_above_0(self, "lr")
        check_bounds(self, lr=(0, 1), weight_decay=(0, 1), warmup_steps=(0, MAX_STEPS))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {list(self.betas)}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, or null for none, not {self.max_grad_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, or be null for none, not {self.ema_decay}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelSettings:
    """How the networks lie on the processes that ``torchrun`` or ``accelerate launch`` starts.

    Args:
        strategy: "ddp": every process holds the experts whole, and an idle expert lies in the CPU's memory; "fsdp":
            every process holds a share of every expert (FSDP2).
        gradient_checkpointing: compute each block again on the way back in place of keeping its activations.
        alternate_every: with both experts in one run, after how many steps the other has its turn. A turn moves two
            experts between CPU and accelerator, unless they are sharded.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    alternate_every: int = 1

    def __post_init__(self) -> None:
        check_bounds(self, alternate_every=(1, MAX_STEPS))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointSettings:
    """When the state of the run is saved, and how many states are kept.

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
    """A fixed story, told with the adapter while it is trained.

    Args:
        every: steps between films; 0: none.
        story: the story file.
        seed: of the film, the same each time.
        frames_per_shot: how many frames of each shot the contact sheet shows.
    """

    every: int = 0
    story: UserPath | None = None
    seed: int = 0
    frames_per_shot: int = 4

    def __post_init__(self) -> None:
        check_bounds(self, every=(0, MAX_STEPS), frames_per_shot=(1, 256), seed=(0, MAX_SEED))
        if self.every and self.story is None:
            raise ValueError("story must name a story file if every is above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogSettings:
    """What is told of the run; its folder holds everything, with or without wandb.

    Args:
        every: steps between rows of ``metrics.jsonl``.
        wandb: "offline" writes into the run's folder, to be sent with ``wandb sync``; "online" sends at once.
        project: of wandb.
    """

    every: int = 10
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "storymem"

    def __post_init__(self) -> None:
        check_bounds(self, every=(1, MAX_STEPS))


def _check_above_0(settings: object, name: str) -> None:
    if getattr(settings, name) <= 0:
        raise ValueError(f"{name} must be above 0, not {getattr(settings, name)}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def check_memory_weight(objective: ObjectiveSettings, memory_attention: MemoryMode) -> None:
    """Raise ``ValueError`` for a loss on memory slots in the mode that has none."""
    if memory_attention == "cached" and objective.memory_weight > 0:
        raise ValueError(
            "memory_attention=cached gives the network clean memory, on which there is nothing to predict: "
            f"objective.memory_weight must be 0, not {objective.memory_weight:g}"
        )


def refuse_generation_settings(runtime: RuntimeSettings, where: str) -> None:
    """Raise ``ValueError`` for runtime settings of the denoising loop, which ``where`` does not have."""
    for name in ("attention", "compile", "cache", "guidance_batch", "precision", "memory_cache", "processes_per_film"):
        if getattr(runtime, name) != getattr(RuntimeSettings(), name):
            raise ValueError(f"runtime.{name} is for generation; {where} does not read it")
