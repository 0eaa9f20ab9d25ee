"""The settings of systems that denoise several clips, or panels, as one sequence; loads no torch."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.story.panels import JOINT_TOKENS, PanelStyle
from storymem.training.objectives.base import ObjectiveSettings, used_splits
from storymem.wan.segments import DEFAULT_STRIDE, Layout, Text, holocine, lct

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split
    from storymem.training.batches import Samples
    from storymem.training.objectives import Loss
    from storymem.training.objectives.encodings import Encodings, Needs
    from storymem.training.settings import TrainSettings


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

    levels: ClassVar[Literal["film", "shot"]] = "film"

    scenes: UserPath | None = None
    min_shots: int = 2
    max_shots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, min_shots=(1, 1000), max_shots=(self.min_shots, 1000))

    @property
    def encodes(self) -> bool:
        """See :class:`ObjectiveSettings`."""
        return self.scenes is not None

    def check(self, train: TrainSettings) -> None:
        """See :class:`ObjectiveSettings`."""
        super().check(train)
        if self.scenes is not None and not os.path.isfile(self.scenes):
            raise ValueError(f"objective.scenes={self.scenes} is no file: write one, or leave it out")

    def check_set(self, train: TrainSettings, latents: LatentCache) -> None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.films import neighbours, scene_texts

        super().check_set(train, latents)
        scene_texts(latents.clips, self.scenes)
        for split in used_splits(train):
            neighbours(latents, (self.min_shots, self.max_shots), split)

    def needs(self, train: TrainSettings, latents: LatentCache) -> Needs | None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.encodings import Needs
        from storymem.training.objectives.films import scene_texts

        if self.scenes is None:
            return None
        texts = scene_texts(latents.clips, self.scenes).values()
        return Needs(texts=dict.fromkeys(texts, train.model.network.text_tokens))

    @abstractmethod
    def layout(self, frames: Sequence[int], texts: Sequence[Text]) -> Layout:
        """The layout of a film, from the latent frames and the text of each shot."""

    def samples(
        self, train: TrainSettings, latents: LatentCache, encodings: Encodings, *, count: int, split: Split = "train"
    ) -> Samples:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.films import FilmSamples, scene_texts

        return FilmSamples(
            latents,
            spec=train.model.spec,
            layout=self.layout,
            scenes=scene_texts(latents.clips, self.scenes),
            encodings=encodings,
            shots=(self.min_shots, self.max_shots),
            levels=self.levels == "shot",
            text_dropout=train.batch.text_dropout,
            seed=train.seed,
            count=count,
            split=split,
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HolocineObjectiveSettings(FilmObjectiveSettings):
    """HoloCine: neighbouring clips of a group as one film.

    Args:
        sparse: whether a shot reads only the first latent frame of the others.
    """

    system: ClassVar[str] = "holocine"

    sparse: bool = False

    def layout(self, frames: Sequence[int], texts: Sequence[Text]) -> Layout:
        """See :class:`FilmObjectiveSettings`."""
        return holocine(frames, texts, sparse=self.sparse)

    def loss(self, train: TrainSettings) -> Loss:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.sequence import one_level

        return one_level(self, train.model.boundary)


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
        """See :class:`FilmObjectiveSettings`."""
        return lct(frames, texts, gap=self.gap)

    def loss(self, train: TrainSettings) -> Loss:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.flow import logit_normal_level
        from storymem.training.objectives.sequence import SequenceObjective

        levels = partial(
            logit_normal_level,
            boundary=train.model.boundary,
            shift=self.shift,
            mean=self.mean,
            deviation=self.deviation,
        )
        return SequenceObjective(settings=self, levels=levels)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PicturesObjectiveSettings(ObjectiveSettings):
    """Single images: three clips of a group as panels of one image (IC-LoRA), and images of one clip.

    Args:
        panels: how often a step is of panels; else it is of single images, each with its own caption.
        style: of the joint captions, see :mod:`storymem.story.panels`.
        text_tokens: to which a joint caption is padded.
    """

    system: ClassVar[str] = "pictures"

    panels: float = 0.75
    style: PanelStyle = "plain"
    text_tokens: int = JOINT_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, panels=(0, 1), text_tokens=(1, 100_000))

    @property
    def encodes(self) -> bool:
        """See :class:`ObjectiveSettings`."""
        return True

    def check_set(self, train: TrainSettings, latents: LatentCache) -> None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.films import neighbours
        from storymem.training.objectives.pictures import numbers_of_panels

        super().check_set(train, latents)
        for split in used_splits(train):
            for number in numbers_of_panels(self.panels):
                neighbours(latents, (number, number), split)

    def needs(self, train: TrainSettings, latents: LatentCache) -> Needs | None:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.encodings import Needs
        from storymem.training.objectives.pictures import blank_sizes, joint_captions

        captions = joint_captions(latents, self.style, used_splits(train)) if self.panels else []
        return Needs(texts=dict.fromkeys(captions, self.text_tokens), blanks=blank_sizes(latents))

    def samples(
        self, train: TrainSettings, latents: LatentCache, encodings: Encodings, *, count: int, split: Split = "train"
    ) -> Samples:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.pictures import PictureSamples

        return PictureSamples(
            latents,
            spec=train.model.spec,
            encodings=encodings,
            style=self.style,
            text_tokens=self.text_tokens,
            panels=self.panels,
            text_dropout=train.batch.text_dropout,
            seed=train.seed,
            count=count,
            split=split,
        )

    def loss(self, train: TrainSettings) -> Loss:
        """See :class:`ObjectiveSettings`."""
        from storymem.training.objectives.sequence import one_level

        return one_level(self, train.model.boundary)
