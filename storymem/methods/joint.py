"""What systems share that denoise all shots of a film at once: a story to a request, to frames, to a film's folder."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from storymem.config import build_settings
from storymem.film.folder import Film
from storymem.film.generate import check_one_process, recorded_config, weight_hashes
from storymem.film.progress import Progress
from storymem.film.resume import story_record
from storymem.film.settings import GenerateSettings
from storymem.film.together import check_same, make_together
from storymem.methods import check_all
from storymem.methods.baseline import ignored_recall, without_memory
from storymem.story import Story
from storymem.wan.conditioning import condition_channels
from storymem.wan.inputs import Inputs
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import Layout, Text, scene_and_own_text
from storymem.wan.settings import AdapterSettings, ModelSettings, SamplerSettings
from storymem.wan.shots import OnStep, WanShotGenerator
from storymem.wan.sources import check_weights, required_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FilmRequest:
    """What a film is denoised from.

    Args:
        layout: of the pass with the prompt; its text is "prompt".
        negative_layout: of the pass with the negative prompt.
        texts: encoded one by one, each padded to the L tokens of the network; "prompt" is all of them in this order.
            They must be among those given to :meth:`WanFilmGenerator.prepare`.
        videos: frames, 4n + 1, of each video that the VAE encodes and decodes by itself.
        shots: frames of each shot; the videos, one after the other, are cut there.
        seed: of the noise.
    """

    layout: Layout
    negative_layout: Layout
    texts: tuple[str, ...]
    videos: tuple[int, ...]
    shots: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        assert sum(self.videos) == sum(self.shots)


class WanFilmGenerator(WanShotGenerator):
    """Generates all shots of a film in one denoising; networks are loaded and freed as by :class:`WanShotGenerator`."""

    def film(self, request: FilmRequest, on_step: OnStep | None = None) -> list[np.ndarray]:
        """The frames of each shot, uint8 [F, H, W, 3]; NotFiniteError for NaN, with likely causes."""
        pipe, video = self._memory_to_video(), self.video
        device = pipe._execution_device  # not where offloaded weights are
        texts = [self._embeds[text].to(device) for text in request.texts]
        negative = self._embeds[self.sampler.negative_prompt].to(device) if self._uses_guidance else None
        noise, inputs = film_inputs(request, pipe, texts, negative, video.height, video.width)
        latents = self._denoised(pipe, noise, inputs, request.videos[-1], on_step)
        lengths = [pipe.spec.latent_frames(frames) for frames in request.videos]
        videos = self._decoded(pipe, latents.split(lengths, dim=2))
        return np.split(np.concatenate(videos), np.cumsum(request.shots)[:-1])


def film_inputs(
    request: FilmRequest,
    pipe: WanMemoryToVideoPipeline,
    texts: Sequence[Tensor],
    negative: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Inputs]:
    """The noise [1, z, N, h, w] of a film, float32, and what else the denoising loop is given.

    Args:
        texts: embeddings [1, L, D] of ``request.texts``.
        negative: embeddings [1, L, D] of the negative prompt; None: without guidance.
        height, width: of the frames.
    """
    spec, condition = pipe.spec, None
    latent_frames = sum(spec.latent_frames(frames) for frames in request.videos)
    shape = (1, spec.latent_channels, latent_frames, *spec.latent_size(height, width))
    # From the CPU's generator, so the same on every device.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    if spec.condition_channels:  # no frame is given
        blank = {frames: pipe.encode_given([], frames, height, width) for frames in set(request.videos)}
        condition = torch.cat([condition_channels(None, blank[frames], 0, spec) for frames in request.videos], dim=2)
    return noise, Inputs(
        layout=request.layout,
        negative_layout=request.negative_layout,
        text={"prompt": torch.cat(list(texts), dim=1)},
        negative=None if negative is None else {"prompt": torch.cat([negative] * len(texts), dim=1)},
        condition=condition,
    )


class JointMethod(ABC):
    """See :class:`storymem.methods.Method`. A film is made as a whole or not at all; a finished one stays as it is.

    Args:
        generate: the settings of ``generate.yaml``; those of memory and continuity have no effect.
        max_shots: of a film; longer stories are refused.
        adapter: a LoRA that was trained for the system's layout, a node as ``model.adapter``; None: none. The memory
            adapter is not used.
        options: settings of the system itself, for the manifest of its films.

    Attributes:
        model: the networks.
        sampler: how they are sampled.
        is_trained: whether the networks were trained for the system's layout.
    """

    name: ClassVar[str]
    objective: ClassVar[str]  # of the training of its adapters

    def __init__(
        self, *, generate: Mapping[str, Any], max_shots: int, adapter: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.settings = build_settings(GenerateSettings, {**without_memory(generate), "story": "."})
        self.config, self.max_shots = dict(generate), max_shots
        lora = None if adapter is None else build_settings(AdapterSettings, {**adapter, "objective": self.objective})
        self.model = with_adapter(self.settings.model, lora)
        self.sampler: SamplerSettings = self.settings.sampler
        self.options, self.is_trained, self._checked = options, adapter is not None, False

    @abstractmethod
    def request(self, story: Story) -> FilmRequest:
        """What the film of ``story`` is denoised from. ``ValueError`` if the system cannot make it."""

    @cached_property
    def generator(self) -> WanFilmGenerator:
        """Its networks are loaded on first use."""
        return WanFilmGenerator(model=self.model, sampler=self.sampler, runtime=self.settings.runtime)

    def check(self, story: Story) -> None:
        """See :meth:`storymem.methods.Method.check`."""
        check_all(
            partial(check_one_process, self.settings.runtime),
            partial(self._check_count, story),
            self._check_trained,
            partial(check_weights, self.model, text_to_video=False, sampler=self.sampler),
            self.generator.check_machine,
        )
        self.request(story)  # ValueError if the story does not fit
        notes = [f"{story.title}: {line}" for line in ignored(story)]
        if not self._checked:  # once for all stories
            self._checked = True
            notes += ignored_recall(self.config, self.name)
            if not self.is_trained:
                notes.append(
                    f"{self.name}: no adapter is given (method.adapter), so {self.model.name} is used as it was "
                    "trained, for single shots"
                )
        for line in notes:
            logger.warning(line)

    def _check_count(self, story: Story) -> None:
        if len(story.shots) > self.max_shots:
            raise ValueError(
                f"{story.title}: {len(story.shots)} shots, and {self.name} makes films of {self.max_shots} at most "
                "(method.max_shots): shorten the story, or leave it out with stbench.only"
            )

    def _check_trained(self) -> None:
        if not self.is_trained and self.settings.model.text_to_video is not None:
            raise ValueError(
                f"the networks of {self.model.name} were not trained for the layout of {self.name}, so its films "
                "would mean nothing: name an adapter that was (method.adapter), or use model=toy"
            )

    def check_film(self, story: Story, folder: Path) -> None:
        """See :meth:`storymem.methods.ChecksFilms.check_film`."""
        if Film.exists(folder):
            check_same(Film.open(folder), story_record(story), self.recorded_config)

    def run(self, story: Story, folder: Path) -> None:
        """See :meth:`storymem.methods.Method.run`."""
        request = self.request(story)

        def generate(on_step: OnStep) -> Sequence[Any]:
            self.generator.prepare(request.texts, [None])
            return self.generator.film(request, on_step)

        make_together(
            story,
            folder,
            generate,
            frames=request.shots,
            config=self.recorded_config,
            video=self.model.video,
            seed=request.seed,
            progress=Progress(),
        )

    @cached_property
    def recorded_config(self) -> dict[str, Any]:
        """The settings that decide what a film looks like, plain JSON types."""
        weights = required_weights(self.model, text_to_video=False, continuity="none", sampler=self.sampler)
        used = {
            "method": {"name": self.name, **self.options},
            "model": asdict(self.model),
            "sampler": asdict(self.sampler),
            "seed": self.settings.seed,
            "weights": weight_hashes(weights),
        }
        return recorded_config({"runtime": self.config.get("runtime", {})} | json.loads(json.dumps(used)))

    def seed_of(self, story: Story) -> int:
        """The seed of the first shot, if the story gives one, or that of the settings."""
        seed = story.shots[0].seed
        return self.settings.seed if seed is None else seed

    def shots_apart(self, story: Story, layout: Callable[[list[int], list[Text]], Layout]) -> FilmRequest:
        """A film whose shots and captions are each encoded alone, as the clips are that the networks were trained on.

        Shot k reads the overview of the story and its own prompt.

        Args:
            layout: from latent frames and text of each shot.
        """
        tokens, count = self.model.network.text_tokens, len(story.shots)
        frames = [shot.frames or self.model.video.frames for shot in story.shots]
        texts = scene_and_own_text(count, tokens)
        made = layout([self.model.spec.latent_frames(number) for number in frames], texts)
        return FilmRequest(
            layout=made,
            negative_layout=made,
            texts=(story.overview, *map(story.prompt_of, story.shots)),
            videos=tuple(frames),
            shots=tuple(frames),
            seed=self.seed_of(story),
        )


def with_adapter(model: ModelSettings, adapter: AdapterSettings | None) -> ModelSettings:
    """``model`` with another adapter, or none, in place of its memory adapter, for films without shots of others."""
    layouts = model.spec.layouts
    return replace(
        model,
        adapter=adapter,
        text_to_video=None,
        has_text_to_video=False,
        memory_attention=layouts[0] if layouts else model.memory_attention,
    )


def ignored(story: Story) -> list[str]:
    """What a film that is denoised at once cannot follow, one line each."""
    shots = {
        "seed": [shot.index + 1 for shot in story.shots[1:] if shot.seed is not None],
        "negative_prompt": [shot.index + 1 for shot in story.shots if shot.negative_prompt is not None],
        "references": [shot.index + 1 for shot in story.shots if shot.references],
    }
    lines = [
        f"{key} of shot {', '.join(map(str, numbers))} has no effect: all shots are generated together"
        for key, numbers in shots.items()
        if numbers
    ]
    if story.references:
        lines.append("reference images have no effect: all shots are generated from text")
    return lines
