"""Memento (arXiv 2606.14667): a clip from recalled frames of earlier clips, and beside it an image of its subject.

Clips of a group are taken as the shots of one film, in the order of their ids. The recall is trained with the shot:
the KeyframeQuery of the expert chooses among the candidates, and gradients reach it through what it chose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from storymem.story.captions import global_caption
from storymem.training.batches import Batch, checked_tensor
from storymem.training.objectives.flow import (
    TIMESTEPS,
    Losses,
    bin_sums,
    mask_weights,
    mean_of,
    noise_level,
    noised,
)
from storymem.training.objectives.memory import SPLIT_NUMBERS
from storymem.training.objectives.settings import MementoObjectiveSettings
from storymem.training.settings import GIVEN_FRAMES, BatchSettings, Conditioning
from storymem.wan.conditioning import condition_channels, model_input
from storymem.wan.keyframe_query import embedded, film_positions, mean_scores, straight_through
from storymem.wan.segments import Layout, memento, memory_positions
from storymem.wan.settings import MemoryMode
from storymem.wan.spec import Expert, ModelSpec

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split
    from storymem.training.objectives.encodings import Encodings

Frame = tuple[int, int]
"""A keyframe of the cache: clip, keyframe."""


@dataclass(frozen=True, kw_only=True)
class MementoBatch(Batch):
    """Samples of one size, with equally many candidates; all with a subject, or none.

    ``x0`` is the video alone, [B, z, T, h, w], as is ``condition``; ``noise`` is that of subject, memory and video.

    Args:
        text: prompt embeds [B, L, D].
        caption: of the captions of the whole films, likewise.
        pool: clean one-frame latents of the candidates [B, z, P, h, w], oldest first.
        frames: place of each in the film, [B, P], relative to the target's first frame: all below 0.
        subject: image of the subject [B, z, 1, h, w]; None: none is denoised.
        subject_text: prompt embeds of its caption [B, L, D].
        blank: condition latents of the subject [B, z, 1, h, w].
    """

    text: Tensor
    caption: Tensor
    pool: Tensor
    frames: Tensor
    subject: Tensor | None
    subject_text: Tensor | None
    blank: Tensor


@dataclass(frozen=True, kw_only=True)
class MementoPlan:
    """One sample before anything is read."""

    clip: int  # index of the target
    pool: tuple[Frame, ...]  # the candidates, oldest first
    frames: tuple[int, ...]  # the place of each
    subject: Frame | None
    given: int  # how many first frames of the target are given
    drop_text: bool
    drop_subject_text: bool
    seed: int  # of the noise and the noise level


class MementoSamples:
    """The samples of each step; see :class:`storymem.training.batches.Samples`.

    Targets are all clips but the first of a group. Candidates are at most ``objective.older`` keyframes of older clips
    and ``objective.recent`` of the clip before; in some steps the clip before alone. The subject is a keyframe of an
    earlier clip. One of an older clip is not among the candidates if there are others.

    Args:
        objective: how many candidates, and how often there is a subject.
        encodings: of the captions of whole films.
        batch: how often frames are given and texts left out; held-out samples always have texts.
        conditioning: which first frames of its target a sample may be given.
        count: samples of one step, over all processes.

    Raises:
        ValueError: if no group of the split has two clips of one size.
    """

    def __init__(
        self,
        latents: LatentCache,
        objective: MementoObjectiveSettings,
        batch: BatchSettings,
        *,
        encodings: Encodings,
        conditioning: Conditioning,
        seed: int,
        count: int,
        split: Split = "train",
    ) -> None:
        self._latents, self._encodings, self._clips, self._objective = latents, encodings, latents.clips, objective
        self._seed, self.count = [seed, SPLIT_NUMBERS[split]], count
        self._given_frames, self._given_probability = GIVEN_FRAMES[conditioning], batch.given_probability
        self._text_dropout = batch.text_dropout if split == "train" else 0.0
        self._films: dict[int, list[int]] = {}  # target -> the clips before it
        films: defaultdict[tuple[int, tuple[int, int, int]], list[int]] = defaultdict(list)
        for index, clip in enumerate(latents.clips):  # by id
            if clip.split == split:
                before = films[clip.group, clip.bucket]
                if before:
                    self._films[index] = list(before)
                before.append(index)
        if not self._films:
            cure = "" if split == "train" else ", or set validation.every=0"
            raise ValueError(f"no group of the {split} clips has two of one size: prepare more data{cure}")
        self._targets = np.array(sorted(self._films))
        buckets = [self._clips[clip].bucket for clip in self._targets]
        self._bucket_of = np.unique(buckets, axis=0, return_inverse=True)[1].ravel()
        self._available = {  # candidates of each target, by whether the clip before is alone
            alone: np.array([self._count(int(target), alone) for target in self._targets]) for alone in (False, True)
        }

    def plan(self, step: int) -> tuple[MementoPlan, ...]:
        """The samples of ``step`` (from 0), all of one size and one number of candidates."""
        random = np.random.default_rng([*self._seed, step])
        recent_only = bool(random.random() < self._objective.recent_probability)
        with_subject = bool(random.random() < self._objective.subject_probability) and not recent_only
        first = int(random.integers(len(self._targets)))
        available = self._available[recent_only]
        fitting = np.flatnonzero((self._bucket_of == self._bucket_of[first]) & (available >= available[first]))
        others = fitting[fitting != first]
        pool = others if len(others) >= self.count - 1 else fitting
        chosen = [first]
        if self.count > 1:
            chosen += random.choice(pool, self.count - 1, replace=len(pool) < self.count - 1).tolist()
        size, subject = int(available[first]), with_subject and self._objective.subject_weight > 0
        return tuple(self._sample(int(self._targets[one]), size, recent_only, subject, random) for one in chosen)

    def _count(self, target: int, recent_only: bool) -> int:
        older, last = self._candidates(target)
        return len(last) if recent_only else min(len(older), self._objective.older) + len(last)

    def _candidates(self, target: int) -> tuple[list[Frame], list[Frame]]:
        """Keyframes of older clips, and those of the clip before, at most ``recent``."""
        *older, last = self._films[target]
        frames = [(clip, keyframe) for clip in older for keyframe in range(self._clips[clip].keyframes)]
        of_last = [(last, keyframe) for keyframe in range(self._clips[last].keyframes)]
        return frames, of_last[-self._objective.recent :]

    def _sample(
        self, target: int, size: int, recent_only: bool, with_subject: bool, random: np.random.Generator
    ) -> MementoPlan:
        older, last = self._candidates(target)
        subject: Frame | None = None
        if with_subject:
            frames = [*older, *last]
            subject = frames[int(random.integers(len(frames)))]
            if len(older) + len(last) > size:
                older = [frame for frame in older if frame != subject]
        last = last[-size:]
        order = random.permutation(len(older))[: 0 if recent_only else size - len(last)]
        pool = [*(older[place] for place in sorted(order)), *last]
        given, drop, drop_subject = random.random(), random.random(), random.random()
        return MementoPlan(
            clip=target,
            pool=tuple(pool),
            frames=tuple(self._place(frame, target) for frame in pool),
            subject=subject,
            given=self._given_frames if given < self._given_probability else 0,
            drop_text=drop < self._text_dropout,
            drop_subject_text=drop_subject < self._text_dropout,
            seed=int(random.integers(2**62)),
        )

    def _place(self, frame: Frame, target: int) -> int:
        """The place of a keyframe relative to the target: a clip's keyframes are taken as evenly spaced."""
        clip, keyframe = frame
        film, length = self._films[target], self._clips[target].bucket[0]
        inside = round(keyframe * (length - 1) / max(1, self._clips[clip].keyframes - 1))
        return (film.index(clip) - len(film)) * length + inside

    def read(self, plan: MementoPlan) -> MementoBatch:
        """The sample of a plan, as a batch of one."""
        latents, clip = self._latents, plan.clip
        checked = partial(checked_tensor, latents)

        def image(frame: Frame) -> Tensor:
            return checked(latents.keyframes(frame[0])[frame[1]], f"keyframe {frame[1]} of clip", frame[0])

        x0 = checked(latents.video(clip), "latents of clip", clip)[None]
        blank = checked(latents.given(clip, 0), "blank frames of clip", clip)[None]
        shown = checked(latents.given(clip, plan.given), "given frames of clip", clip)[None]
        pool = torch.cat([image(frame) for frame in plan.pool], dim=1)[None]
        text = self._text(clip, drop=plan.drop_text)
        whole = global_caption(latents.clips[clip].caption) if self._objective.query else None
        objective, subject = self._objective, None if plan.subject is None else image(plan.subject)[None]
        slots = (subject is not None) + min(len(plan.pool), objective.local + objective.whole) + x0.shape[2]
        generator = torch.Generator().manual_seed(plan.seed)
        of_subject = None
        if plan.subject is not None:
            of_subject = self._text(plan.subject[0], drop=plan.drop_subject_text)
        return MementoBatch(
            x0=x0,
            noise=torch.randn(1, x0.shape[1], slots, *x0.shape[3:], generator=generator),
            u=torch.rand(1, generator=generator),
            condition=condition_channels(None, shown, latents.spec.latent_frames(plan.given), latents.spec),
            mask=checked(latents.mask(clip), "mask of clip", clip)[None],
            text=text[None],
            caption=(text if whole is None else self._encodings.text(whole, len(text)))[None],
            pool=pool,
            frames=torch.tensor([plan.frames]),
            subject=subject,
            subject_text=None if of_subject is None else of_subject[None],
            blank=blank[:, :, :1],  # the first latent frame of a video is that of its first frame alone
            ids=(latents.clips[clip].id,),
        )

    def _text(self, clip: int, *, drop: bool) -> Tensor:
        """[L, D]: the caption of a clip, or the empty text."""
        text = self._latents.empty_text() if drop else self._latents.text(clip)
        return checked_tensor(self._latents, text, "text embeds of clip", clip)


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """What was recalled for the samples of a batch.

    Args:
        latents: [B, z, K, h, w], oldest first, with a gradient to the query.
        positions: of each sample.
    """

    latents: Tensor
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class MementoObjective:
    """The loss of an expert on a batch: of the video, and ``subject_weight`` times that of the subject.

    Memory is denoised with the video and has no loss. With ``memory_attention: cached`` it is clean, as in StoryMem's
    cached layout and at its positions: then subject and video share nothing but the memory that they read, so films
    need no subject.

    Args:
        settings: noise levels, weights and recall.
        boundary: between the experts' noise levels; None: there is one expert.
        rope_stride: S, the distance between cached memory frames on the temporal axis.
        memory_attention: the mode.
        spec: the base model.
    """

    settings: MementoObjectiveSettings
    boundary: float | None
    rope_stride: int
    memory_attention: MemoryMode
    spec: ModelSpec

    def __call__(self, network: nn.Module, expert: Expert, batch: MementoBatch) -> Losses:
        """The loss of ``network``, a Wan transformer (wrapped or not), on a batch that lies on its device."""
        s = noise_level(batch.u, expert=expert, boundary=self.boundary, shift=self.settings.shift)
        recalled = self.recall(getattr(network, "module", network), batch)
        cached = self.memory_attention == "cached"
        subject = [] if batch.subject is None else [batch.subject]
        slots = {"subject": sum(one.shape[2] for one in subject), "memory": recalled.latents.shape[2]}
        parts = [recalled.latents, *subject, batch.x0] if cached else [*subject, recalled.latents, batch.x0]
        x0 = torch.cat(parts, dim=2)
        layouts = [self.layout(positions, batch) for positions in recalled.positions]
        noisy = torch.cat([torch.full((part.frames,), part.timestep is None) for part in layouts[0].segments])
        noise = batch.noise
        seen = model_input(noised(x0, noise, s[:, None] * noisy.to(s.device)), self.condition(recalled.latents, batch))
        prediction = self._predicted(network, seen, s, batch, layouts)
        errors = (prediction - (noise - x0.detach())).square().mean(dim=1)  # [B, N, h, w]
        video = errors[:, layouts[0].span("video")]
        weight = self.settings.mask_weight
        weighted = video if weight == 1 else video * mask_weights(batch.mask, weight)
        losses, sums = weighted.mean(dim=(1, 2, 3)), {"loss_video": mean_of(video.detach())}
        if slots["subject"]:
            reconstruction = errors[:, layouts[0].span("subject")].mean(dim=(1, 2, 3))
            losses = losses + self.settings.subject_weight * reconstruction
            sums["loss_reconstruction"] = mean_of(reconstruction.detach())
        found = losses.detach()
        sums |= {"loss": mean_of(found), f"loss_{expert}": mean_of(found)}
        sums["memory_frames"] = mean_of(torch.full_like(found, slots["memory"]))
        sums["loss_by_level"] = bin_sums(found, s, self.settings.bins)
        return Losses(total=losses.mean(), sums=sums)

    def recall(self, transformer: Any, batch: MementoBatch) -> Recalled:
        """What the expert's query chooses for each sample; without a query the newest candidates."""
        local, whole = self.settings.local, self.settings.whole
        query, latents, positions = getattr(transformer, "keyframe_query", None), [], []
        texts = zip(batch.text, batch.caption, strict=True)
        for pool, frames, (text, caption) in zip(batch.pool, batch.frames.tolist(), texts, strict=True):
            if query is None:
                index = list(range(len(frames)))[-(local + whole) :]
                latents.append(pool[:, index])
            else:
                with torch.autocast(pool.device.type, enabled=False):  # as in generation
                    read = [embedded(transformer, one) for one in (text, caption)]
                    scores = query(pool, film_positions(frames, 0), *read)
                    rows = straight_through(*mean_scores(scores, len(query.queries)), local=local, whole=whole)
                    rows = rows[rows.detach().argmax(dim=1).argsort()]
                    # So every parameter has a gradient, if only 0: several processes wait for each other's.
                    latents.append(torch.einsum("kp,cphw->ckhw", rows, pool) + 0.0 * scores.sum())
                index = rows.detach().argmax(dim=1).tolist()
            positions.append(tuple(min(place, -1) for place in film_positions([frames[n] for n in index], 0)))
        return Recalled(latents=torch.stack(latents), positions=tuple(positions))

    def layout(self, positions: Sequence[int], batch: MementoBatch) -> Layout:
        """The layout of a sample."""
        cached = self.memory_attention == "cached"
        at = memory_positions(len(positions), self.rope_stride) if cached else tuple(positions)
        return memento(at, batch.x0.shape[2], subject=batch.subject is not None, cached=cached)

    def condition(self, memory: Tensor, batch: MementoBatch) -> Tensor:
        """The condition [B, mask + z, N, h, w] of all frames, in the order of the layout."""
        assert batch.condition is not None
        known = condition_channels(memory, memory[:, :, :0], 0, self.spec)
        blank = [] if batch.subject is None else [condition_channels(None, batch.blank, 0, self.spec)]
        parts = [known, *blank] if self.memory_attention == "cached" else [*blank, known]
        return torch.cat([*parts, batch.condition], dim=2)

    def _predicted(
        self, network: nn.Module, seen: Tensor, s: Tensor, batch: MementoBatch, layouts: Sequence[Layout]
    ) -> Tensor:
        """The prediction [B, z, N, h, w], float32; samples of one layout in one forward."""
        dtype: Any = getattr(network, "module", network).dtype
        found: list[Tensor | None] = [None] * len(layouts)
        for layout in dict.fromkeys(layouts):
            own = [number for number, other in enumerate(layouts) if other == layout]
            texts = {"prompt": batch.text[own].to(dtype)}
            if batch.subject_text is not None:
                texts["subject"] = batch.subject_text[own].to(dtype)
            (prediction,) = network(seen[own].to(dtype), s[own] * TIMESTEPS, texts, return_dict=False, layout=layout)
            for number, one in zip(own, prediction.float(), strict=True):
                found[number] = one
        return torch.stack([one for one in found if one is not None])
