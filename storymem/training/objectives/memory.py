"""StoryMem (paper section 3.3): a target clip, and frames of clips like it as its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from storymem.training.objectives.flow import TIMESTEPS, FlowLoss, Losses, noised, noisy_frames, predict, slot_weights
from storymem.training.objectives.samples import Batch, Samples, Source, clips_alike, draw_noise, numbered
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.wan.conditioning import condition_channels, model_input
from storymem.wan.segments import Layout, memory_cached, memory_joint, with_given
from storymem.wan.spec import Expert


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


class MemorySamples(Samples):
    """The first target of a step is drawn from all clips of the split.

    It determines the step's size (its bucket) and, with a draw from 0..max_memory, the number of memory frames M: so
    every process has the same work. A group with fewer gives what it has. The other targets are drawn from the clips of
    that bucket that can have M memory frames. Memory frames are keyframes of the group's other clips of the same height
    and width, in random order.

    Raises:
        ValueError: if the split is empty, or no group can give ``batch.max_memory`` frames.
    """

    def __init__(self, settings: MemoryObjectiveSettings, source: Source) -> None:
        super().__init__(settings, source)
        self._most = source.train.batch.max_memory
        alike = clips_alike(self.latents, self.split)
        self._companions = {clip: members for members in alike for clip in members}
        if not self._companions:
            cure = "" if self.split == "train" else ", or set validation.every=0"
            raise ValueError(f"the cache has no {self.split} clips: prepare more data{cure}")
        self._targets = np.array(sorted(self._companions))
        self._available = np.array([len(self._frames(clip)) for clip in self._targets])
        if self.split == "train" and (most := int(self._available.max())) < self._most:
            raise ValueError(
                f"batch.max_memory={self._most}, but no clip has more than {most} keyframes in the other clips of "
                f"its group and size: set batch.max_memory={most} or less, or prepare the data with larger groups "
                "(group.similarity, group.max_size) or more keyframes a clip"
            )
        self._bucket_of = numbered([self.latents.clips[clip].bucket for clip in self._targets])

    def _frames(self, clip: int) -> list[tuple[int, int]]:
        """(clip, keyframe) of all memory frames that a target can have."""
        others = [other for other in self._companions[clip] if other != clip]
        return [(other, keyframe) for other in others for keyframe in range(self.latents.clips[other].keyframes)]

    def plan(self, step: int) -> tuple[SamplePlan, ...]:
        """The samples of ``step`` (from 0), all of one size and one number of memory frames."""
        random = self.random(step)
        first = int(random.integers(len(self._targets)))
        memory = min(int(random.integers(self._most + 1)), int(self._available[first]))
        fitting = np.flatnonzero((self._bucket_of == self._bucket_of[first]) & (self._available >= memory))
        chosen = self.fill_up(first, fitting, random)
        samples = [self._sample(int(self._targets[target]), memory, random) for target in chosen]
        if not self.spec.condition_channels:  # then what is given is part of the layout
            samples = [replace(sample, given=samples[0].given) for sample in samples]
        return tuple(samples)

    def _sample(self, clip: int, memory: int, random: np.random.Generator) -> SamplePlan:
        frames = self._frames(clip)
        order = random.permutation(len(frames))[:memory]
        given, drop, seed = random.random(), random.random(), int(random.integers(2**62))
        return SamplePlan(
            clip=clip,
            memory=tuple(frames[position] for position in order),
            given=self.given(given),
            drop_text=drop < self.text_dropout,
            seed=seed,
        )

    def read(self, plan: SamplePlan) -> MemoryBatch:
        clip, video = plan.clip, self.video(plan.clip)
        memory = [self.keyframe(*frame) for frame in plan.memory]
        x0 = torch.cat([*memory, video], dim=1)[None]
        noise, u = draw_noise(plan.seed, x0.shape[1:])
        given, condition = self.spec.latent_frames(plan.given), None
        if self.spec.condition_channels:
            condition = condition_channels(
                x0[:, :, : len(memory)], self.shown(clip, plan.given)[None], given, self.spec
            )
        return MemoryBatch(
            x0=x0,
            noise=noise,
            u=u,
            condition=condition,
            mask=self.mask(clip)[None],
            text=self.text(clip, drop=plan.drop_text)[None],
            memory_frames=len(memory),
            given=given,
            ids=(self.latents.clips[clip].id,),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryObjective(FlowLoss[MemoryObjectiveSettings]):
    """The layout states which frames are noisy.

    In ``joint`` memory is denoised as well; in ``cached`` it is clean, at timestep 0, and has no loss: gradients reach
    it through the video frames that read it.
    """

    def __call__(self, network: nn.Module, expert: Expert, batch: MemoryBatch) -> Losses:
        s, layout, M = self.level(batch.u, expert), self.layout(batch), batch.memory_frames  # noqa: N806
        levels = s[:, None] * noisy_frames(layout).to(s.device)
        x = model_input(noised(batch.x0, batch.noise, levels), batch.condition)
        prediction = predict(network, x, s * TIMESTEPS, batch.text, layout)
        errors = (prediction - (batch.noise - batch.x0)).square().mean(dim=1)  # [B, M + T, h, w]
        video = layout.span("video")
        mask = batch.mask[:, video.start - video.stop :]
        weighted = torch.cat([errors[:, : video.start], self.weighted(errors[:, video], mask)], dim=1)
        memory_weight = 1.0 if self.settings.memory_weight is None else self.settings.memory_weight
        weights = slot_weights(layout, memory_weight).to(errors.device)
        # A product of matrices would be rounded by autocast.
        losses = (weighted.mean(dim=(2, 3)) * weights).sum(dim=1)
        more = {"memory_frames": torch.full_like(losses, M)}
        if self.memory_attention == "joint":
            more["loss_memory"] = errors[:, :M]
        return self.losses(expert, losses, errors[:, video], mask, (losses, s), **more)

    def layout(self, batch: MemoryBatch) -> Layout:
        """The layout of a batch: which frames are memory, given or noisy."""
        build = memory_cached if self.memory_attention == "cached" else memory_joint
        video = build(batch.memory_frames, batch.x0.shape[2] - batch.memory_frames, self.rope_stride)
        return video if batch.condition is not None else with_given(video, batch.given)
