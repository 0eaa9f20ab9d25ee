"""Single images by a video model: panels of one image (IC-LoRA, arXiv 2410.23775), and images of one clip.

An image is the first frame of a clip, as one latent frame. Panels stand below each other in one latent frame of three
times the height; each is encoded alone, and generation decodes each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from storymem.story.panels import PANELS, PanelStyle, panel_prompt
from storymem.training.batches import checked_tensor
from storymem.training.objectives.films import RunPlan, draw_runs, neighbours
from storymem.training.objectives.memory import SPLIT_NUMBERS
from storymem.training.objectives.sequence import SequenceBatch
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import single_shot
from storymem.wan.spec import ModelSpec

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache, Split
    from storymem.training.objectives.encodings import Encodings


class PictureSamples:
    """See :class:`storymem.training.batches.Samples`.

    All samples of a step are panels of three neighbouring clips of a group, or all are single images, of one size.

    Args:
        spec: the base model that is trained.
        encodings: holds the embeddings of the joint captions and the latents of blank images.
        style: of the joint captions.
        text_tokens: to which a joint caption is padded.
        panels: how often a step is of panels.
        text_dropout: how often a sample has no text; held-out samples always have it.
    """

    def __init__(
        self,
        latents: LatentCache,
        *,
        spec: ModelSpec,
        encodings: Encodings,
        style: PanelStyle,
        text_tokens: int,
        panels: float,
        text_dropout: float,
        seed: int,
        count: int,
        split: Split = "train",
    ) -> None:
        self.count, self._spec = count, spec
        self._latents, self._encodings, self._style, self._text_tokens = latents, encodings, style, text_tokens
        self._panels, self._seed = panels, [seed, SPLIT_NUMBERS[split]]
        self._text_dropout = text_dropout if split == "train" else 0.0
        self._runs = {number: neighbours(latents, (number, number), split) for number in numbers_of_panels(panels)}

    def plan(self, step: int) -> tuple[RunPlan, ...]:
        """The samples of ``step`` (from 0), all of one size: the clips of their panels from top to bottom, or one."""
        random = np.random.default_rng([*self._seed, step])
        runs = self._runs[PANELS if random.random() < self._panels else 1]
        return draw_runs(runs, self._size, self.count, self._text_dropout, random)

    def read(self, plan: RunPlan) -> SequenceBatch:
        """The sample of a plan, as a batch of one."""
        latents, spec, clips = self._latents, self._spec, plan.clips
        checked = partial(checked_tensor, latents)
        images = [checked(latents.video(clip), "latents of clip", clip)[:, :1] for clip in clips]
        masks = [checked(latents.mask(clip), "mask of clip", clip)[:1] for clip in clips]
        x0 = torch.cat(images, dim=2)[None]
        condition = None
        if spec.condition_channels:
            blank = self._encodings.blank(image_size(latents, clips))
            condition = condition_channels(None, blank[None], 0, spec)
        generator = torch.Generator().manual_seed(plan.seed)
        return SequenceBatch(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            u=torch.rand(1, 1, generator=generator),
            condition=condition,
            mask=torch.cat(masks, dim=1)[None],
            text=self._text(plan)[None],
            layout=single_shot(1),
            ids=tuple(latents.clips[clip].id for clip in clips),
        )

    def _text(self, plan: RunPlan) -> Tensor:
        """[L, D]."""
        latents, clips = self._latents, plan.clips
        if len(clips) == 1:
            text = latents.empty_text() if plan.drop_text else latents.text(clips[0])
            return checked_tensor(latents, text, "text embeds of clip", clips[0])
        caption = "" if plan.drop_text else joint_caption(latents, clips, self._style)
        return self._encodings.text(caption, self._text_tokens)

    def _size(self, run: tuple[int, ...]) -> tuple[int, ...]:
        return self._latents.clips[run[0]].bucket[1:]


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
