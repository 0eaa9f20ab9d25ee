"""The settings of each objective; loads no torch.

``objective=NAME`` chooses one of :data:`OBJECTIVES`: so no objective has another's keys. An objective of your own is a
subclass of :class:`ObjectiveSettings`: ``objective._target_=mine.Settings``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, get_args

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings, check_bounds
from storymem.story.panels import JOINT_TOKENS, PanelStyle
from storymem.training.run_settings import RunSettings
from storymem.wan.segments import DEFAULT_STRIDE, Layout, Text, holocine, lct

_ABOVE_0 = 1e-12


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveSettings(ABC):
    """What every objective has: flow matching.

    Args:
        shift: of the noise levels, s = shift * u / (1 + (shift - 1) * u) with u uniform; the command uses the
            sampler's by default.
        mask_weight: weight of the loss where a clip's mask is white (prepare_data masks=) relative to where it is
            black; 1, as published, ignores masks.
        bins: number of equal bins of s from 0 to 1 in which the loss is logged.

    Attributes:
        system: the name of the system that is trained, which adapters record.
        samples_class: a subclass of :class:`storymem.training.objectives.samples.Samples`, "module:name".
        loss_class: a subclass of :class:`storymem.training.objectives.flow.FlowLoss`, likewise.
        sampled: whether a film can be sampled with the networks while they train.
        conditioned: whether samples may be given first frames of their target.
    """

    system: ClassVar[str]
    samples_class: ClassVar[str]
    loss_class: ClassVar[str]
    sampled: ClassVar[bool] = False
    conditioned: ClassVar[bool] = False

    shift: float = 4.0
    mask_weight: float = 1.0
    bins: int = 10

    def __post_init__(self) -> None:
        check_bounds(self, shift=(_ABOVE_0, 1000), mask_weight=(_ABOVE_0, 1e6), bins=(1, 1000))

    @property
    def encodes(self) -> bool:
        """Whether the text encoder or the VAE is needed, see ``Samples.needs``."""
        return False

    def check(self, train: RunSettings) -> None:
        """Raise ``ValueError`` for other settings of the run that this objective cannot use."""
        if train.samples.every and not self.sampled:
            raise ValueError(
                f"samples.every={train.samples.every}: no film can be sampled while {self.system} is trained; write "
                "samples.every=0"
            )
        if train.conditioning != "m2v" and not self.conditioned:
            raise ValueError(f"conditioning={train.conditioning}: {self.system} is given no frames; write m2v")

    def made_for(self, train: RunSettings) -> str:
        """The system whose generation a trained adapter is for, which its files record."""
        return self.system

    def prepare(self, transformer: Any, *, seed: int) -> None:  # noqa: B027 (most add nothing)
        """Add what is trained besides the adapter to an expert that :func:`prepare_expert` has prepared."""

    @property
    def normal(self) -> tuple[float, float] | None:
        """Mean and deviation of the logits of the noise levels before the shift; None: the levels are uniform."""
        return None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryObjectiveSettings(ObjectiveSettings):
    """StoryMem: a clip with keyframes of other clips of its group as memory.

    Args:
        memory_weight: weight of the loss of a memory slot relative to a video slot; 0 trains on the video alone. null:
            1, or with model.memory_attention=cached, where memory slots predict nothing, 0.
    """

    system: ClassVar[str] = "memory"
    samples_class: ClassVar[str] = "storymem.training.objectives.memory:MemorySamples"
    loss_class: ClassVar[str] = "storymem.training.objectives.memory:MemoryObjective"
    sampled: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    memory_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, memory_weight=(0, 1e6))

    def check(self, train: RunSettings) -> None:
        super().check(train)
        if train.model.memory_attention == "cached" and self.memory_weight:
            raise ValueError(
                "model.memory_attention=cached gives the network clean memory, on which there is nothing to predict: "
                f"objective.memory_weight must be 0, not {self.memory_weight:g}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MementoObjectiveSettings(ObjectiveSettings):
    """Memento: a clip from recalled frames of earlier clips of its group, and beside it an image of its subject.

    Args:
        subject_weight: lambda, the weight of the subject's loss relative to the video's: 1 as released, 0.5 in the
            paper; 0: no subject.
        subject_probability: how often a step has a subject.
        recent_probability: how often the candidates are those of the clip before alone, without a subject.
        query: whether a KeyframeQuery chooses among the candidates and is trained; if not, the newest are recalled.
        local: frames chosen by the queries that read the prompt.
        whole: frames chosen by those that read the caption of the whole film; the prompt, where a clip's caption is not
            ``global caption: ...; shot caption: ...``.
        older: most candidates of older clips.
        recent: most candidates of the clip before.
    """

    system: ClassVar[str] = "memento"
    samples_class: ClassVar[str] = "storymem.training.objectives.memento:MementoSamples"
    loss_class: ClassVar[str] = "storymem.training.objectives.memento:MementoObjective"
    conditioned: ClassVar[bool] = True

    subject_weight: float = 1.0
    subject_probability: float = 0.8
    recent_probability: float = 0.1
    query: bool = True
    local: int = 6
    whole: int = 2
    older: int = 8
    recent: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, subject_weight=(0, 1e6), subject_probability=(0, 1), recent_probability=(0, 1))
        check_bounds(self, local=(1, 512), whole=(1, 512), older=(0, 512), recent=(1, 512))

    def check(self, train: RunSettings) -> None:
        super().check(train)
        if not train.model.spec.condition_channels:
            raise ValueError(f"memento gives memory in condition channels, which {train.model.spec.name} lacks")
        if train.adapter is None:
            raise ValueError("memento trains an adapter and a KeyframeQuery: adapter=null is not possible")
        if train.parallel.strategy == "fsdp":
            raise ValueError("memento runs its KeyframeQuery whole: use parallel.strategy=ddp")
        if further := sorted({*train.export} - {"storymem", "released"}):
            raise ValueError(
                f"export={','.join(further)} cannot hold a KeyframeQuery: write export=[storymem,released]"
            )

    @property
    def encodes(self) -> bool:
        return self.query

    def made_for(self, train: RunSettings) -> str:
        """StoryMem with cached memory, whose layout and positions are then trained; Memento with joint memory."""
        return "memory" if train.model.memory_attention == "cached" else self.system

    def prepare(self, transformer: Any, *, seed: int) -> None:
        if self.query:
            from storymem.wan.keyframe_query import add_query

            add_query(transformer, seed=seed)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilmObjectiveSettings(ObjectiveSettings):
    """What systems share that denoise all shots of a film at once.

    Args:
        scenes: a file with the text of the scene that all its shots read, a line of JSON per folder of videos:
            ``{"folder": "000045_eli", "caption": "Eli on the moon."}``; null: the empty text.
        min_shots: the fewest clips of a group that make a film.
        max_shots: the most; each step draws their number.

    Attributes:
        levels: whether a film has one noise level, or every shot its own.
    """

    samples_class: ClassVar[str] = "storymem.training.objectives.films:FilmSamples"
    loss_class: ClassVar[str] = "storymem.training.objectives.sequence:SequenceObjective"
    levels: ClassVar[Literal["film", "shot"]] = "film"

    scenes: UserPath | None = None
    min_shots: int = 2
    max_shots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, min_shots=(1, 1000), max_shots=(self.min_shots, 1000))

    @property
    def encodes(self) -> bool:
        return self.scenes is not None

    def check(self, train: RunSettings) -> None:
        super().check(train)
        if self.scenes is not None and not os.path.isfile(self.scenes):
            raise ValueError(f"objective.scenes={self.scenes} is no file: write one, or leave it out")

    @abstractmethod
    def layout(self, frames: Sequence[int], texts: Sequence[Text]) -> Layout:
        """The layout of a film, from the latent frames and the text of each shot."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HolocineObjectiveSettings(FilmObjectiveSettings):
    """HoloCine: neighbouring clips of a group as one film.

    Args:
        sparse: whether a shot reads only the first latent frame of the others.
    """

    system: ClassVar[str] = "holocine"

    sparse: bool = False

    def layout(self, frames: Sequence[int], texts: Sequence[Text]) -> Layout:
        return holocine(frames, texts, sparse=self.sparse)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LctObjectiveSettings(FilmObjectiveSettings):
    """LCT: neighbouring clips of a group as one film, each at a noise level of its own.

    Args:
        gap: see :func:`storymem.wan.segments.lct`.
        mean: of the logit-normal distribution of the noise levels, before the shift.
        deviation: its standard deviation.
    """

    system: ClassVar[str] = "lct"
    levels: ClassVar[Literal["film", "shot"]] = "shot"

    gap: int = DEFAULT_STRIDE
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, gap=(0, 1000), mean=(-10, 10), deviation=(0.01, 100))

    def layout(self, frames: Sequence[int], texts: Sequence[Text]) -> Layout:
        return lct(frames, texts, gap=self.gap)

    @property
    def normal(self) -> tuple[float, float]:
        return self.mean, self.deviation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PicturesObjectiveSettings(ObjectiveSettings):
    """Single images: three clips of a group as panels of one image (IC-LoRA), and images of one clip.

    Args:
        panels: how often a step is of panels; else it is of single images, each with its own caption.
        style: of the joint captions, see :mod:`storymem.story.panels`.
        text_tokens: to which a joint caption is padded.
    """

    system: ClassVar[str] = "pictures"
    samples_class: ClassVar[str] = "storymem.training.objectives.pictures:PictureSamples"
    loss_class: ClassVar[str] = "storymem.training.objectives.sequence:SequenceObjective"

    panels: float = 0.75
    style: PanelStyle = "plain"
    text_tokens: int = JOINT_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, panels=(0, 1), text_tokens=(1, 100_000))

    @property
    def encodes(self) -> bool:
        return True


