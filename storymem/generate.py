"""From a composed configuration to a film: what is built from the settings of ``generate.yaml``, and run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.config import build_settings
from storymem.modes import check_lengths, parse_resume
from storymem.settings import GenerateSettings, uses_text_to_video
from storymem.story import load_story

if TYPE_CHECKING:
    from storymem.film import Film
    from storymem.storyteller import Storyteller


# What has no say in what the film looks like, and so may differ when a film is gone on with.
_BESIDES = ("story", "output", "resume", "dry_run", "runtime")


def generate(config: Mapping[str, Any]) -> Film | None:
    """Make the film that a composed configuration (plain containers) describes; None for a dry run.

    The story and the settings are checked first, before torch is imported.
    """
    settings = build_settings(GenerateSettings, config)
    story = load_story(settings.story)
    folder = Path(settings.output or Path("films") / story.slug)
    frames, continuity, first_shot = settings.model.video.frames, settings.continuity, settings.first_shot
    check_lengths(story, frames=frames, continuity=continuity, first_shot=first_shot)
    parse_resume(settings.resume, len(story.shots))
    if settings.dry_run:
        from storymem.plan import make_plan

        print(make_plan(story, settings, folder))
        return None
    from storymem.wan.sources import check_weights

    check_weights(settings.model, text_to_video=uses_text_to_video(story, settings), continuity=continuity)
    from storymem.progress import Progress, film_table

    teller = build_storyteller(settings, config)
    film = teller.tell(story, folder, resume=settings.resume, progress=Progress())
    print(film_table(film), file=sys.stderr)
    print(film.video)
    return film


def build_storyteller(settings: GenerateSettings, config: Mapping[str, Any]) -> Storyteller:
    """The shot loop with all its parts; ``config`` is what the film's manifest will say it was made with."""
    from hydra.utils import instantiate

    from storymem.storyteller import Storyteller
    from storymem.wan.runtime import check_runtime
    from storymem.wan.shots import WanShotGenerator

    device = check_runtime(settings.runtime)
    return Storyteller(
        generator=WanShotGenerator(
            model=settings.model,
            sampler=settings.sampler,
            runtime=settings.runtime,
            continuity=settings.continuity,
        ),
        embedder=instantiate(_on_cpu(settings.scorer.clip)),
        quality=instantiate(_on_cpu(settings.scorer.quality)),
        selector=instantiate(settings.memory.selector),
        recall=instantiate(settings.memory.recall),
        continuity=settings.continuity,
        first_shot=settings.first_shot,
        reference_fit=settings.memory.reference_fit,
        seed=settings.seed,
        scorer_device=device,
        config={key: value for key, value in config.items() if key not in _BESIDES},
    )


def _on_cpu(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's node with the CPU as its device: the loop moves it to the accelerator when its turn comes."""
    return {**scorer, "device": "cpu"} if "device" in scorer else dict(scorer)
