"""From a cache of latents to batches (paper section 3.3): a target clip, and frames of clips like it as its memory.

Everything that is random in a sample follows from the run's seed, the step and the sample's place in the step, and
from nothing else: not from the number of processes or of data workers, nor from where a run was interrupted.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from storymem.data.sealed import digest
from storymem.io import NotFiniteError
from storymem.training.settings import GIVEN_FRAMES, BatchSettings, Conditioning
from storymem.wan.conditioning import condition_channels
from storymem.wan.spec import ModelSpec

Split = Literal["train", "valid"]
_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "valid": 1}
_AHEAD = 4  # batches that each reader is ahead of the training
_SLOW_SECONDS = 60  # after which a wait for data is told
_END_SECONDS = 2.0  # how long readers are waited for: a read that hangs cannot be interrupted


class Clip(Protocol):
    """What is known of a clip without reading it; see :class:`storymem.data.cache.CachedClip`."""

    @property
    def id(self) -> str: ...
    @property
    def bucket(self) -> tuple[int, int, int]: ...
    @property
    def keyframes(self) -> int: ...
    @property
    def mask(self) -> bool: ...


class Latents(Protocol):
    """Where clips' latents come from; :class:`storymem.data.cache.LatentCache` is one.

    Several threads read at the same time.
    """

    @property
    def clips(self) -> Sequence[Clip]: ...
    @property
    def spec(self) -> ModelSpec: ...
    def cure(self, index: int) -> str: ...
    def video(self, index: int) -> Tensor: ...
    def keyframes(self, index: int) -> Tensor: ...
    def given(self, index: int, frames: int) -> Tensor: ...
    def mask(self, index: int) -> Tensor: ...
    def text(self, index: int) -> Tensor: ...
    def empty_text(self) -> Tensor: ...
    def groups(self, split: Split) -> dict[int, list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """One sample before anything is read.

    Args:
        clip: index of the target.
        memory: (clip, keyframe) of each memory frame, in the order of the memory slots.
        given: how many first frames of the target are given: 0, 1 or 5.
        drop_text: whether the empty text stands in for the caption.
        seed: of the noise and the noise level.
    """

    clip: int
    memory: tuple[tuple[int, int], ...]
    given: int
    drop_text: bool
    seed: int


class SamplePlanner:
    """Decides what each step trains on.

    The first target of a step is drawn from all clips of the split. It decides the step's size (its bucket) and, with
    a draw from 0..max_memory, the number of memory frames M: so every process has the same work. A group that cannot
    give that many gives what it has. The other targets are drawn from the clips of that bucket that can have M memory
    frames. Memory frames are keyframes of the group's other clips of the same height and width, in random order.

    Args:
        latents: the clips.
        split: which of them.
        seed: of all draws.
        samples: of one step, over all processes.
        max_memory: the most memory frames.
        given_frames: how many first frames of the target a sample may be given.
        given_probability: how often.
        text_dropout: how often the text is left out.

    Raises:
        ValueError: if the split is empty, or no group can give ``max_memory`` frames.
    """

    def __init__(
        self,
        latents: Latents,
        *,
        split: Split = "train",
        seed: int,
        samples: int,
        max_memory: int,
        given_frames: int = 0,
        given_probability: float = 0.0,
        text_dropout: float = 0.0,
    ) -> None:
        self._same_given = not latents.spec.condition_channels  # it is part of the layout there
        self._clips, self._split, self._seed = latents.clips, split, seed
        self.samples, self.max_memory = samples, max_memory
        self._given_frames, self._given_probability = given_frames, given_probability
        self._text_dropout = text_dropout
        self._companions: dict[int, list[int]] = {}
        for members in latents.groups(split).values():
            by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
            for index in members:
                by_size[self._clips[index].bucket[1:]].append(index)
            self._companions |= {index: alike for alike in by_size.values() for index in alike}
        self._targets = np.array(sorted(self._companions), dtype=np.int64)
        self._available = np.array([self._memory_of(int(index)) for index in self._targets], dtype=np.int64)
        buckets = sorted({self._clips[int(index)].bucket for index in self._targets})
        number = {bucket: position for position, bucket in enumerate(buckets)}
        self._bucket_of = np.array([number[self._clips[int(i)].bucket] for i in self._targets], dtype=np.int64)
        self._check()

    def _memory_of(self, index: int) -> int:
        """How many memory frames clip ``index`` can have."""
        return sum(self._clips[other].keyframes for other in self._companions[index] if other != index)

    def _check(self) -> None:
        if not len(self._targets):
            raise ValueError(
                f"the cache has no {self._split} clips: prepare more data"
                + ("" if self._split == "train" else ", or set validation.every=0")
            )
        most = int(self._available.max())
        if self._split == "train" and most < self.max_memory:
            largest = max(len(alike) for alike in self._companions.values())
            reason = (
                "all groups are of size one, so no clip has another to remember"
                if largest == 1
                else f"no clip has more than {most} keyframes in the other clips of its group and size"
            )
            raise ValueError(
                f"batch.max_memory={self.max_memory}, but {reason}: set batch.max_memory={most} or less, or prepare "
                "the data with larger groups (group.similarity, group.max_size) or more keyframes a clip"
            )

    def plan(self, step: int) -> tuple[SamplePlan, ...]:
        """The samples of ``step`` (from 0), all of one size and one number of memory frames."""
        random = np.random.default_rng([self._seed, _SPLIT_NUMBERS[self._split], step])
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
        frames = [
            (other, keyframe)
            for other in self._companions[clip]
            if other != clip
            for keyframe in range(self._clips[other].keyframes)
        ]
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
        condition: mask and condition latents [B, 20, M + T, h, w]; None: the base has no condition channels.
        mask: where the subject of the video is, [B, T, h, w] in 0..1; 0 everywhere if that is not known.
        text: prompt embeds [B, L, D].
        memory_frames: M.
        given: latent frames that begin the video and are given, of every sample; with ``condition`` it says it itself.
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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changes: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **changes)


class MemoryDataset:
    """Plans in, batches out; a :class:`SamplePlan` stands for an index."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents

    def __getitem__(self, plan: SamplePlan) -> Batch:
        """The one sample that ``plan`` describes, as a batch of one.

        Raises:
            NotFiniteError: naming the clip and what of it holds NaN or infinity.
        """
        video = self._checked(self.latents.video(plan.clip), "latents of clip", plan.clip)[None]
        memory = [
            self._checked(self.latents.keyframes(clip)[keyframe], f"keyframe {keyframe} of clip", clip)
            for clip, keyframe in plan.memory
        ]
        remembered = torch.cat(memory, dim=1)[None] if memory else None
        text = self.latents.empty_text() if plan.drop_text else self.latents.text(plan.clip)
        x0 = video if remembered is None else torch.cat([remembered, video], dim=2)
        generator = torch.Generator().manual_seed(plan.seed)
        spec, condition = self.latents.spec, None
        slots = spec.latent_frames(plan.given)
        if spec.condition_channels:
            given = self._checked(self.latents.given(plan.clip, plan.given), "given frames of clip", plan.clip)[None]
            condition = condition_channels(remembered, given, slots, spec)
        return Batch(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            u=torch.rand(1, generator=generator),
            condition=condition,
            mask=self._checked(self.latents.mask(plan.clip), "mask of clip", plan.clip)[None],
            text=self._checked(text, "text embeds of clip", plan.clip)[None],
            memory_frames=len(memory),
            given=slots,
            ids=(self.latents.clips[plan.clip].id,),
        )

    def _checked(self, tensor: Tensor, what: str, clip: int) -> Tensor:
        if not bool(tensor.isfinite().all()):
            cure = self.latents.cure(clip)
            raise NotFiniteError(f"{what} {self.latents.clips[clip].id}: NaN or infinite values; {cure}")
        return tensor


