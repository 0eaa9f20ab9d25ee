"""Memento (arXiv 2606.14667): learned recall for each expert, and an image of the subject denoised beside each shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from storymem.config import STRICT, build_settings, check_bounds, did_you_mean
from storymem.film.folder import Film
from storymem.film.manifest import Take
from storymem.film.parts import Recalled
from storymem.film.settings import Mode
from storymem.film.storyteller import Storyteller
from storymem.film.timeline import film_frames, film_starts
from storymem.io import check_finite
from storymem.memory import Keyframe, MemoryBank
from storymem.methods.storymem import StoryMem
from storymem.story import Shot, Story
from storymem.story.captions import global_caption, renamed, tagged
from storymem.wan.conditioning import condition_channels
from storymem.wan.inputs import Inputs, Renoised, Texts
from storymem.wan.keyframe_query import film_positions
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import memento
from storymem.wan.shots import OnStep, ShotRequest, WanShotGenerator
from storymem.wan.spec import A14B, COMPONENTS, Expert, ModelSpec
from storymem.weights import Weights


@settings(frozen=True, kw_only=True, config=STRICT)
class MementoModel:
    """Memento on one base model; the defaults are those of the published weights.

    Args:
        weights: two files, each of which holds LoRA and KeyframeQuery of an expert; None: of a model with random
            weights, whose queries are random too.
        guidance_after_cut: of shots that are cuts; None: as the others.
        persons: whether characters are called [Person A], [Person B], ... in texts, as in the published training set.
        subject: the caption of the subject. "descriptions": what the story gives as ``reconstruct_target``, else the
            descriptions of its characters. "earlier_shot": the prompt of the first shot with a character of this one.
        local, whole: how many keyframes an expert recalls by the shot's prompt and by the caption of the whole film.
    """

    weights: Weights | None
    guidance_after_cut: float | None = 5.0
    persons: bool = True
    subject: Literal["descriptions", "earlier_shot"] = "descriptions"
    local: int = 6
    whole: int = 2

    def __post_init__(self) -> None:
        check_bounds(self, guidance_after_cut=(1, 100), local=(1, 512), whole=(1, 512))


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The texts of a shot.

    Args:
        prompt: what the network reads: ``global caption: ...; shot caption: ...``, or the story's own words.
        whole: the caption of the whole film; the prompt where there is none.
        subject: of the subject; None: none is denoised.
    """

    prompt: str
    whole: str
    subject: str | None = None


def captions_of(story: Story, shot: Shot, own: MementoModel) -> Captions:
    """The texts of ``shot`` in Memento's form.

    A prompt that is in this form already stays as it is. The caption of the whole film lists the characters' looks; a
    story without descriptions has none, and its prompts stay as they are.
    """
    looks = {who.name: who.description.rstrip(".") for who in story.characters if who.description}
    names = {who.name: f"[Person {chr(ord('A') + n)}]" for n, who in enumerate(story.characters[:26]) if own.persons}

    style = f"{story.style}: " if story.style else ""
    prompt = style + renamed(shot.prompt, names)
    if (written := global_caption(shot.prompt)) is not None:
        prompt, whole = shot.prompt, written
    elif looks:
        whole = ", ".join(f"{names.get(name, name)}: {renamed(look, names)}" for name, look in looks.items())
        prompt = tagged(whole, prompt)
    else:
        whole = prompt
    subject: str | None = None
    if own.subject == "earlier_shot":
        earlier = (one for one in story.shots[: shot.index] if {*one.characters} & {*shot.characters})
        subject = next((captions_of(story, one, own).prompt for one in earlier), None)
    elif story.reconstruct_target is not None:
        subject = story.reconstruct_target
    elif looks:
        subject = "\n".join(f"{names.get(name, name)} {renamed(look, names)}" for name, look in looks.items())
    return Captions(prompt=prompt, whole=whole, subject=subject)


# A shot from the memory of each expert


@dataclass(frozen=True, kw_only=True)
class FilmFrames:
    """The memory of an expert.

    Args:
        latents: normalised one-frame latents [z, 1, h, w], oldest first.
        frames: place of each in the film, from 0, with all shots as they were generated end to end.
    """

    latents: Sequence[Tensor]
    frames: Sequence[int]

    def positions(self, start: int) -> tuple[int, ...]:
        """Temporal positions before a shot that begins at frame ``start`` of the film, all below 0."""
        return tuple(min(position, -1) for position in film_positions(self.frames, start))


