"""What the settings of all objectives have; loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, check_bounds

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split
    from storymem.training.objectives.encodings import Needs
    from storymem.training.objectives.flow import FlowLoss
    from storymem.training.objectives.samples import Samples, Source
    from storymem.training.settings import TrainSettings

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
        sampled: whether a film can be sampled with the networks while they train.
        conditioned: whether samples may be given first frames of their target.
    """

    system: ClassVar[str]
    sampled: ClassVar[bool] = False
    conditioned: ClassVar[bool] = False

    shift: float = 4.0
    mask_weight: float = 1.0
    bins: int = 10

    def __post_init__(self) -> None:
        check_bounds(self, shift=(_ABOVE_0, 1000), mask_weight=(_ABOVE_0, 1e6), bins=(1, 1000))

    @property
    def encodes(self) -> bool:
        """Whether the text encoder or the VAE is needed, see :meth:`needs`."""
        return False

    def check(self, train: TrainSettings) -> None:
        """Raise ``ValueError`` for other settings of the run that this objective cannot use."""
        if train.samples.every and not self.sampled:
            raise ValueError(
                f"samples.every={train.samples.every}: no film can be sampled while {self.system} is trained; write "
                "samples.every=0"
            )
        if train.conditioning != "m2v" and not self.conditioned:
            raise ValueError(f"conditioning={train.conditioning}: {self.system} is given no frames; write m2v")

    def check_set(self, train: TrainSettings, latents: LatentCache) -> None:
        """Raise ``ValueError`` if a training set lacks what this objective needs."""
        from storymem.training.settings import GIVEN_FRAMES

        latents.given(0, GIVEN_FRAMES[train.conditioning])  # raises if the cache lacks them
        masks = any(clip.mask for clip in latents.clips if clip.split == "train")
        if self.mask_weight != 1 and not masks:
            raise ValueError(
                f"objective.mask_weight={self.mask_weight:g}, but {train.dataset} has no masks: run prepare_data with "
                "masks=FOLDER, or leave mask_weight at 1"
            )

    def made_for(self, train: TrainSettings) -> str:
        """The system whose generation a trained adapter is for, which its files record."""
        return self.system

    def prepare(self, transformer: Any, *, seed: int) -> None:  # noqa: B027 (most add nothing)
        """Add what is trained besides the adapter to an expert that :func:`prepare_expert` has prepared."""

    def needs(self, train: TrainSettings, latents: LatentCache) -> Needs | None:
        """What must be encoded beside what the training set holds; None: nothing."""
        return None

    @abstractmethod
    def samples(self, source: Source) -> Samples:
        """The samples of a training set."""

    @abstractmethod
    def loss(self, train: TrainSettings) -> FlowLoss[Any]:
        """The loss of a network on a batch of these samples."""


def used_splits(train: TrainSettings) -> tuple[Split, ...]:
    """The parts of a training set that a run reads."""
    return ("train", "valid") if train.validation.every else ("train",)
