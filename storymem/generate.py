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
from storymem.wan.layout import Launch, find_layout

if TYPE_CHECKING:
    from storymem.film import Film
    from storymem.storyteller import ShotGenerator, Storyteller


# What has no say in what the film looks like, and so may differ when a film is gone on with.
_BESIDES = ("story", "output", "resume", "dry_run", "runtime")
_APPROXIMATE = ("precision", "cache", "cache_threshold", "cache_ratios")  # of the runtime, what changes the picture


def generate(config: Mapping[str, Any]) -> Film | None:
    """Make the film that a composed configuration (plain containers) describes.

    The story and the settings are checked first, before torch is imported.

    Returns:
        The film; None for a dry run, and in all but the first of several processes.
    """
    settings = build_settings(GenerateSettings, config)
    story = load_story(settings.story)
    folder = Path(settings.output or Path("films") / story.slug)
    frames, continuity, first_shot = settings.model.video.frames, settings.continuity, settings.first_shot
    check_lengths(story, frames=frames, continuity=continuity, first_shot=first_shot)
    parse_resume(settings.resume, len(story.shots))
    launch = Launch.of_environment()
    layout = find_layout(settings.runtime, launch, model=settings.model, sampler=settings.sampler)
    if settings.dry_run:
        from storymem.plan import make_plan

        if launch.is_first:
            print(make_plan(story, settings, folder))
        return None
    from storymem.wan.sources import check_weights

    text_to_video = uses_text_to_video(story, settings)
    check_weights(settings.model, text_to_video=text_to_video, continuity=continuity, sampler=settings.sampler)
    from storymem.progress import Progress, film_table
    from storymem.ranks import among_ranks
    from storymem.wan.runtime import check_runtime

    with among_ranks(build_generator(settings), launch, check_runtime(settings.runtime)) as generator:
        if generator is None:
            return None
        if launch.world > 1:
            print(layout, file=sys.stderr)
        teller = build_storyteller(settings, config, generator)
        film = teller.tell(story, folder, resume=settings.resume, progress=Progress())
    print(film_table(film), file=sys.stderr)
    print(film.video)
    return film


def build_generator(settings: GenerateSettings) -> ShotGenerator:
    """What makes the shots; it loads its networks when they are needed."""
    from storymem.scorers.sources import scorer_bytes
    from storymem.wan.shots import WanShotGenerator

    return WanShotGenerator(
        model=settings.model,
        sampler=settings.sampler,
        runtime=settings.runtime,
        continuity=settings.continuity,
        scorers=scorer_bytes(settings.scorer.clip, settings.scorer.quality),
    )


def build_storyteller(
    settings: GenerateSettings, config: Mapping[str, Any], generator: ShotGenerator | None = None
) -> Storyteller:
    """The shot loop with all its parts.

    Args:
        settings: of all parts.
        config: what the film's manifest will say it was made with.
        generator: what makes the shots, where it works together with other processes; None: :func:`build_generator`.

    Raises:
        ValueError: for settings that this machine cannot run, or a runtime of several processes without ``generator``.
    """
    from hydra.utils import instantiate

    from storymem.storyteller import Storyteller
    from storymem.wan.acceleration import check_acceleration
    from storymem.wan.runtime import check_runtime

    device = check_runtime(settings.runtime)
    check_acceleration(settings.model, settings.sampler, settings.runtime)
    if generator is None and settings.runtime.spread:
        raise ValueError(
            "runtime.context_parallel, guidance_parallel and shard_weights are for scripts/generate.py, where several "
            "processes make one film; here each process makes films of its own"
        )
    return Storyteller(
        generator=generator or build_generator(settings),
        embedder=instantiate(_on_cpu(settings.scorer.clip)),
        quality=instantiate(_on_cpu(settings.scorer.quality)),
        selector=instantiate(settings.memory.selector),
        recall=instantiate(settings.memory.recall),
        continuity=settings.continuity,
        first_shot=settings.first_shot,
        reference_fit=settings.memory.reference_fit,
        seed=settings.seed,
        scorer_device=device,
        config=_recorded(config),
    )


def _recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration a film is made with, and may not change when it is gone on with."""
    runtime: Mapping[str, Any] = config.get("runtime", {})
    changed = {name: runtime[name] for name in _APPROXIMATE if runtime.get(name) not in (None, "none", "as_is")}
    if runtime.get("attention") == "sage":  # the one kernel that rounds to 8 bits
        changed["attention"] = "sage"
    kept = {key: value for key, value in config.items() if key not in _BESIDES}
    return {**kept, "runtime": changed} if changed else kept


def _on_cpu(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's node with the CPU as its device: the loop moves it to the accelerator when its turn comes."""
    return {**scorer, "device": "cpu"} if "device" in scorer else dict(scorer)