def memento_inputs(
    memory: FilmFrames,
    *,
    start: int,
    video: Tensor,
    given: int,
    blank: Tensor | None,
    noise: Tensor,
    text: Texts,
    negative: Texts | None,
    spec: ModelSpec = A14B,
) -> Inputs:
    """What an expert is given in the denoising loop.

    Args:
        memory: its own frames.
        start: place of the shot's first frame in the film.
        video: normalised latents [1, z, T, h, w] of the blank-padded video that conditions the shot.
        given: latent frames of the shot that are given: 0, or 1 with a first frame.
        blank: latents [1, z, 1, h, w] of one blank frame, the condition of the subject; None: no subject is denoised,
            and attention is joint, as in released inference.
        noise: that of the whole sequence, [1, z, N, h, w], from which the memory's frames take theirs.
        text: embeddings "prompt", and "subject" where there is one, of the pass with the prompt.
        negative: of the pass with the negative prompt; None without guidance.
    """
    layout = memento(memory.positions(start), video.shape[2], subject=blank is not None, split=blank is not None)
    clean = torch.cat(list(memory.latents), dim=1)[None].to(video)
    condition = condition_channels(clean, video, given, spec)
    if blank is not None:
        condition = torch.cat([condition_channels(None, blank.to(video), 0, spec), condition], dim=2)
    known = Renoised(segment="memory", latents=clean, noise=noise[:, :, layout.span("memory")].to(video))
    return Inputs(
        layout=layout, negative_layout=layout, text=text, negative=negative, condition=condition, renoised=known
    )


@dataclass(frozen=True, kw_only=True)
class MementoRequest(ShotRequest):
    """What one shot of Memento is made from; ``memory`` is not read.

    Args:
        memories: of each expert.
        start: place of the shot's first frame in the film.
        subject: caption of the subject; None: none is denoised. It and "" must be among the prepared texts.
        guidance: of this shot, if the sampler uses guidance; None: the sampler's.
    """

    memories: Mapping[Expert, FilmFrames] = field(default_factory=dict)
    start: int = 0
    subject: str | None = None
    guidance: float | None = None


class MementoGenerator(WanShotGenerator):
    """Generates shots as Memento does. A shot without memory is one of the base with the adapter."""

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        """See :meth:`storymem.wan.shots.WanShotGenerator.generate`."""
        if not isinstance(request, MementoRequest) or not any(one.frames for one in request.memories.values()):
            return super().generate(request, on_step)
        for expert, memory in request.memories.items():
            for number, latents in enumerate(memory.latents, start=1):
                check_finite(latents, f"the latents of memory frame {number} of the {expert} expert")
        pipe = self._memory_to_video()
        (frames,) = self._decoded(pipe, [self._sampled(pipe, request, on_step)])
        return frames

    def _sampled(self, pipe: WanMemoryToVideoPipeline, request: MementoRequest, on_step: OnStep | None) -> Tensor:
        """The denoised latents [1, z, T, h, w] of the video."""
        size, device = self.model.video, pipe._execution_device
        images = [Image.fromarray(frame) for frame in request.given]
        video = pipe.encode_given(images, request.frames, size.height, size.width)
        blank = None if request.subject is None else pipe.encode_given([], 1, size.height, size.width)
        blank_text = None if request.subject is None else ""
        frames = video.shape[2] + (blank is not None) + len(next(iter(request.memories.values())).frames)
        # Noise from the CPU's generator is the same on every device.
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(1, video.shape[1], frames, *video.shape[3:], generator=generator)
        parts: dict[str, Any] = {
            "start": request.start,
            "video": video,
            "given": pipe.spec.latent_frames(len(images)),
            "blank": blank,
            "noise": noise.to(device),
            "text": self._texts(request.prompt, request.subject),
            "negative": self._texts(self._negative(request), blank_text) if self._uses_guidance else None,
            "spec": pipe.spec,
        }
        own = request.guidance if self._uses_guidance else None
        inputs = {COMPONENTS[name]: memento_inputs(memory, **parts) for name, memory in request.memories.items()}
        latents = self._denoised(pipe, noise, inputs, request.frames, on_step, guidance=own)
        return latents[:, :, -video.shape[2] :]

    def _texts(self, prompt: str, subject: str | None) -> dict[str, Tensor]:
        texts = {"prompt": prompt} | ({} if subject is None else {"subject": subject})
        return {name: self._embeds[text] for name, text in texts.items()}


# A film


