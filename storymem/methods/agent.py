"""Agents: a language model plans the film (ViMax, arXiv 2606.07649; StoryAgent, arXiv 2411.04925, has no code).

It plans characters, cameras, first frames and what each is made from (:mod:`storymem.methods.storyboards`). An image
editor makes a portrait of each character and then the first frames, each from portraits and earlier frames; every shot
is made from its first frame by image-to-video, with the planned motion as its text. Left out: side and back portraits,
the film of a "cut to", last frames, audio. ``stub: true`` plans by rule, for tests and as a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings, check_bounds
from storymem.io import write_json
from storymem.media.images import fit_image, read_image
from storymem.memory.keyframes import image_hash
from storymem.methods import check_all
from storymem.methods.chat import Chat
from storymem.methods.image_models import ImageModel, ImageSettings, WanImages, to_images
from storymem.methods.keyframes import ImageGroup, KeyframeMethod, image_names, is_embedded
from storymem.methods.storyboards import Storyboard, by_rule, planned, portrait_name
from storymem.methods.storymem import StoryMem
from storymem.story import Shot, Story
from storymem.story.writing import EndpointSettings
from storymem.wan.settings import RuntimeSettings, VideoSettings
from storymem.wan.shots import ShotRequest
from storymem.wan.texts import known_words

STORYBOARD, ANSWERS = "agent_storyboard.json", "agent_answers.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AgentSettings(ImageSettings):
    """The settings of the method ``agent``; ``weights`` are of Qwen-Image-Edit-2509 or a later one.

    Args:
        stub: plan by rule and ask nothing.
        endpoint: of the language model; see ``storymem write``.
        tries: for one answer.
        images: "qwen"; "memory": the video model with the memory adapter, which is given portraits and frames as
            memory; or "auto": memory for models that come with the package, else qwen.
        references: images that a first frame is made from, at most.
        portrait: the prompt of a portrait, with ``{name}`` and ``{look}``; None: one for the image model.
    """

    stub: bool = False
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    tries: int = 3
    images: Literal["auto", "qwen", "memory"] = "auto"
    references: int = 8
    steps: int = 40
    guidance: float = 4.0
    height: int = 768
    width: int = 1344
    portrait: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, tries=(1, 10), references=(1, 32))


class Agent(KeyframeMethod):
    """A plan by a language model, images by an image editor, then image-to-video.

    The first image has the film's seed, and each later one the next number.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`.
        agent: see :class:`AgentSettings`.
    """

    reads_references = True  # as portraits

    def __init__(self, *, generate: Mapping[str, Any], agent: Mapping[str, Any]) -> None:
        self.agent = build_settings(AgentSettings, agent)
        # Where the language model is asked does not decide what it answers.
        recorded = {**agent, "endpoint": {"model": self.agent.endpoint.model}}
        super().__init__(generate=generate, images={"agent": recorded})
        self.whole = StoryMem(generate=generate).settings  # with the memory adapter
        self.storyboard: Storyboard | None = None

    @cached_property
    def painter(self) -> QwenEditor | MemoryEditor:
        whole, own = self.whole, self.agent
        if own.images == "memory" or (own.images == "auto" and is_embedded(whole.model)):
            return MemoryEditor(model=whole.model, sampler=whole.sampler, runtime=whole.runtime)
        return QwenEditor(own, whole.runtime, whole.model.video)

    def check(self, story: Story) -> None:
        """An endpoint is given unless planning is by rule, and the weights are here."""
        check_all(self._check_endpoint, partial(super().check, story))

    def _check_endpoint(self) -> None:
        if not self.agent.stub and self.agent.endpoint.url is None:
            raise ValueError(
                "method=agent asks a language model: write method.agent.endpoint.url=http://HOST/v1 and "
                "method.agent.endpoint.model=NAME; method=agent_stub plans by rule"
            )

    def plan(self, story: Story, folder: Path) -> list[ImageGroup]:
        """Portraits of the characters that first frames are made from, then the first frames in order."""
        own, seed = self.agent, self.settings.seed
        if own.stub:
            board = by_rule(story, own.references)
        else:
            chat = Chat(own.endpoint, folder / ANSWERS, tries=own.tries)
            board = planned(story, chat, references=own.references, words=known_words(self.settings.model))
        write_json(folder / STORYBOARD, asdict(board))
        self.storyboard = board
        looks = {one.name: f"{one.static_features} {one.dynamic_features}".strip() for one in board.characters}
        used = {image for sources in board.sources for image in sources.images}
        template = own.portrait or self.painter.portrait
        groups = []
        for number, character in enumerate(story.characters):
            name = portrait_name(story, character.name)
            prompt = template.replace("{name}", character.name).replace("{look}", looks[character.name])
            image = [entry for path in character.references[:1] for entry in (str(path), image_hash(read_image(path)))]
            recipe = {"prompt": prompt, "seed": seed + number, "image": image}
            if name in used:
                groups.append(ImageGroup(names=(name,), recipe=recipe))
        for number, (name, sources) in enumerate(zip(image_names(story), board.sources, strict=True), start=1000):
            recipe = {"prompt": sources.prompt, "seed": seed + number}
            groups.append(ImageGroup(names=(name,), recipe=recipe, needs=sources.images))
        return groups

    def make(self, group: ImageGroup, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One portrait, which may be a reference image of the story, or one first frame."""
        recipe, (name,) = group.recipe, group.names
        if recipe.get("image"):
            return {name: read_image(recipe["image"][0])}
        return {name: self.painter.edit(recipe["prompt"], [given[need] for need in group.needs], recipe["seed"])}

    def motion_of(self, story: Story, shot: Shot) -> str:
        """The planned motion."""
        assert self.storyboard is not None, "it is planned before the first shot"
        return self.storyboard.frames[shot.index].motion


