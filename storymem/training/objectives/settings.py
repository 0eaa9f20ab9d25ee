"""The settings of each objective; loads no torch.

``objective=NAME`` chooses a file of ``configs/objective``, whose ``_target_`` is one of these classes: so no objective
has another's keys. An objective of your own is a subclass of :class:`ObjectiveSettings`:
``objective._target_=mine.Settings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings, check_bounds
from storymem.training.objectives.base import ObjectiveSettings, used_splits
from storymem.training.objectives.sequence_settings import (
    HolocineObjectiveSettings,
    LctObjectiveSettings,
    PicturesObjectiveSettings,
)

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split
    from storymem.training.batches import Samples
    from storymem.training.objectives import Loss
    from storymem.training.objectives.encodings import Encodings, Needs
    from storymem.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryObjectiveSettings(ObjectiveSettings):
    """StoryMem: a clip with keyframes of other clips of its group as memory.

    Args:
        memory_weight: weight of the loss of a memory slot relative to a video slot; 0 trains on the video alone. null:
            1, or with model.memory_attention=cached, where memory slots predict nothing, 0.
    """

    system: ClassVar[str] = "memory"
    sampled: ClassVar[bool] = True

    memory_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, memory_weight=(0, 1e6))

    def check(self, train: TrainSettings) -> None:
        """See :class:`ObjectiveSettings`."""
        super().check(train)
        if train.model.memory_attention == "cached" and self.memory_weight:
            raise ValueError(
                "model.memory_attention=cached gives the network clean memory, on which there is nothing to predict: "
                f"objective.memory_weight must be 0, not {self.memory_weight:g}"
            )

    def check_set(self, train: TrainSettings, latents: LatentCache) -> None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.settings import GIVEN_FRAMES

        super().check_set(train, latents)
        latents.given(0, GIVEN_FRAMES[train.conditioning])  # raises if the cache lacks them

    def samples(
        self, train: TrainSettings, latents: LatentCache, encodings: Encodings, *, count: int, split: Split = "train"
    ) -> Samples:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.memory import MemorySamples

        return MemorySamples(
            latents, train.batch, conditioning=train.conditioning, seed=train.seed, count=count, split=split
        )

    def loss(self, train: TrainSettings) -> Loss:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.memory import MemoryObjective

        model = train.model
        return MemoryObjective(
            settings=self,
            boundary=model.boundary,
            rope_stride=model.rope_stride,
            memory_attention=model.memory_attention,
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

    def check(self, train: TrainSettings) -> None:
        """See :class:`ObjectiveSettings`."""
        if train.samples.every:
            raise ValueError(f"samples.every={train.samples.every}: no film is sampled with memento; write 0")
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

    def check_set(self, train: TrainSettings, latents: LatentCache) -> None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.settings import GIVEN_FRAMES

        super().check_set(train, latents)
        latents.given(0, GIVEN_FRAMES[train.conditioning])  # raises if the cache lacks them

    @property
    def encodes(self) -> bool:
        """See :class:`ObjectiveSettings`."""
        return self.query

    def needs(self, train: TrainSettings, latents: LatentCache) -> Needs | None:
        """See :class:`ObjectiveSettings`."""
        from storymem.story.captions import global_caption
        from storymem.training.objectives.encodings import Needs

        if not self.query:
            return None
        splits = used_splits(train)
        written = {global_caption(clip.caption) for clip in latents.clips if clip.split in splits}
        texts = {caption: train.model.network.text_tokens for caption in written if caption is not None}
        return Needs(texts=texts) if texts else None

    def made_for(self, train: TrainSettings) -> str:
        """StoryMem with cached memory, whose layout and positions are then trained; Memento with joint memory."""
        return "memory" if train.model.memory_attention == "cached" else self.system

    def prepare(self, transformer: Any, *, seed: int) -> None:
        """See :class:`ObjectiveSettings`."""
        if self.query:
            from storymem.wan.keyframe_query import add_query

            add_query(transformer, seed=seed)

    def samples(
        self, train: TrainSettings, latents: LatentCache, encodings: Encodings, *, count: int, split: Split = "train"
    ) -> Samples:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.memento import MementoSamples

        return MementoSamples(
            latents,
            self,
            train.batch,
            encodings=encodings,
            conditioning=train.conditioning,
            seed=train.seed,
            count=count,
            split=split,
        )

    def loss(self, train: TrainSettings) -> Loss:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.memento import MementoObjective

        model = train.model
        return MementoObjective(
            settings=self,
            boundary=model.boundary,
            rope_stride=model.rope_stride,
            memory_attention=model.memory_attention,
            spec=model.spec,
        )


AnyObjective = (
    MemoryObjectiveSettings
    | MementoObjectiveSettings
    | HolocineObjectiveSettings
    | LctObjectiveSettings
    | PicturesObjectiveSettings
)
#: The files of ``configs/objective``.
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
