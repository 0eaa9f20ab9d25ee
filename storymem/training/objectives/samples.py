"""What the samples of all objectives share: where they are drawn from, and how clips are read and checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from storymem.io import NotFiniteError
from storymem.training.objectives.encodings import Encodings, Needs
from storymem.training.objectives.settings import ObjectiveSettings
from storymem.training.run_settings import GIVEN_FRAMES, RunSettings

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split

_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "valid": 1}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one size; objectives add what they need.

    Args:
        x0: clean latents [B, z, N, h, w] of all latent frames.
        noise: e, of the same shape.
        u: [B] in 0..1, from which the noise levels follow.
        condition: mask and conditioning latents [B, 20, N, h, w]; None: the base has no condition channels.
        mask: where the subject of the video is, [B, T, h, w] in 0..1; 0 everywhere if that is not known.
        ids: of the target clips.
    """

    x0: Tensor
    noise: Tensor
    u: Tensor
    condition: Tensor | None
    mask: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {name: send_to_device(value, device, non_blocking=True) for name, value in vars(self).items()}
        return replace(self, **moved)


def collate(samples: Sequence[Batch]) -> Batch:
    """Batches as one: tensors and tuples are joined; everything else is the same in all of them."""
    joined: dict[str, Any] = {}
    for name, value in vars(samples[0]).items():
        if isinstance(value, Tensor):
            joined[name] = torch.cat([getattr(sample, name) for sample in samples])
        elif isinstance(value, tuple):
            joined[name] = tuple(entry for sample in samples for entry in getattr(sample, name))
    return replace(samples[0], **joined)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where samples are drawn from.

    Args:
        train: the settings of the run.
        latents: the training set.
        encodings: what is encoded beside it.
        count: samples of a step, over all processes.
        split: the part of the training set.
    """

    train: RunSettings
    latents: LatentCache
    encodings: Encodings
    count: int
    split: Split = "train"


class Samples(ABC):
    """The samples that an objective draws from a training set.

    Everything random in a step follows from the seed, the split and the step. Held-out samples always have texts.

    Attributes:
        count: samples of a step, over all processes.
    """

    def __init__(self, settings: Any, source: Source) -> None:
        self._settings = settings
        train = source.train
        self.count, self.latents, self.encodings = source.count, source.latents, source.encodings
        self.split = source.split
        self.spec = train.model.spec  # of two bases with one VAE only one may have condition channels
        self.text_dropout = train.batch.text_dropout if source.split == "train" else 0.0
        self._given_frames, self._given_probability = GIVEN_FRAMES[train.conditioning], train.batch.given_probability
        self._seed = [train.seed, _SPLIT_NUMBERS[source.split]]

    @classmethod
    def check(cls, settings: Any, train: RunSettings, latents: LatentCache) -> None:
        """Raise ``ValueError`` if a training set lacks what an objective of these ``settings`` needs."""
        latents.given(0, GIVEN_FRAMES[train.conditioning])  # raises if the cache lacks them
        masks = any(clip.mask for clip in latents.clips if clip.split == "train")
        if settings.mask_weight != 1 and not masks:
            raise ValueError(
                f"objective.mask_weight={settings.mask_weight:g}, but {train.dataset} has no masks: run prepare_data "
                "with masks=FOLDER, or leave mask_weight at 1"
            )

    @classmethod
    def needs(cls, settings: Any, train: RunSettings, latents: LatentCache) -> Needs:
        """What must be encoded beside what the training set holds."""
        return Needs()

    @abstractmethod
    def plan(self, step: int) -> Sequence[Any]:
        """The samples of ``step`` (from 0) before anything is read; it follows from the seed and the step alone."""

    @abstractmethod
    def read(self, plan: Any) -> Batch:
        """The sample of one plan, as a batch of one; several threads may call this.

        Raises:
            NotFiniteError: naming the clip and what of it has NaN or infinity.
        """

    def random(self, step: int) -> np.random.Generator:
        """Of everything that the plan of a step draws."""
        return np.random.default_rng([*self._seed, step])

    def given(self, draw: float) -> int:
        """How many first frames a sample is given, by a uniform draw from 0..1."""
        return self._given_frames if draw < self._given_probability else 0

    def fill_up(self, first: int, fitting: np.ndarray, random: np.random.Generator) -> list[int]:
        """``first`` and ``count - 1`` others of ``fitting``, different ones where there are enough."""
        if self.count == 1:
            return [first]
        others = fitting[fitting != first]
        pool = others if len(others) >= self.count - 1 else fitting
        return [first, *random.choice(pool, self.count - 1, replace=len(pool) < self.count - 1).tolist()]

    def video(self, clip: int) -> Tensor:
        """Latents of a clip, [z, T, h, w]."""
        return self._finite(self.latents.video(clip), "latents of clip", clip)

    def keyframe(self, clip: int, keyframe: int) -> Tensor:
        """Latents of one keyframe of a clip, [z, 1, h, w]."""
        return self._finite(self.latents.keyframes(clip)[keyframe], f"keyframe {keyframe} of clip", clip)

    def shown(self, clip: int, frames: int) -> Tensor:
        """Latents of a blank video that shows so many first frames of a clip, [z, T, h, w]."""
        return self._finite(self.latents.given(clip, frames), "given frames of clip", clip)

    def mask(self, clip: int) -> Tensor:
        """The mask of a clip, [T, h, w]."""
        return self._finite(self.latents.mask(clip), "mask of clip", clip)

    def text(self, clip: int, *, drop: bool = False) -> Tensor:
        """Prompt embeds of a clip's caption, or of the empty text, [L, D]."""
        text = self.latents.empty_text() if drop else self.latents.text(clip)
        return self._finite(text, "text embeds of clip", clip)

    def _finite(self, tensor: Tensor, what: str, clip: int) -> Tensor:
        if not bool(tensor.isfinite().all()):
            message = f"{what} {self.latents.clips[clip].id}: NaN or infinite values; {self.latents.cure(clip)}"
            raise NotFiniteError(message)
        return tensor


def samples_of(settings: ObjectiveSettings) -> type[Samples]:
    """The samples of an objective; called with its settings and a :class:`Source`."""
    return resolve_name(settings.samples_class)


def draw_noise(seed: int, shape: Sequence[int], *, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Noise [1, *shape], and u in 0..1 from which noise levels follow: [1], or [1, levels]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *shape, generator=generator)
    return noise, torch.rand(1, *(() if levels is None else (levels,)), generator=generator)


def clips_alike(latents: LatentCache, split: Split, *, same_length: bool = False) -> list[list[int]]:
    """The clips of each group of a split that have one height and width (and length), by id."""
    alike: defaultdict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, clip in enumerate(latents.clips):  # ordered by id
        if clip.split == split:
            alike[clip.group, clip.bucket[0 if same_length else 1 :]].append(index)
    return list(alike.values())


def numbered(values: Sequence[Sequence[int]]) -> np.ndarray:
    """A number for each of ``values``, the same for equal ones."""
    return np.unique(values, axis=0, return_inverse=True)[1].ravel()