class MemoryEditor(WanImages):
    """The video model with the memory adapter makes a shot, of which one frame is taken.

    Without images it is the middle frame of a shot from the text alone, else the first of a shot with the images as its
    memory.
    """

    portrait = "{name} waits. Medium shot."

    def edit(self, prompt: str, images: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """A frame, uint8 [H, W, 3]."""
        video = self.video
        self.prepare([prompt], [None])
        fitted = [fit_image(image, video.height, video.width, "cover") for image in images]
        request = ShotRequest(
            prompt=prompt,
            negative_prompt=None,
            frames=video.frames,
            seed=seed,
            memory=self.encode_keyframes(fitted),
            given=np.empty((0, video.height, video.width, 3), dtype=np.uint8),
        )
        frames = self.generate(request)
        return frames[0 if images else len(frames) // 2]


class QwenEditor(ImageModel):
    """Qwen-Image-Edit with up to several images.

    Args:
        settings: of the method.
        runtime: names the device.
        video: size of the blank image that it edits where there is none.
        pipe: a loaded pipeline.
    """

    portrait = "Full-body portrait of {name}, front view, plain light background: {look}"

    def __init__(
        self, settings: AgentSettings, runtime: RuntimeSettings, video: VideoSettings, pipe: Any = None
    ) -> None:
        super().__init__(runtime, settings.weights, pipe=pipe)
        self.settings, self.video = settings, video

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        from diffusers import QwenImageEditPlusPipeline

        return QwenImageEditPlusPipeline.from_pretrained(folder, torch_dtype=dtype)

    def edit(self, prompt: str, images: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """An image of the settings' size, uint8 [H, W, 3]; without ``images`` from the text alone."""
        settings = self.settings
        blank = np.full((self.video.height, self.video.width, 3), 255, dtype=np.uint8)
        made = self.pipe(
            image=[Image.fromarray(one) for one in images or [blank]],
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=settings.guidance,
            num_inference_steps=settings.steps,
            height=settings.height,
            width=settings.width,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        return to_images(made)[0]