def collate(samples: Sequence[Batch]) -> Batch:
    """Batches of one M as one batch."""
    assert len({sample.memory_frames for sample in samples}) == 1, "a batch has one number of memory frames"
    if samples[0].condition is None:
        assert len({sample.given for sample in samples}) == 1, "a batch has one number of given frames"

    def joined(name: str) -> Any:
        values = [getattr(sample, name) for sample in samples]
        return None if values[0] is None else torch.cat(values)

    return Batch(
        x0=joined("x0"),
        noise=joined("noise"),
        u=joined("u"),
        condition=joined("condition"),
        mask=joined("mask"),
        text=joined("text"),
        memory_frames=samples[0].memory_frames,
        given=samples[0].given,
        ids=tuple(id for sample in samples for id in sample.ids),
    )


def _turns(
    planner: SamplePlanner, *, size: int, rank: int, world: int, start: int
) -> Generator[list[SamplePlan], None, None]:
    """One process's share of each step, cut into batches; without end."""
    share = planner.samples // world
    step = start
    while True:
        mine = planner.plan(step)[rank * share : (rank + 1) * share]
        for first in range(0, share, size):
            yield list(mine[first : first + size])
        step += 1


def training_set_digest(latents: Latents) -> str:
    """A short hash of all that decides which samples a seed draws from a training set."""
    clips = [(clip.id, clip.bucket, clip.keyframes, clip.mask) for clip in latents.clips]
    return digest(clips, latents.groups("train"))


