"""Memento (arXiv 2606.14667): a clip from recalled frames of earlier clips, and beside it an image of its subject.

Clips of a group are taken as the shots of one film, in the order of their ids. The recall is trained with the shot:
the KeyframeQuery of the expert chooses among the candidates, and gradients reach it through what it chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from storymem.story.captions import global_caption
from storymem.training.objectives.encodings import Needs
from storymem.training.objectives.flow import TIMESTEPS, FlowLoss, Losses, noised, noisy_frames, predict
from storymem.training.objectives.samples import Batch, Samples, Source, clips_alike, draw_noise, numbered
from storymem.training.objectives.settings import MementoObjectiveSettings
from storymem.training.run_settings import RunSettings
from storymem.wan.conditioning import condition_channels, model_input
from storymem.wan.keyframe_query import embedded, film_positions, mean_scores, straight_through
from storymem.wan.segments import Layout, memento, memory_positions
from storymem.wan.spec import Expert

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache

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


class MementoSamples(Samples):
    """Targets are all clips but the first of a group.

    Candidates are at most ``settings.older`` keyframes of older clips and ``settings.recent`` of the clip before; in
    some steps the clip before alone. The subject is a keyframe of an earlier clip. One of an older clip is not among
    the candidates if there are others. ``source.encodings`` holds the captions of whole films.

    Raises:
        ValueError: if no group of the split has two clips of one size.
    """

    def __init__(self, settings: MementoObjectiveSettings, source: Source) -> None:
        super().__init__(settings, source)
        self._clips = self.latents.clips
        alike = clips_alike(self.latents, self.split, same_length=True)
        # Target -> the clips before it.
        self._films = {clip: film[:place] for film in alike for place, clip in enumerate(film) if place}
        if not self._films:
            cure = "" if self.split == "train" else ", or set validation.every=0"
            raise ValueError(f"no group of the {self.split} clips has two of one size: prepare more data{cure}")
        self._targets = np.array(sorted(self._films))
        self._bucket_of = numbered([self._clips[clip].bucket for clip in self._targets])
        self._available = {  # candidates of each target, by whether the clip before is alone
            alone: np.array([self._count(int(target), alone) for target in self._targets]) for alone in (False, True)
        }

    @classmethod
    def needs(cls, settings: MementoObjectiveSettings, train: RunSettings, latents: LatentCache) -> Needs:
        splits = train.splits if settings.query else ()
        written = {global_caption(clip.caption) for clip in latents.clips if clip.split in splits}
        return Needs(texts=dict.fromkeys(filter(None, written), train.model.network.text_tokens))

    def plan(self, step: int) -> tuple[MementoPlan, ...]:
        """The samples of ``step`` (from 0), all of one size and one number of candidates."""
        random, settings = self.random(step), self._settings
        recent_only = bool(random.random() < settings.recent_probability)
        with_subject = bool(random.random() < settings.subject_probability) and not recent_only
        first = int(random.integers(len(self._targets)))
        available = self._available[recent_only]
        fitting = np.flatnonzero((self._bucket_of == self._bucket_of[first]) & (available >= available[first]))
        chosen = self.fill_up(first, fitting, random)
        size, subject = int(available[first]), with_subject and settings.subject_weight > 0
        return tuple(self._sample(int(self._targets[one]), size, recent_only, subject, random) for one in chosen)

    def _count(self, target: int, recent_only: bool) -> int:
        older, last = self._candidates(target)
        return len(last) if recent_only else min(len(older), self._settings.older) + len(last)

    def _candidates(self, target: int) -> tuple[list[Frame], list[Frame]]:
        """Keyframes of older clips, and those of the clip before, at most ``recent``."""
        *older, last = self._films[target]
        frames = [(clip, keyframe) for clip in older for keyframe in range(self._clips[clip].keyframes)]
        of_last = [(last, keyframe) for keyframe in range(self._clips[last].keyframes)]
        return frames, of_last[-self._settings.recent :]

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
            given=self.given(given),
            drop_text=drop < self.text_dropout,
            drop_subject_text=drop_subject < self.text_dropout,
            seed=int(random.integers(2**62)),
        )

    def _place(self, frame: Frame, target: int) -> int:
        """The place of a keyframe relative to the target: a clip's keyframes are taken as evenly spaced."""
        clip, keyframe = frame
        film, length = self._films[target], self._clips[target].bucket[0]
        inside = round(keyframe * (length - 1) / max(1, self._clips[clip].keyframes - 1))
        return (film.index(clip) - len(film)) * length + inside

    def read(self, plan: MementoPlan) -> MementoBatch:
        clip, settings = plan.clip, self._settings
        x0, text = self.video(clip), self.text(clip, drop=plan.drop_text)
        whole = global_caption(self._clips[clip].caption) if settings.query else None
        subject, subject_text = None, None
        if plan.subject is not None:
            subject = self.keyframe(*plan.subject)[None]
            subject_text = self.text(plan.subject[0], drop=plan.drop_subject_text)[None]
        slots = (subject is not None) + min(len(plan.pool), settings.local + settings.whole) + x0.shape[1]
        noise, u = draw_noise(plan.seed, (len(x0), slots, *x0.shape[2:]))
        shown, given = self.shown(clip, plan.given)[None], self.spec.latent_frames(plan.given)
        return MementoBatch(
            x0=x0[None],
            noise=noise,
            u=u,
            condition=condition_channels(None, shown, given, self.spec),
            mask=self.mask(clip)[None],
            text=text[None],
            caption=(text if whole is None else self.encodings.text(whole, len(text)))[None],
            pool=torch.cat([self.keyframe(*frame) for frame in plan.pool], dim=1)[None],
            frames=torch.tensor([plan.frames]),
            subject=subject,
            subject_text=subject_text,
            blank=self.shown(clip, 0)[None, :, :1],  # its first latent frame is that of the first frame alone
            ids=(self._clips[clip].id,),
        )


