"""The settings of ``generate.yaml``. Loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, StoryPath, UserPath, check_bounds
from storymem.film.modes import FirstShot, mode_of
from storymem.story import MAX_SHOTS, Story
from storymem.wan.combinations import check_combinations
from storymem.wan.settings import MAX_SEED, Continuity, ModelSettings, RuntimeSettings, SamplerSettings, check_reach


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemorySettings:
    """The memory: policies as ``_target_`` nodes, and how reference pictures are brought to size."""

    recall: dict[str, Any]
    selector: dict[str, Any]
    reference_fit: Literal["auto", "cover", "contain"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScorerSettings:
    """The scorers of the shot loop, as ``_target_`` nodes."""

    clip: dict[str, Any]
    quality: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateSettings:
    """Everything ``scripts/generate.py`` can be told; see :class:`storymem.film.storyteller.Storyteller`.

    Args:
        story: a story's file or a folder of stories, or several of them.
        output: the film's folder, films/<title> by default; of several stories, the folder in which their films lie.
    """

    story: StoryPath | tuple[StoryPath, ...]
    model: ModelSettings
    sampler: SamplerSettings
    memory: MemorySettings
    scorer: ScorerSettings
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    output: UserPath | None = None
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    seed: int = 0
    resume: str = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, seed=(0, MAX_SEED - MAX_SHOTS))
        check_combinations(self.model, self.sampler, self.runtime)
        if isinstance(capacity := self.memory.recall.get("capacity"), int):
            check_reach(self.model, capacity, "memory.recall.capacity")
        nodes = {"memory.recall": self.memory.recall, "memory.selector": self.memory.selector}
        nodes |= {"scorer.clip": self.scorer.clip, "scorer.quality": self.scorer.quality}
        if without := [name for name, node in nodes.items() if "_target_" not in node]:
            raise ValueError(f"{without[0]} names no class: write {without[0]}._target_=package.module.Class")


def uses_text_to_video(story: Story, settings: GenerateSettings) -> bool:
    """Whether the film's first shot needs the text-to-video model."""
    first = story.shots[0]
    return mode_of(first, story, continuity=settings.continuity, first_shot=settings.first_shot) == "t2v"