def train_planner(
    latents: Latents, batch: BatchSettings, *, conditioning: Conditioning, seed: int, world: int
) -> SamplePlanner:
    """The planner of a training run of ``world`` processes."""
    return SamplePlanner(
        latents,
        seed=seed,
        samples=batch.size * batch.accumulation * world,
        max_memory=batch.max_memory,
        given_frames=GIVEN_FRAMES[conditioning],
        given_probability=batch.given_probability,
        text_dropout=batch.text_dropout,
    )


def valid_planner(latents: Latents, batch: BatchSettings, *, conditioning: Conditioning, seed: int) -> SamplePlanner:
    """One sample a step from held-out groups, always with its text."""
    return SamplePlanner(
        latents,
        split="valid",
        seed=seed,
        samples=1,
        max_memory=batch.max_memory,
        given_frames=GIVEN_FRAMES[conditioning],
        given_probability=batch.given_probability,
    )


def train_batches(
    latents: Latents,
    planner: SamplePlanner,
    *,
    size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
) -> Generator[Batch, None, None]:
    """The batches of one process from step ``start`` on, without end: those of a step follow each other.

    Close it to end the threads that read.

    Args:
        latents: where tensors are read.
        planner: what each step trains on.
        size: samples of a batch; divides the process's share of a step.
        workers: threads that read ahead; 0: a batch is read when it is asked for.
        rank: which process of the run this is.
        world: how many there are.
        start: the first step.
    """
    dataset = MemoryDataset(latents)
    turns = _turns(planner, size=size, rank=rank, world=world, start=start)

    def read(plans: Sequence[SamplePlan]) -> Batch:
        return collate([dataset[plan] for plan in plans])

    yield from map(read, turns) if workers == 0 else _read_ahead(read, turns, workers)


def _read_ahead(
    read: Callable[[Sequence[SamplePlan]], Batch], turns: Iterator[Sequence[SamplePlan]], workers: int
) -> Generator[Batch, None, None]:
    """``read`` of each turn, in order, by threads that stay a few turns ahead; their errors are raised here.

    Threads and not processes: reading and arithmetic of tensors leave the interpreter to others, and nothing has to
    be passed through shared memory.
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
                print(f"no data for {_SLOW_SECONDS} s: is the disk of the training set there?", file=sys.stderr)
            yield future.result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            asked.put(None)
        deadline = time.monotonic() + _END_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
