"""Single images by a video model: panels of one image (IC-LoRA, arXiv 2410.23775), and images of one clip.

An image is the first frame of a clip, as one latent frame. Panels stand below each other in one latent frame of three
times the height; each is encoded alone, and generation decodes each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from storymem.story.panels import PANELS, PanelStyle, panel_prompt
from storymem.training.objectives.encodings import Needs
from storymem.training.objectives.films import RunPlan, draw_runs, neighbours
from storymem.training.objectives.samples import Samples, Source, draw_noise
from storymem.training.objectives.sequence import SequenceBatch
from storymem.training.objectives.settings import PicturesObjectiveSettings
from storymem.training.run_settings import RunSettings
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import single_shot

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split


class PictureSamples(Samples):
    """All samples of a step are panels of three neighbouring clips of a group, or all are single images, of one size.

    Args:
        settings: how often a step is of panels, and their joint captions, whose embeddings ``source.encodings`` holds
            with the latents of blank images.
    """

    def __init__(self, settings: PicturesObjectiveSettings, source: Source) -> None:
        super().__init__(settings, source)
        numbers = numbers_of_panels(settings.panels)
        self._runs = {number: neighbours(self.latents, (number, number), self.split) for number in numbers}

    @classmethod
    def check(cls, settings: PicturesObjectiveSettings, train: RunSettings, latents: LatentCache) -> None:
        super().check(settings, train, latents)
        for split in train.splits:
            for number in numbers_of_panels(settings.panels):
                neighbours(latents, (number, number), split)

    @classmethod
    def needs(cls, settings: PicturesObjectiveSettings, train: RunSettings, latents: LatentCache) -> Needs:
        captions = joint_captions(latents, settings.style, train.splits) if settings.panels else []
        return Needs(texts=dict.fromkeys(captions, settings.text_tokens), blanks=blank_sizes(latents))

    def plan(self, step: int) -> tuple[RunPlan, ...]:
        """The samples of ``step`` (from 0), all of one size: the clips of their panels from top to bottom, or one."""
        random = self.random(step)
        runs = self._runs[PANELS if random.random() < self._settings.panels else 1]
        return draw_runs(runs, lambda run: self.latents.clips[run[0]].bucket[1:], self.count, self.text_dropout, random)

    def read(self, plan: RunPlan) -> SequenceBatch:
        x0 = torch.cat([self.video(clip)[:, :1] for clip in plan.clips], dim=2)
        condition = None
        if self.spec.condition_channels:
            blank = self.encodings.blank(image_size(self.latents, plan.clips))
            condition = condition_channels(None, blank[None], 0, self.spec)
        noise, u = draw_noise(plan.seed, x0.shape, levels=1)
        return SequenceBatch(
            x0=x0[None],
            noise=noise,
            u=u,
            condition=condition,
            mask=torch.cat([self.mask(clip)[:1] for clip in plan.clips], dim=1)[None],
            text=self._text(plan)[None],
            layout=single_shot(1),
            ids=tuple(self.latents.clips[clip].id for clip in plan.clips),
        )

    def _text(self, plan: RunPlan) -> Tensor:
        """[L, D]."""
        if len(plan.clips) == 1:
            return self.text(plan.clips[0], drop=plan.drop_text)
        caption = "" if plan.drop_text else joint_caption(self.latents, plan.clips, self._settings.style)
        return self.encodings.text(caption, self._settings.text_tokens)


def numbers_of_panels(share: float) -> list[int]:
    """The numbers of panels of a run in which ``share`` of the steps are of panels."""
    return [number for number, part in ((1, 1 - share), (PANELS, share)) if part > 0]


def joint_caption(latents: LatentCache, clips: Sequence[int], style: PanelStyle) -> str:
    """The caption of an image with a panel of each clip."""
    return panel_prompt([latents.clips[clip].caption for clip in clips], style=style)


def joint_captions(latents: LatentCache, style: PanelStyle, splits: Sequence[Split]) -> list[str]:
    """Those of all samples with panels."""
    runs = [run for split in splits for run in neighbours(latents, (PANELS, PANELS), split)]
    return sorted({joint_caption(latents, run, style) for run in runs})


def blank_sizes(latents: LatentCache) -> frozenset[tuple[int, int, int]]:
    """The sizes of all images, with one panel and with three."""
    sizes = {clip.bucket[1:] for clip in latents.clips}
    return frozenset((1, number * height, width) for height, width in sizes for number in (1, PANELS))


def image_size(latents: LatentCache, clips: Sequence[int]) -> tuple[int, int, int]:
    """Frames, height and width of an image with a panel of each clip."""
    _, height, width = latents.clips[clips[0]].bucket
    return (1, len(clips) * height, width)