@dataclass(frozen=True, kw_only=True)
class MementoObjective(FlowLoss[MementoObjectiveSettings]):
    """The loss of the video, and ``subject_weight`` times that of the subject.

    Memory is denoised with the video and has no loss. With ``memory_attention: cached`` it is clean, as in StoryMem's
    cached layout and at its positions: then subject and video share nothing but the memory that they read, so films
    need no subject.
    """

    def __call__(self, network: nn.Module, expert: Expert, batch: MementoBatch) -> Losses:
        s = self.level(batch.u, expert)
        memory, positions = self.recall(getattr(network, "module", network), batch)
        subject = [] if batch.subject is None else [batch.subject]
        cached = self.memory_attention == "cached"
        parts = [memory, *subject, batch.x0] if cached else [*subject, memory, batch.x0]
        x0 = torch.cat(parts, dim=2)
        layouts = [self.layout(of_sample, batch) for of_sample in positions]
        levels = s[:, None] * noisy_frames(layouts[0]).to(s.device)
        seen = model_input(noised(x0, batch.noise, levels), self.condition(memory, batch))
        prediction = _predict_each(network, seen, s, batch, layouts)
        errors = (prediction - (batch.noise - x0.detach())).square().mean(dim=1)  # [B, N, h, w]
        video = errors[:, layouts[0].span("video")]
        losses = self.weighted(video, batch.mask).mean(dim=(1, 2, 3))
        more = {"memory_frames": torch.full_like(losses, memory.shape[2])}
        if subject:
            more["loss_reconstruction"] = errors[:, layouts[0].span("subject")].mean(dim=(1, 2, 3))
            losses = losses + self.settings.subject_weight * more["loss_reconstruction"]
        return self.losses(expert, losses, video, batch.mask, (losses, s), **more)

    def recall(self, transformer: Any, batch: MementoBatch) -> tuple[Tensor, list[tuple[int, ...]]]:
        """What the expert's query chooses for each sample; without a query the newest candidates.

        Returns:
            latents [B, z, K, h, w], oldest first, with a gradient to the query; and the positions of each sample.
        """
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
        return torch.stack(latents), positions

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


def _predict_each(
    network: nn.Module, seen: Tensor, s: Tensor, batch: MementoBatch, layouts: Sequence[Layout]
) -> Tensor:
    """The prediction [B, z, N, h, w]; samples of one layout in one forward."""
    found: dict[int, Tensor] = {}
    for layout in dict.fromkeys(layouts):
        own = [number for number, other in enumerate(layouts) if other == layout]
        texts = {"prompt": batch.text[own]}
        if batch.subject_text is not None:
            texts["subject"] = batch.subject_text[own]
        prediction = predict(network, seen[own], s[own] * TIMESTEPS, texts, layout)
        found |= zip(own, prediction, strict=True)
    return torch.stack([found[number] for number in range(len(layouts))])
