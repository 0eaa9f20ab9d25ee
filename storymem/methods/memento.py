"""Memento (arXiv 2606.14667): learned recall for each expert, and an image of the subject denoised beside each shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic.dataclasses import dataclass as settings

from storymem.config import STRICT, build_settings, check_bounds, did_you_mean
from storymem.film.folder import Film
from storymem.film.manifest import Take
from storymem.film.parts import Recalled
from storymem.film.settings import Mode
from storymem.film.storyteller import Storyteller
from storymem.film.timeline import film_frames, film_starts
from storymem.memory import Keyframe, MemoryBank
from storymem.methods.storymem import StoryMem
from storymem.story import Shot, Story
from storymem.story.captions import global_caption, renamed, tagged
from storymem.wan.memento import FilmFrames, MementoGenerator, MementoRequest
from storymem.wan.shots import ShotRequest
from storymem.wan.spec import Expert
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
