"""From a cache of latents to batches (paper section 3.3): a target clip, and frames of clips like it as its memory.

Everything random in a sample follows from the run's seed, the step and the sample's place in the step, and from nothing
else: not from the number of processes or readers, nor from where a run was interrupted.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from storymem.data.manifest import digest
from storymem.io import NotFiniteError
from storymem.training.settings import GIVEN_FRAMES, BatchSettings, Conditioning
from storymem.wan.conditioning import condition_channels

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split

_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "valid": 1}
_AHEAD = 4  # batches that each reader is ahead of the training
_SLOW_SECONDS = 60  # after which a wait for data is reported
_END_SECONDS = 2.0  # how long readers are waited for: a read that hangs cannot be interrupted


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """One sample before anything is read."""

    clip: int  # index of the target
    memory: tuple[tuple[int, int], ...]  # (clip, keyframe) of each memory frame, in the order of the memory slots
    given: int  # how many first frames of the target are given: 0, 1 or 5
    drop_text: bool  # whether the empty text replaces the caption
    seed: int  # of the noise and the noise level


class SamplePlanner:
    """Plans the samples of each step.

    The first target of a step is drawn from all clips of the split. It determines the step's size (its bucket) and,
    with a draw from 0..max_memory, the number of memory frames M: so every process has the same work. A group with
    fewer gives what it has. The other targets are drawn from the clips of that bucket that can have M memory frames.
    Memory frames are keyframes of the group's other clips of the same height and width, in random order.

    Args:
        batch: the most memory frames, and how often what is given or left out; held-out samples always have text.
        conditioning: which first frames of its target a sample may be given.
        samples: of one step, over all processes.

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
        samples: int,
        split: Split = "train",
    ) -> None:
        self._same_given = not latents.spec.condition_channels  # then it is part of the layout
        self._clips, self._seed = latents.clips, [seed, _SPLIT_NUMBERS[split]]
        self.samples, self.max_memory = samples, batch.max_memory
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
        if self.samples > 1:
            others = fitting[fitting != first]
            pool = others if len(others) >= self.samples - 1 else fitting
            repeat = len(pool) < self.samples - 1
            chosen += random.choice(pool, self.samples - 1, replace=repeat).tolist()
        samples = [self._sample(int(self._targets[target]), memory, random) for target in chosen]
        if self._same_given:
            samples = [replace(sample, given=samples[0].given) for sample in samples]
        return tuple(samples)

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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one size and one number of memory frames; slots are memory first, then video.

    Args:
        x0: clean latents [B, 16, M + T, h, w].
        noise: e, of the same shape.
        u: [B] in 0..1, from which the noise level follows.
        condition: mask and conditioning latents [B, 20, M + T, h, w]; None: the base has no condition channels.
        mask: where the subject of the video is, [B, T, h, w] in 0..1; 0 everywhere if that is not known.
        text: prompt embeds [B, L, D].
        memory_frames: M.
        given: how many first latent frames of the video are given, in every sample; used where ``condition`` is None.
        ids: of the target clips.
    """

    x0: Tensor
    noise: Tensor
    u: Tensor
    condition: Tensor | None
    mask: Tensor
    text: Tensor
    memory_frames: int
    ids: tuple[str, ...]
    given: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def read_sample(latents: LatentCache, plan: SamplePlan) -> Batch:
    """The one sample of a plan, as a batch of one.

    Raises:
        NotFiniteError: naming the clip and what of it has NaN or infinity.
    """

    def checked(tensor: Tensor, what: str, clip: int) -> Tensor:
        if not bool(tensor.isfinite().all()):
            name, cure = latents.clips[clip].id, latents.cure(clip)
            raise NotFiniteError(f"{what} {name}: NaN or infinite values; {cure}")
        return tensor

    clip, spec = plan.clip, latents.spec
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
    return Batch(
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


def collate(samples: Sequence[Batch]) -> Batch:
    """Batches of one M, and of one number of given frames if there is no condition, as one batch."""
    joined: dict[str, Any] = {
        name: torch.cat([getattr(sample, name) for sample in samples])
        for name, value in vars(samples[0]).items()
        if isinstance(value, Tensor)
    }
    return replace(samples[0], **joined, ids=tuple(id for sample in samples for id in sample.ids))


def training_set_digest(latents: LatentCache) -> str:
    """A short hash of all that decides which samples a seed draws from a training set."""
    clips = [(clip.id, clip.bucket, clip.keyframes, clip.mask) for clip in latents.clips]
    return digest(clips, latents.groups("train"))


def train_batches(
    latents: LatentCache,
    planner: SamplePlanner,
    *,
    size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
) -> Generator[Batch, None, None]:
    """The batches of one process from step ``start`` on, without end. Close it to end the threads that read.

    Args:
        size: samples of a batch; divides the process's share of a step.
        workers: threads that read ahead; 0: a batch is read when it is needed.
        rank: the number of the process, of ``world`` processes.
    """
    share = planner.samples // world

    def plans() -> Iterator[Sequence[SamplePlan]]:
        for step in itertools.count(start):
            mine = planner.plan(step)[rank * share : (rank + 1) * share]
            yield from (mine[first : first + size] for first in range(0, share, size))

    def read(plans: Sequence[SamplePlan]) -> Batch:
        return collate([read_sample(latents, plan) for plan in plans])

    yield from map(read, plans()) if workers == 0 else _read_ahead(read, plans(), workers)


def _read_ahead(
    read: Callable[[Sequence[SamplePlan]], Batch], turns: Iterator[Sequence[SamplePlan]], workers: int
) -> Generator[Batch, None, None]:
    """``read`` of each turn, in order, by threads that stay a few turns ahead; their errors are raised here.

    Threads and not processes, as reading tensors releases the interpreter lock and nothing passes through shared
    memory; not an executor, whose threads cannot be daemons.
    """
    asked: queue.SimpleQueue[tuple[Future[Batch], Sequence[SamplePlan]] | None] = queue.SimpleQueue()
    waiting: deque[Future[Batch]] = deque()

    def work() -> None:
        while (job := asked.get()) is not None:
            future, plans = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(read(plans))
                except Exception as error:
                    future.set_exception(error)

    # Daemons: a read that hangs must not keep the process from ending.
    threads = [threading.Thread(target=work, name=f"reader-{number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            while len(waiting) < _AHEAD * workers:
                waiting.append(Future())
                asked.put((waiting[-1], next(turns)))
            future = waiting.popleft()
            if not wait([future], timeout=_SLOW_SECONDS).done:
                print(f"no data for {_SLOW_SECONDS} s: is the disk of the training set available?", file=sys.stderr)
            yield future.result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            asked.put(None)
        deadline = time.monotonic() + _END_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
