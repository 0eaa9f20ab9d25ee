"""IC-LoRA (arXiv 2410.23775): shots as panels of one image, by an image model with a LoRA, then image-to-video.

``images: flux``: FLUX.1-dev with the published film-storyboard LoRA. ``images: base``: the video model itself, which
draws the panels as one latent frame of three times the height, with a LoRA by `train.py experiment=toy_pictures`.

Three panels are what the LoRA was trained for. How longer stories were made is not published; both ways here are ours:
windows of three shots, in which a character's look holds within a window only, and ``chained``, where the first panel
of a window is an earlier keyframe that stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic.dataclasses import dataclass
from torch import Tensor

from storymem.config import STRICT, build_settings, check_bounds
from storymem.io import check_finite
from storymem.media.images import fit_image
from storymem.methods.image_models import ImageModel, ImageSettings, WanImages, to_images
from storymem.methods.keyframes import ImageGroup, KeyframeMethod, image_names, is_embedded
from storymem.story import Story
from storymem.story.panels import JOINT_TOKENS, PANELS, PanelStyle, panel_prompt
from storymem.wan.conditioning import decode_video
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings
from storymem.weights import Weights, locate

logger = logging.getLogger(__name__)

_SEAM = 4.0  # times the median change from row to row: what a seam between panels has at least


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InContextSettings(ImageSettings):
    """The settings of the method ``in_context``; ``weights`` are of FLUX.1-dev.

    Args:
        lora: the film-storyboard LoRA.
        adapter: with ``images: base``, the LoRA that draws panels (`objective=pictures`); None: the base alone, whose
            panels are one image.
        images: "flux", "base", or "auto": base for models that come with the package, else flux.
        chained: whether the first panel of a window is an earlier keyframe.
        trim: of a panel's height, cut off beside a seam.
    """

    lora: Weights
    adapter: AdapterSettings | None = None
    images: Literal["auto", "flux", "base"] = "auto"
    chained: bool = False
    steps: int = 20
    guidance: float = 3.5
    height: int = 512
    width: int = 1024
    trim: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, trim=(0, 0.2))


class Window(NamedTuple):
    """Shots that are drawn as one image (places in the film, from 0).

    Args:
        shots: of the panels, top to bottom.
        new: those whose image this one gives.
        given: whether the first panel is the image of its shot, made before.
    """

    shots: tuple[int, ...]
    new: tuple[int, ...]
    given: bool = False


def windows(count: int) -> list[Window]:
    """1-3, 4-6, 7-9 and 8-10 of ten shots, of which the last window gives shot 10 alone."""
    found = []
    for start in range(0, count, PANELS):
        new = tuple(range(start, min(start + PANELS, count)))
        shots = new if len(new) == PANELS else tuple(range(max(0, count - PANELS), count))
        found.append(Window((*shots, *[count - 1] * (PANELS - len(shots))), new))
    return found


def chained_windows(story: Story) -> list[Window]:
    """Three shots, then two at a time below the image of an earlier shot: the one with most of their characters.

    Of several the first, which has the fewest images between itself and the beginning.
    """
    shots = story.shots
    found = windows(min(len(shots), PANELS))
    for start in range(PANELS, len(shots), PANELS - 1):
        new = tuple(range(start, min(start + PANELS - 1, len(shots))))
        wanted = {name for one in new for name in shots[one].characters}
        earlier = max(range(start), key=lambda one: (len(wanted & set(shots[one].characters)), -one))
        found.append(Window((earlier, *new, *[new[-1]] * (PANELS - 1 - len(new))), new, given=True))
    return found


class InContext(KeyframeMethod):
    """Panels of one image, then image-to-video.

    The first window has the film's seed, and each later one the next number.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`.
        in_context: see :class:`InContextSettings`.
    """

    def __init__(self, *, generate: Mapping[str, Any], in_context: Mapping[str, Any]) -> None:
        super().__init__(generate=generate, images={"in_context": dict(in_context)})
        self.in_context = build_settings(InContextSettings, in_context)

    @cached_property
    def painter(self) -> FluxPanels | BasePanels:
        settings, own = self.settings, self.in_context
        if own.images == "base" or (own.images == "auto" and is_embedded(settings.model)):
            model = panel_model(settings.model, own.adapter)
            return BasePanels(model=model, sampler=settings.sampler, runtime=settings.runtime)
        return FluxPanels(own, settings.runtime)

    def plan(self, story: Story, folder: Path) -> list[ImageGroup]:
        """A group for each window."""
        names = image_names(story)
        groups = []
        for number, window in enumerate(chained_windows(story) if self.in_context.chained else windows(len(names))):
            recipe = {
                "prompt": self.prompt(story, window.shots),
                "seed": self.settings.seed + number,
                "panels": [names[one] for one in window.shots],
                "given": window.given,
            }
            needs = (names[window.shots[0]],) if window.given else ()
            groups.append(ImageGroup(names=tuple(names[one] for one in window.new), recipe=recipe, needs=needs))
        return groups

    def prompt(self, story: Story, shots: Sequence[int]) -> str:
        """The joint caption; its summary has the descriptions of all characters."""
        captions = [story.shots[one].prompt for one in shots]
        if self.painter.style == "plain":
            return panel_prompt(captions, style="plain")
        looks = [f"{one.name}: {one.description.rstrip('.')}." for one in story.characters if one.description]
        summary = " ".join([*([f"{story.style.rstrip('.')}."] if story.style else []), story.overview, *looks])
        return panel_prompt(captions, summary=summary, names=[one.name for one in story.characters])

    def make(self, group: ImageGroup, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The panels of a window."""
        recipe = group.recipe
        first = given[recipe["panels"][0]] if recipe["given"] else None
        panels = self.painter.panels(recipe["prompt"], first, recipe["seed"])
        return {name: panels[recipe["panels"].index(name)] for name in group.names}


