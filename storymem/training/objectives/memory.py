"""StoryMem (paper section 3.3): a target clip, and frames of clips like it as its memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from storymem.training.batches import Batch, checked_tensor
from storymem.training.objectives.flow import (
    TIMESTEPS,
    Losses,
    bin_sums,
    mask_weights,
    mean_of,
    noise_level,
    noised,
    slot_weights,
)
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.training.settings import GIVEN_FRAMES, BatchSettings, Conditioning
from storymem.wan.conditioning import condition_channels, model_input
from storymem.wan.segments import Layout, memory_cached, memory_joint, with_given
from storymem.wan.settings import MemoryMode
from storymem.wan.spec import Expert

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split

SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "valid": 1}


@dataclass(frozen=True, kw_only=True)
class MemoryBatch(Batch):
    """Samples of one size and one number of memory frames; slots are memory first, then video: N = M + T.

    Args:
        text: prompt embeds [B, L, D].
        memory_frames: M.
        given: how many first latent frames of the video are given, in every sample; used where ``condition`` is None.
    """

    text: Tensor
    memory_frames: int
    given: int = 0


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """One sample before anything is read."""

    clip: int  # index of the target
    memory: tuple[tuple[int, int], ...]  # (clip, keyframe) of each memory frame, in the order of the memory slots
    given: int  # how many first frames of the target are given: 0, 1 or 5
    drop_text: bool  # whether the empty text replaces the caption
    seed: int  # of the noise and the noise level


class MemorySamples:
    """The samples of each step; see :class:`storymem.training.batches.Samples`.

    The first target of a step is drawn from all clips of the split. It determines the step's size (its bucket) and,
    with a draw from 0..max_memory, the number of memory frames M: so every process has the same work. A group with
    fewer gives what it has. The other targets are drawn from the clips of that bucket that can have M memory frames.
    Memory frames are keyframes of the group's other clips of the same height and width, in random order.

    Args:
        batch: the most memory frames, and how often what is given or left out; held-out samples always have text.
        conditioning: which first frames of its target a sample may be given.
        count: samples of one step, over all processes.

    Raises:
        ValueError: if the split is empty, or no group can give ``batch.max_memory`` frames.
    """

    def __init__(
        self,
        latents: LatentCache,
        batch: BatchSettings,
        *,
        conditioning: Conditioning,
        seed: int,
        count: int,
        split: Split = "train",
    ) -> None:
        self._same_given = not latents.spec.condition_channels  # then it is part of the layout
        self._latents, self._clips, self._seed = latents, latents.clips, [seed, SPLIT_NUMBERS[split]]
        self.count, self.max_memory = count, batch.max_memory
        self._given_frames, self._given_probability = GIVEN_FRAMES[conditioning], batch.given_probability
        self._text_dropout = batch.text_dropout if split == "train" else 0.0
        alike: defaultdict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
        for index, clip in enumerate(latents.clips):
            if clip.split == split:
                alike[clip.group, clip.bucket[1:]].append(index)
        self._companions = {index: members for members in alike.values() for index in members}
        if not self._companions:
            cure = "" if split == "train" else ", or set validation.every=0"
            raise ValueError(f"the cache has no {split} clips: prepare more data{cure}")
        targets = sorted(self._companions)
        self._targets, self._available = np.array(targets), np.array([len(self._frames(clip)) for clip in targets])
        if split == "train" and (most := int(self._available.max())) < self.max_memory:
            raise ValueError(
                f"batch.max_memory={self.max_memory}, but no clip has more than {most} keyframes in the other clips of "
                f"its group and size: set batch.max_memory={most} or less, or prepare the data with larger groups "
                "(group.similarity, group.max_size) or more keyframes a clip"
            )
        buckets = [self._clips[clip].bucket for clip in targets]
        self._bucket_of = np.unique(buckets, axis=0, return_inverse=True)[1].ravel()

    def _frames(self, clip: int) -> list[tuple[int, int]]:
        """(clip, keyframe) of all memory frames that a target can have."""
        others = [other for other in self._companions[clip] if other != clip]
        return [(other, keyframe) for other in others for keyframe in range(self._clips[other].keyframes)]

    def plan(self, step: int) -> tuple[SamplePlan, ...]:
        """The samples of ``step`` (from 0), all of one size and one number of memory frames."""
        random = np.random.default_rng([*self._seed, step])
        first = int(random.integers(len(self._targets)))
        memory = min(int(random.integers(self.max_memory + 1)), int(self._available[first]))
        fitting = np.flatnonzero((self._bucket_of == self._bucket_of[first]) & (self._available >= memory))
        chosen = [first]
        if self.count > 1:
            others = fitting[fitting != first]
            pool = others if len(others) >= self.count - 1 else fitting
            repeat = len(pool) < self.count - 1
            chosen += random.choice(pool, self.count - 1, replace=repeat).tolist()
        samples = [self._sample(int(self._targets[target]), memory, random) for target in chosen]
        if self._same_given:
            samples = [replace(sample, given=samples[0].given) for sample in samples]
        return tuple(samples)

    def read(self, plan: SamplePlan) -> MemoryBatch:
        """The sample of a plan, as a batch of one."""
        return read_sample(self._latents, plan)

    def _sample(self, clip: int, memory: int, random: np.random.Generator) -> SamplePlan:
        frames = self._frames(clip)
        order = random.permutation(len(frames))[:memory]
        given, drop, seed = random.random(), random.random(), int(random.integers(2**62))
        return SamplePlan(
            clip=clip,
            memory=tuple(frames[position] for position in order),
            given=self._given_frames if given < self._given_probability else 0,
            drop_text=drop < self._text_dropout,
            seed=seed,
        )


def read_sample(latents: LatentCache, plan: SamplePlan) -> MemoryBatch:
    """The one sample of a plan, as a batch of one.

    Raises:
        NotFiniteError: naming the clip and what of it has NaN or infinity.
    """
    clip, spec = plan.clip, latents.spec
    checked = partial(checked_tensor, latents)
    video = checked(latents.video(clip), "latents of clip", clip)[None]
    frames = [checked(latents.keyframes(c)[k], f"keyframe {k} of clip", c) for c, k in plan.memory]
    memory = torch.cat(frames, dim=1)[None] if frames else None
    x0 = video if memory is None else torch.cat([memory, video], dim=2)
    text = latents.empty_text() if plan.drop_text else latents.text(clip)
    generator = torch.Generator().manual_seed(plan.seed)
    given, condition = spec.latent_frames(plan.given), None
    if spec.condition_channels:
        shown = checked(latents.given(clip, plan.given), "given frames of clip", clip)[None]
        condition = condition_channels(memory, shown, given, spec)
    return MemoryBatch(
        x0=x0,
        noise=torch.randn(x0.shape, generator=generator),
        u=torch.rand(1, generator=generator),
        condition=condition,
        mask=checked(latents.mask(clip), "mask of clip", clip)[None],
        text=checked(text, "text embeds of clip", clip)[None],
        memory_frames=len(frames),
        given=given,
        ids=(latents.clips[clip].id,),
    )


@dataclass(frozen=True, kw_only=True)
class MemoryObjective:
    """The loss of an expert on a batch.

    The layout states which frames are noisy: in ``joint`` memory is denoised as well; in ``cached`` it is clean, at
    timestep 0, and has no loss: gradients reach it through the video frames that read it.

    Args:
        settings: noise levels and weights.
        boundary: between the experts' noise levels; None: there is one expert.
        rope_stride: S, the distance between memory slots on the temporal axis.
        memory_attention: the mode.
    """

    settings: MemoryObjectiveSettings
    boundary: float | None
    rope_stride: int
    memory_attention: MemoryMode = "joint"

    def __call__(self, network: nn.Module, expert: Expert, batch: MemoryBatch) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""
        s = noise_level(batch.u, expert=expert, boundary=self.boundary, shift=self.settings.shift)
        layout = self.layout(batch)
        noisy = torch.cat([torch.full((part.frames,), part.timestep is None) for part in layout.segments]).to(s.device)
        x = model_input(noised(batch.x0, batch.noise, s[:, None] * noisy), batch.condition)
        dtype: Any = getattr(network, "module", network).dtype
        (prediction,) = network(x.to(dtype), s * TIMESTEPS, batch.text.to(dtype), return_dict=False, layout=layout)
        errors = (prediction.float() - (batch.noise - batch.x0)).square().mean(dim=1)  # [B, M + T, h, w]
        memory_weight = 1.0 if self.settings.memory_weight is None else self.settings.memory_weight
        weights = slot_weights(layout, memory_weight).to(errors.device)
        # A product of matrices would be rounded by autocast.
        video = layout.span("video")
        losses = (self._weighted(errors, batch, video).mean(dim=(2, 3)) * weights).sum(dim=1)
        return Losses(total=losses.mean(), sums=self._sums(expert, losses.detach(), errors.detach(), s, batch, video))

    def layout(self, batch: MemoryBatch) -> Layout:
        """The layout of a batch: which frames are memory, given or noisy."""
        build = memory_cached if self.memory_attention == "cached" else memory_joint
        video = build(batch.memory_frames, batch.x0.shape[2] - batch.memory_frames, self.rope_stride)
        return video if batch.condition is not None else with_given(video, batch.given)

    def _weighted(self, errors: Tensor, batch: MemoryBatch, video: slice) -> Tensor:
        """The errors [B, M + T, h, w] with those of the noisy frames of the video weighted by its mask."""
        if self.settings.mask_weight == 1:
            return errors
        mask = batch.mask[:, video.start - video.stop :]
        weighted = errors[:, video] * mask_weights(mask, self.settings.mask_weight)
        return torch.cat([errors[:, : video.start], weighted], dim=1)

    def _sums(
        self, expert: Expert, losses: Tensor, errors: Tensor, s: Tensor, batch: MemoryBatch, video: slice
    ) -> dict[str, Tensor]:
        """What is logged; of the video and of the subject the unweighted errors."""
        M = batch.memory_frames  # noqa: N806
        besides = {"loss_memory": mean_of(errors[:, :M])} if self.memory_attention == "joint" else {}
        if self.settings.mask_weight != 1:
            mask = batch.mask[:, video.start - video.stop :]
            besides["loss_subject"] = torch.stack([(errors[:, video] * mask).sum(), mask.sum()])
        return {
            "loss": mean_of(losses),
            f"loss_{expert}": mean_of(losses),
            "loss_video": mean_of(errors[:, video]),
            **besides,
            "memory_frames": mean_of(torch.full_like(losses, M)),
            "loss_by_level": bin_sums(losses, s, self.settings.bins),
        }
