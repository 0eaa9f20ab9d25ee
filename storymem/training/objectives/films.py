"""Several clips of a group in order as one sequence, for systems that denoise all shots of a film at once.

Every clip and every caption is encoded alone, as the toy films of these systems are; a shot reads the text of its scene
and its own caption.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from storymem.io import parse_json, read_text, text_lines
from storymem.training.batches import checked_tensor
from storymem.training.objectives.memory import SPLIT_NUMBERS
from storymem.training.objectives.sequence import SequenceBatch
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import Layout, Text, scene_and_own_text
from storymem.wan.spec import ModelSpec

if TYPE_CHECKING:
    from storymem.data.cache import CachedClip, LatentCache, Split
    from storymem.training.objectives.encodings import Encodings

LayoutOf = Callable[[Sequence[int], Sequence[Text]], Layout]
"""From the latent frames and the text of each shot to the layout of a film."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A sample of neighbouring clips before anything is read.

    Args:
        clips: their indices, in order.
        drop_text: whether the empty text replaces all texts.
        seed: of the noise and the noise levels.
    """

    clips: tuple[int, ...]
    drop_text: bool
    seed: int


class FilmSamples:
    """See :class:`storymem.training.batches.Samples`.

    A film is a run of neighbouring clips of a group, of one height and width, in the order of their ids. The first film
    of a step decides how many shots all have and how long they are.

    Args:
        spec: the base model that is trained; of two with one VAE only one may have condition channels.
        layout: of a film.
        scenes: the text of each clip's scene, see :func:`scene_texts`.
        encodings: holds the embeddings of these texts.
        shots: the fewest and the most of a film.
        levels: whether every shot has a noise level of its own.
        text_dropout: how often a sample has no text; held-out samples always have it.
    """

    def __init__(
        self,
        latents: LatentCache,
        *,
        spec: ModelSpec,
        layout: LayoutOf,
        scenes: Mapping[int, str],
        encodings: Encodings,
        shots: tuple[int, int],
        levels: bool,
        text_dropout: float,
        seed: int,
        count: int,
        split: Split = "train",
    ) -> None:
        self.count = count
        self._spec = spec
        self._latents, self._layout, self._scenes, self._encodings = latents, layout, scenes, encodings
        self._levels, self._seed = levels, [seed, SPLIT_NUMBERS[split]]
        self._text_dropout = text_dropout if split == "train" else 0.0
        runs = neighbours(latents, shots, split)
        self._lengths = sorted({len(run) for run in runs})
        self._runs = {length: [run for run in runs if len(run) == length] for length in self._lengths}

    def plan(self, step: int) -> tuple[RunPlan, ...]:
        """The samples of ``step`` (from 0), all of one shape."""
        random = np.random.default_rng([*self._seed, step])
        runs = self._runs[self._lengths[int(random.integers(len(self._lengths)))]]
        return draw_runs(runs, self._shape, self.count, self._text_dropout, random)

    def read(self, plan: RunPlan) -> SequenceBatch:
        """The sample of a plan, as a batch of one."""
        latents, spec = self._latents, self._spec
        checked = partial(checked_tensor, latents)
        videos = [checked(latents.video(clip), "latents of clip", clip) for clip in plan.clips]
        x0 = torch.cat(videos, dim=1)[None]
        masks = [checked(latents.mask(clip), "mask of clip", clip) for clip in plan.clips]
        condition = None
        if spec.condition_channels:
            blank = [condition_channels(None, latents.given(clip, 0)[None], 0, spec) for clip in plan.clips]
            condition = torch.cat(blank, dim=2)
        text = self._text(plan)
        generator = torch.Generator().manual_seed(plan.seed)
        return SequenceBatch(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            u=torch.rand(1, len(videos) if self._levels else 1, generator=generator),
            condition=condition,
            mask=torch.cat(masks)[None],
            text=text.flatten(0, 1)[None],
            layout=self._layout([video.shape[1] for video in videos], scene_and_own_text(len(videos), text.shape[1])),
            ids=tuple(latents.clips[clip].id for clip in plan.clips),
        )

    def _text(self, plan: RunPlan) -> Tensor:
        """[1 + shots, L, D]: the scene, and each shot."""
        latents = self._latents
        if plan.drop_text:
            return latents.empty_text().expand(1 + len(plan.clips), -1, -1)
        captions = [checked_tensor(latents, latents.text(clip), "text embeds of clip", clip) for clip in plan.clips]
        return torch.stack([self._encodings.text(self._scenes[plan.clips[0]], len(captions[0])), *captions])

    def _shape(self, run: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return [self._latents.clips[clip].bucket for clip in run]


def neighbours(latents: LatentCache, shots: tuple[int, int], split: Split) -> list[tuple[int, ...]]:
    """All runs of neighbouring clips of a group, of one height and width, with ``shots`` clips (fewest and most).

    Raises:
        ValueError: if there are none.
    """
    alike: defaultdict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
    for index, clip in enumerate(latents.clips):  # ordered by id
        if clip.split == split:
            alike[clip.group, clip.bucket[1:]].append(index)
    runs = [
        tuple(members[start : start + number])
        for members in alike.values()
        for number in range(shots[0], shots[1] + 1)
        for start in range(len(members) - number + 1)
    ]
    if not runs:
        cure = "prepare larger groups (group.max_size)" if split == "train" else "set validation.every=0"
        raise ValueError(f"no group of {split} clips has {shots[0]} clips of one height and width: {cure}")
    return runs


def draw_runs(
    runs: Sequence[tuple[int, ...]],
    shape: Callable[[tuple[int, ...]], object],
    count: int,
    text_dropout: float,
    random: np.random.Generator,
) -> tuple[RunPlan, ...]:
    """``count`` of ``runs`` with the ``shape`` of the first that is drawn, different ones where there are enough."""
    first = runs[int(random.integers(len(runs)))]
    fitting = [run for run in runs if shape(run) == shape(first) and run != first] or [first]
    more = random.choice(len(fitting), count - 1, replace=len(fitting) < count - 1)
    return tuple(
        RunPlan(clips=run, drop_text=random.random() < text_dropout, seed=int(random.integers(2**62)))
        for run in [first, *(fitting[number] for number in more)]
    )


def scene_texts(clips: Sequence[CachedClip], path: str | None) -> dict[int, str]:
    """The text of the scene of each clip, by its index.

    Args:
        path: a file with a line of JSON per scene: ``{"folder": "000045_eli", "caption": "Eli on the moon."}``, where
            the folder is that of the clips among the videos; None: all scenes have the empty text.

    Raises:
        ValueError: for a file that is not of this form, or lacks the folder of a clip.
    """
    if path is None:
        return dict.fromkeys(range(len(clips)), "")
    texts: dict[str, str] = {}
    for number, line in enumerate(text_lines(read_text(path)), start=1):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("folder", "caption")):
            raise ValueError(f'{path}, line {number}: must be {{"folder": "...", "caption": "..."}}')
        texts[row["folder"]] = row["caption"]
    folders = [str(PurePosixPath(clip.id).parent) for clip in clips]
    if absent := sorted(set(folders) - texts.keys()):
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise ValueError(f"objective.scenes={path} has no line for the clips in {absent[0]}{more}")
    return {index: texts[folder] for index, folder in enumerate(folders)}