# --- FLUX.1-dev


class FluxPanels(ImageModel):
    """FLUX.1-dev with the LoRA draws three panels as one image.

    Args:
        settings: of the method.
        runtime: names the device.
        pipe: a loaded pipeline.
    """

    style: PanelStyle = "film_storyboard"

    def __init__(self, settings: InContextSettings, runtime: RuntimeSettings, pipe: Any = None) -> None:
        super().__init__(runtime, settings.weights, settings.lora, pipe=pipe)
        self.settings = settings

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipe.load_lora_weights(str(locate(self.settings.lora)))
        return pipe

    def panels(self, prompt: str, first: np.ndarray | None, seed: int) -> list[np.ndarray]:
        """Three panels, uint8 [H, W, 3]; if the ``first`` is given, the others are inpainted."""
        settings, pipe = self.settings, self.pipe
        height, width = PANELS * settings.height, settings.width
        more: dict[str, Any] = {}
        if first is not None:
            from diffusers import FluxInpaintPipeline

            pipe = FluxInpaintPipeline(**pipe.components)  # from_pipe would convert them to float32
            pipe.set_progress_bar_config(disable=True)
            canvas = np.full((height, width, 3), 128, dtype=np.uint8)
            canvas[: settings.height] = fit_image(first, settings.height, width, "cover")
            mask = np.full((height, width), 255, dtype=np.uint8)
            mask[: settings.height] = 0
            more = {"image": Image.fromarray(canvas), "mask_image": Image.fromarray(mask), "strength": 1.0}
        images = pipe(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            max_sequence_length=512,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **more,
        ).images
        (whole,) = to_images(images)
        for row in weak_seams(whole):
            logger.warning(f"the panels of {prompt[:60]!r} have no clear seam near row {row}: check the images")
        return cut_panels(whole, settings.trim)


def cut_panels(image: np.ndarray, trim: float) -> list[np.ndarray]:
    """The thirds of uint8 [3 h, W, 3], without ``trim`` of h beside each seam."""
    height = image.shape[0] // PANELS
    rows = round(trim * height)
    return [
        image[n * height + (rows if n else 0) : (n + 1) * height - (rows if n < PANELS - 1 else 0)]
        for n in range(PANELS)
    ]


def weak_seams(image: np.ndarray) -> list[int]:
    """The rows of uint8 [3 h, W, 3] where panels should meet and no strong horizontal edge is near (2 % of h)."""
    height = image.shape[0] // PANELS
    change = np.abs(np.diff(image.astype(np.float32), axis=0)).mean(axis=(1, 2))  # [3 h - 1], row to row
    reach, usual = max(1, round(0.02 * height)), np.median(change)
    rows = [number * height for number in range(1, PANELS)]
    return [row for row in rows if change[row - 1 - reach : row + reach].max() <= _SEAM * usual]


# --- the base model


def panel_model(model: ModelSettings, adapter: AdapterSettings | None) -> ModelSettings:
    """A model that draws three of its frames as one image, with the LoRA for panels."""
    return replace(
        model,
        video=replace(model.video, height=PANELS * model.video.height),
        network=replace(model.network, text_tokens=JOINT_TOKENS),
        adapter=None if adapter is None else replace(adapter, objective="pictures"),
    )


class BasePanels(WanImages):
    """The video model draws one latent frame of three times the height; each third is decoded alone."""

    style: PanelStyle = "plain"

    @torch.no_grad()
    def panels(self, prompt: str, first: np.ndarray | None, seed: int) -> list[np.ndarray]:
        """Three panels; a given one is put into the latents at each step's noise level."""
        self.prepare([prompt], [None])
        pipe, sampler, video = self._memory_to_video(), self.sampler, self.model.video
        pipe.set_progress_bar_config(disable=True)
        rows = video.height // PANELS
        shape = (1, pipe.spec.latent_channels, 1, *pipe.spec.latent_size(video.height, video.width))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        given = [] if first is None else [Image.fromarray(fit_image(first, rows, video.width, "cover"))]
        known = pipe.encode_memory(given) if given else None  # [1, z, 1, h, w], encoded alone

        def stepped(_pipe: Any, step: int, _timestep: Any, tensors: dict) -> dict:
            return {} if known is None else {"latents": with_panel(tensors["latents"], known, noise, sigmas[step + 1])}

        pipe.scheduler.set_timesteps(sampler.steps)
        sigmas, device = pipe.scheduler.sigmas.tolist(), pipe._execution_device
        (latents,) = pipe(
            prompt_embeds=self._embeds[prompt].to(device),
            negative_prompt_embeds=self._embeds[sampler.negative_prompt].to(device) if self._uses_guidance else None,
            height=video.height,
            width=video.width,
            num_frames=1,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            guidance_scale_2=sampler.guidance_low,
            latents=noise.to(device),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=stepped,
        )
        check_finite(latents, "the latents of panels")
        decoded = torch.cat([decode_video(pipe.vae, panel) for panel in latents.chunk(PANELS, dim=3)])
        return to_images(((decoded[:, :, 0] + 1) / 2).permute(0, 2, 3, 1).float().cpu().numpy())


def with_panel(latents: Tensor, known: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``latents`` [1, z, 1, 3 h, w] whose first third is ``known`` [1, z, 1, h, w] at the noise level ``sigma``."""
    rows = known.shape[3]
    panel = (1 - sigma) * known.to(latents) + sigma * noise[:, :, :, :rows].to(latents)
    return torch.cat([panel, latents[:, :, :, rows:]], dim=3)