AnyObjective = (
    MemoryObjectiveSettings
    | MementoObjectiveSettings
    | HolocineObjectiveSettings
    | LctObjectiveSettings
    | PicturesObjectiveSettings
)
#: The choices of ``objective=NAME``.
OBJECTIVES: dict[str, type[ObjectiveSettings]] = {cls.system: cls for cls in get_args(AnyObjective)}


def build_objective_settings(node: Any) -> ObjectiveSettings:
    """The settings that a ``_target_`` node describes; without a target those of :class:`MemoryObjectiveSettings`.

    Raises:
        ConfigError: as of :func:`storymem.config.build_settings`.
        ValueError: if the target is no objective.
    """
    if isinstance(node, ObjectiveSettings):
        return node
    if not isinstance(node, Mapping):
        raise ValueError(f"is not keys with values: {node!r}; choose an objective by objective=NAME")
    values = dict(node)
    target = values.pop("_target_", MemoryObjectiveSettings)
    if isinstance(target, str):
        try:
            cls = resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"_target_={target} cannot be imported: {error}") from None
    else:
        cls = target
    if not (isinstance(cls, type) and issubclass(cls, ObjectiveSettings)):
        raise ValueError(f"_target_={target} is no objective: choose one by objective=NAME")
    return build_settings(cls, values)
