"""StoryDiffusion (arXiv 2405.01434): consistent self-attention, without training.

``where: images``: keyframes by Stable Diffusion XL, then image-to-video; its own video model was never released.
``where: video``: the same rule in the last blocks of Wan, with all shots of a story as one batch, for models that make
no single images, such as the toy model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings, check_bounds
from storymem.film.folder import Film
from storymem.film.parts import Recalled
from storymem.film.progress import Progress
from storymem.methods import check_all
from storymem.methods.baseline import Baseline, TextToVideo
from storymem.methods.image_models import ImageModel, ImageSettings, to_images
from storymem.methods.keyframes import ImageGroup, KeyframeMethod, image_names, is_embedded
from storymem.methods.long_prompts import encode_long_prompts
from storymem.methods.sharing import Sharing, SharingSettings, id_shots, sharing_in_unet, sharing_in_video, shots_read
from storymem.story import Shot, Story
from storymem.wan.combinations import check_combinations
from storymem.wan.settings import ModelSettings
from storymem.wan.shots import OnStep, ShotRequest, WanShotGenerator


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StoryDiffusionSettings(ImageSettings):
    """The settings of the method ``storydiffusion``; ``weights`` are of Stable Diffusion XL or a fine-tune of it.

    Args:
        where: "images", "video", or "auto": video for models that come with the package, else images.
        sharing: of images.
        everywhere: share in all self-attention layers of the UNet, as the first release does; else in ``up_blocks``.
        batch: rows of a batch; a longer story is made as several, each with all id rows.
        template: of a prompt, with ``{prompt}``.
        negative_prompt: of all images.
        shared_noise: whether all but the id images start from the same noise, as released: it makes compositions alike.
        video_blocks: last blocks of Wan that share in video.
        video_sharing: of video. Both were chosen on training stories of the toy world, by attributes kept.
    """

    where: Literal["auto", "images", "video"] = "auto"
    sharing: SharingSettings = field(default_factory=SharingSettings)
    everywhere: bool = False
    steps: int = 35  # the paper has 50
    guidance: float = 5.0
    height: int = 768
    width: int = 1344
    multiple: ClassVar[int] = 32
    batch: int = 8
    template: str = "{prompt}"
    negative_prompt: str = "blurry, low quality, deformed, extra fingers, text, watermark, frame"
    shared_noise: bool = True
    video_blocks: int = 6
    video_sharing: SharingSettings = field(
        default_factory=lambda: SharingSettings(probability=1.0, late_probability=1.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, batch=(1, 64), video_blocks=(1, 1000))
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")


def story_diffusion(
    *, generate: Mapping[str, Any], storydiffusion: Mapping[str, Any]
) -> StoryDiffusionImages | StoryDiffusionVideo:
    """The method, in images or in video."""
    where = build_settings(StoryDiffusionSettings, storydiffusion).where
    in_video = is_embedded(build_settings(ModelSettings, generate["model"])) if where == "auto" else where == "video"
    method = StoryDiffusionVideo if in_video else StoryDiffusionImages
    return method(generate=generate, storydiffusion=storydiffusion)


# --- images


class StoryDiffusionImages(KeyframeMethod):
    """Images with consistent self-attention, then image-to-video.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`.
        storydiffusion: see :class:`StoryDiffusionSettings`.
    """

    def __init__(self, *, generate: Mapping[str, Any], storydiffusion: Mapping[str, Any]) -> None:
        super().__init__(generate=generate, images={"storydiffusion": dict(storydiffusion)})
        self.storydiffusion = build_settings(StoryDiffusionSettings, storydiffusion)

    @cached_property
    def painter(self) -> ImageModel:
        return StableDiffusion(self.settings.runtime, self.storydiffusion.weights)

    def check(self, story: Story) -> None:
        """The weights are here, and the id rows of a story leave room for others."""
        check_all(partial(self._check_batch, story), partial(super().check, story))

    def _check_batch(self, story: Story) -> None:
        settings = self.storydiffusion
        ids = {one for shots in id_shots(story, settings.sharing).values() for one in shots}
        if settings.batch <= len(ids) < len(story.shots):
            raise ValueError(
                f"{story.title} has {len(ids)} id images, which every batch contains: raise "
                f"method.storydiffusion.batch above {settings.batch}, or lower sharing.id_images"
            )

    def plan(self, story: Story, folder: Path) -> list[ImageGroup]:
        """All id rows and some others in each group; only the first group returns the id rows."""
        settings = self.storydiffusion
        names, reads = image_names(story), shots_read(story, settings.sharing)
        ids = id_shots(story, settings.sharing)
        first = sorted({one for shots in ids.values() for one in shots})
        others = [shot.index for shot in story.shots if shot.index not in first]
        room = max(1, settings.batch - len(first))
        parts = [others[start : start + room] for start in range(0, len(others), room)] or [[]]
        place = {one: min(shots.index(one) for shots in ids.values() if one in shots) for one in first}
        groups = []
        for number, part in enumerate(parts):
            rows = [*first, *part]
            recipe = {
                "seed": self.settings.seed,
                "prompts": [self.prompt(story, story.shots[one]) for one in rows],
                "reads": [[rows.index(other) for other in reads[one]] for one in rows],
                "noise": [place.get(one, 0 if settings.shared_noise else one + 1) for one in rows],
                "names": [names[one] for one in rows],
            }
            wanted = rows if number == 0 else part
            groups.append(ImageGroup(names=tuple(names[one] for one in wanted), recipe=recipe))
        return groups

    def prompt(self, story: Story, shot: Shot) -> str:
        """The shot's prompt, with descriptions in place of names (also ``[Name]``), style and template."""
        text = shot.prompt
        for character in story.characters:
            if character.description and character.name in shot.characters:
                look = character.description.rstrip(".").replace("\\", r"\\")
                name = re.escape(character.name)
                text = re.sub(rf"\[{name}\]|(?<!\w){name}(?!\w)", look, text)
        text = f"{story.style}: {text}" if story.style else text
        return self.storydiffusion.template.replace("{prompt}", text)

    @torch.no_grad()
    def make(self, group: ImageGroup, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The images of a batch."""
        settings, recipe, pipe = self.storydiffusion, group.recipe, self.painter.pipe
        sharing = Sharing(settings.sharing, recipe["reads"], recipe["seed"])
        count, device = len(recipe["prompts"]), pipe._execution_device  # not where offloaded weights are
        embeds, pooled = encode_long_prompts(pipe, [*recipe["prompts"], settings.negative_prompt])
        factor = pipe.vae_scale_factor
        shape = (pipe.unet.config.in_channels, settings.height // factor, settings.width // factor)
        noise = torch.randn(max(recipe["noise"]) + 1, *shape, generator=torch.Generator().manual_seed(recipe["seed"]))

        def stepped(_pipe: Any, step: int, _timestep: Any, tensors: dict) -> dict:
            sharing.step = step + 1
            return tensors

        with sharing_in_unet(pipe.unet, sharing, everywhere=settings.everywhere):
            images = pipe(
                prompt_embeds=embeds[:-1],
                pooled_prompt_embeds=pooled[:-1],
                negative_prompt_embeds=embeds[-1:].expand(count, -1, -1),
                negative_pooled_prompt_embeds=pooled[-1:].expand(count, -1),
                latents=noise[recipe["noise"]].to(device, embeds.dtype),
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                callback_on_step_end=stepped,
                output_type="np",
            ).images
        return dict(zip(recipe["names"], to_images(images), strict=True))


class StableDiffusion(ImageModel):
    """Stable Diffusion XL with DDIM and FreeU, as published."""

    dtype = torch.float16

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionXLPipeline

        half = any((folder / "unet").glob("*.fp16.safetensors"))
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant="fp16" if half else None, use_safetensors=True
        )
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
        pipe.vae.enable_slicing()
        return pipe


# --- video


class SharedShots(WanShotGenerator):
    """Generates all shots of a story at the first request, and returns them one by one."""

    def __init__(self, settings: StoryDiffusionSettings, **parts: Any) -> None:
        super().__init__(**parts)
        self.settings = settings
        self._story: tuple[list[ShotRequest], Sharing] | None = None
        self._made: dict[tuple[str, int], np.ndarray] = {}

    def begin(self, requests: Sequence[ShotRequest], reads: Sequence[Sequence[int]], seed: int) -> None:
        """The shots of a story, of equal length, and for each those that it reads."""
        self._story, self._made = (list(requests), Sharing(self.settings.video_sharing, reads, seed)), {}

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        """The frames of one of the shots of :meth:`begin`, uint8 [F, H, W, 3]."""
        assert self._story is not None
        requests, sharing = self._story
        if not self._made:
            pipe = self._text_to_video() if self.model.has_text_to_video else self._memory_to_video()

            def stepped(step: int, total: int) -> None:
                sharing.step = step
                if on_step is not None:
                    on_step(step, total)

            sharing.step = 0
            with sharing_in_video(list(pipe.experts.values()), sharing, blocks=self.settings.video_blocks):
                films = self._run(pipe, requests, stepped)
            self._made = {(one.prompt, one.seed): frames for one, frames in zip(requests, films, strict=True)}
        return self._made[request.prompt, request.seed]


class _Together(TextToVideo):
    def before_shots(self, story: Story, film: Film, shots: Sequence[Shot], progress: Progress) -> None:
        """All shots of the story are known to the generator, also those that are on disk."""
        generator = self.generator
        assert isinstance(generator, SharedShots)
        texts = [text for shot in story.shots for text in self.texts_of(story, shot)]
        generator.prepare(texts, [shot.negative_prompt for shot in story.shots])
        nothing = Recalled(keyframes=[])
        requests = [
            self.request(story, shot, film, nothing, self._seed(shot, film, fresh=False)) for shot in story.shots
        ]
        generator.begin(requests, shots_read(story, generator.settings.video_sharing), self.seed)


class StoryDiffusionVideo(Baseline):
    """All shots of a story by text-to-video as one batch, with consistent self-attention in the last blocks.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`.
        storydiffusion: see :class:`StoryDiffusionSettings`.
    """

    loop = _Together

    def __init__(self, *, generate: Mapping[str, Any], storydiffusion: Mapping[str, Any]) -> None:
        super().__init__(generate=generate)
        self.storydiffusion = build_settings(StoryDiffusionSettings, storydiffusion)
        self.config["storydiffusion"] = dict(storydiffusion)

    def uses_text_to_video(self, story: Story) -> bool:
        """Always."""
        return True

    def check(self, story: Story) -> None:
        super().check(story)
        lengths = sorted({self.storyteller.frames_of(shot) for shot in story.shots})
        if len(lengths) > 1:
            raise ValueError(
                f"{story.title}: storydiffusion makes all shots as one batch, of one length, not {lengths}"
            )
        generator, settings = self.storyteller.generator, self.settings
        runtime = generator.settled if isinstance(generator, SharedShots) else settings.runtime
        check_combinations(settings.model, settings.sampler, runtime, shares_attention=True)

    def parts(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        parts = {name: getattr(self.settings, name) for name in ("model", "sampler", "runtime")}
        return {"generator": SharedShots(self.storydiffusion, **parts)}