@dataclass(frozen=True, kw_only=True)
class MementoStoryteller(Storyteller):
    """The shot loop with a pool of keyframes for each expert; see :class:`Memento`.

    A take records what each expert recalled for it (``memory_of``), from which the pools of the next shot follow.
    """

    own: MementoModel = field(kw_only=True)

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """The first shot is text-to-video; the others as in StoryMem."""
        return "t2v" if shot.index == 0 else super().mode_of(shot, story)

    def texts_of(self, story: Story, shot: Shot) -> list[str]:
        texts = captions_of(story, shot, self.own)
        return [texts.prompt, texts.whole, *(() if texts.subject is None else (texts.subject, ""))]

    def recall_for(self, story: Story, shot: Shot, film: Film, bank: MemoryBank) -> Recalled:
        """What each expert recalls of its pool; for the first shot, which is made from text alone, nothing."""
        if self.mode_of(shot, story) == "t2v":
            return Recalled(keyframes=[])
        before = film.take_of(shot.index - 1)
        known, earlier = bank.known_to(shot.index + 1), {keyframe.id for keyframe in bank.known_to(shot.index)}
        by_expert: dict[Expert, list[Keyframe]] = {}
        for expert in self.generator.expert_names:
            pool = _pool(known, earlier, before, expert)
            by_expert[expert] = list(self.recall.recall(pool, self.coming(story, shot, film, bank, expert)))
        ids = {keyframe.id for own in by_expert.values() for keyframe in own}
        return Recalled(keyframes=[keyframe for keyframe in known if keyframe.id in ids], by_expert=by_expert)

    def request(self, story: Story, shot: Shot, film: Film, recalled: Recalled, seed: int) -> ShotRequest:
        plain = super().request(story, shot, film, recalled, seed)
        starts = film_starts(film, [self.frames_of(one) for one in story.shots])
        memories = {
            expert: FilmFrames(
                latents=[keyframe.latent for keyframe in own if keyframe.latent is not None],
                frames=film_frames(own, film, starts),
            )
            for expert, own in recalled.by_expert.items()
        }
        return MementoRequest(
            **{**vars(plain), "memory": ()},
            memories=memories,
            start=starts[shot.index],
            subject=captions_of(story, shot, self.own).subject,
            guidance=self.own.guidance_after_cut if shot.cut else None,
        )


def _pool(known: Sequence[Keyframe], earlier: set[str], before: Take | None, expert: Expert) -> list[Keyframe]:
    """What an expert chooses from: what it recalled for the shot before, what is new since, and the user's images."""
    kept = earlier if before is None or expert not in before.memory_of else set(before.memory_of[expert])
    return [k for k in known if k.id in kept or k.id not in earlier or k.is_users or k.pinned]


class Memento(StoryMem):
    """See :class:`storymem.methods.Method`.

    The first shot is text-to-video. Each expert has a pool of keyframes: those that it recalled for the shot before,
    and eight of that shot. Of more than it may recall its KeyframeQuery chooses, and the rest is forgotten.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`; adapter, memory, scorer of quality, first shot and
            what the negative prompt sees are replaced.
        models: for each model, by name, a :class:`MementoModel`.
        shift: of the noise levels.
        samples: frames of a shot that join the pools.
    """

    loop = MementoStoryteller

    def __init__(
        self, *, generate: Mapping[str, Any], models: Mapping[str, Any], shift: float = 5.0, samples: int = 8
    ) -> None:
        model = generate["model"]
        if (name := model["name"]) not in models:
            advice = f"add method.models.{name}.weights{did_you_mean(name, models)}"
            raise ValueError(f"method.models has no weights for model {name!r}: {advice}")
        self.own = build_settings(MementoModel, models[name])
        adapter = None
        if self.own.weights is not None:
            adapter = {"weights": dict(models[name]["weights"]), "objective": "memento", "query": True}
        elif model.get("weights") is not None:
            raise ValueError(f"method.models.{name}.weights is null, which is for models with random weights alone")
        changed = {
            "memory": {
                "selector": {"_target_": "storymem.memory.EvenlySpaced", "max_keyframes": samples},
                "recall": {
                    "_target_": "storymem.memory.Learned",
                    "capacity": self.own.local + self.own.whole,
                    "whole": self.own.whole,
                },
                "reference_fit": generate["memory"]["reference_fit"],
            },
            "model": {**model, "adapter": adapter, "memory_attention": "joint"},
            "scorer": {**generate["scorer"], "quality": {"_target_": "storymem.scorers.scorer.NoQuality"}},
            "sampler": {**generate["sampler"], "shift": shift, "negative_sees_memory": True},
            "first_shot": "t2v",
        }
        super().__init__(generate={**generate, **changed})
        if not self.settings.model.spec.condition_channels:
            raise ValueError(f"Memento gives memory in condition channels, which {self.settings.model.spec.name} lacks")
        # What a film records, beside the settings of `generate`.
        self.config["memento"] = {
            "guidance_after_cut": self.own.guidance_after_cut,
            "persons": self.own.persons,
            "subject": self.own.subject,
        }

    def parts(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        parts = {name: getattr(self.settings, name) for name in ("model", "sampler", "runtime", "continuity")}
        return {"generator": MementoGenerator(**parts, scorers=plain["generator"].scorers), "own": self.own}
