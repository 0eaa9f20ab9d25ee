"""Several clips of a group in order as one sequence, for systems that denoise all shots of a film at once.

Every clip and every caption is encoded alone, as the toy films of these systems are; a shot reads the text of its scene
and its own caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from storymem.io import parse_json, read_text, text_lines
from storymem.training.objectives.encodings import Needs
from storymem.training.objectives.samples import Samples, Source, clips_alike, draw_noise
from storymem.training.objectives.sequence import SequenceBatch
from storymem.training.objectives.settings import FilmObjectiveSettings
from storymem.training.run_settings import RunSettings
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import scene_and_own_text

if TYPE_CHECKING:
    from storymem.data.cache import CachedClip, LatentCache, Split


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


class FilmSamples(Samples):
    """A film is a run of neighbouring clips of a group, of one height and width, in the order of their ids.

    The first film of a step decides how many shots all have and how long they are.

    Args:
        settings: number of shots, layout, and scenes, whose texts ``source.encodings`` holds.
    """

    def __init__(self, settings: FilmObjectiveSettings, source: Source) -> None:
        super().__init__(settings, source)
        self._scenes = scene_texts(self.latents.clips, settings.scenes)
        runs = neighbours(self.latents, (settings.min_shots, settings.max_shots), self.split)
        self._runs = {length: [run for run in runs if len(run) == length] for length in sorted(set(map(len, runs)))}

    @classmethod
    def check(cls, settings: FilmObjectiveSettings, train: RunSettings, latents: LatentCache) -> None:
        super().check(settings, train, latents)
        scene_texts(latents.clips, settings.scenes)
        for split in train.splits:
            neighbours(latents, (settings.min_shots, settings.max_shots), split)

    @classmethod
    def needs(cls, settings: FilmObjectiveSettings, train: RunSettings, latents: LatentCache) -> Needs:
        texts = scene_texts(latents.clips, settings.scenes).values()
        return Needs(texts=dict.fromkeys(texts, train.model.network.text_tokens))

    def plan(self, step: int) -> tuple[RunPlan, ...]:
        """The samples of ``step`` (from 0), all of one shape."""
        random, lengths = self.random(step), list(self._runs)
        runs = self._runs[lengths[int(random.integers(len(lengths)))]]
        return draw_runs(runs, self._shape, self.count, self.text_dropout, random)

    def read(self, plan: RunPlan) -> SequenceBatch:
        videos = [self.video(clip) for clip in plan.clips]
        text, condition = self._text(plan), None
        if self.spec.condition_channels:
            blank = [condition_channels(None, self.shown(clip, 0)[None], 0, self.spec) for clip in plan.clips]
            condition = torch.cat(blank, dim=2)
        x0 = torch.cat(videos, dim=1)
        noise, u = draw_noise(plan.seed, x0.shape, levels=len(videos) if self._settings.levels == "shot" else 1)
        texts = scene_and_own_text(len(videos), text.shape[1])
        return SequenceBatch(
            x0=x0[None],
            noise=noise,
            u=u,
            condition=condition,
            mask=torch.cat([self.mask(clip) for clip in plan.clips])[None],
            text=text.flatten(0, 1)[None],
            layout=self._settings.layout([video.shape[1] for video in videos], texts),
            ids=tuple(self.latents.clips[clip].id for clip in plan.clips),
        )

    def _text(self, plan: RunPlan) -> Tensor:
        """[1 + shots, L, D]: the scene, and each shot."""
        captions = [self.text(clip, drop=plan.drop_text) for clip in plan.clips]
        scene = "" if plan.drop_text else self._scenes[plan.clips[0]]
        return torch.stack([self.encodings.text(scene, len(captions[0])), *captions])

    def _shape(self, run: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return [self.latents.clips[clip].bucket for clip in run]


def neighbours(latents: LatentCache, shots: tuple[int, int], split: Split) -> list[tuple[int, ...]]:
    """All runs of neighbouring clips of a group, of one height and width, with ``shots`` clips (fewest and most).

    Raises:
        ValueError: if there are none.
    """
    runs = [
        tuple(members[start : start + number])
        for members in clips_alike(latents, split)
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
