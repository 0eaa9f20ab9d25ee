"""From a composed configuration to a film: what is built from the settings of ``generate.yaml``, and run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.config import build_settings
from storymem.film.modes import check_lengths, parse_resume
from storymem.film.ownership import check_folder
from storymem.film.settings import GenerateSettings, uses_text_to_video
from storymem.stopping import stopping_on_signals
from storymem.story import Story, load_stories
from storymem.wan.processes import Launch, find_grid

if TYPE_CHECKING:
    from storymem.film.folder import Film
    from storymem.film.storyteller import ShotGenerator, Storyteller
    from storymem.wan.shots import WanShotGenerator


# What has no say in what the film looks like, and so may differ when a film is gone on with.
_BESIDES = ("story", "output", "resume", "dry_run", "runtime")
_APPROXIMATE = ("precision", "cache", "cache_threshold")  # of the runtime, what changes the picture


def generate(config: Mapping[str, Any]) -> list[Film]:
    """Make the films that a composed configuration (plain containers) describes.

    All stories, folders and the settings are checked first, before torch is imported.

    Returns:
        The films that this process made: all of them, unless teams of processes share them out; none in a dry run, and
        in all but the first process of a team.

    Raises:
        Stopped: for SIGINT, SIGTERM and SIGUSR1, with a note that says how to go on; finished shots are kept.
    """
    with stopping_on_signals():
        return _generate(config)


def _generate(config: Mapping[str, Any]) -> list[Film]:
    settings = build_settings(GenerateSettings, config)
    stories = load_stories([settings.story] if isinstance(settings.story, str) else settings.story)
    for story in stories:
        _check_story(story, settings, among=len(stories))
    launch = Launch.of(settings.runtime)
    if launch.teams > len(stories):
        raise ValueError(
            f"runtime.processes_per_film={launch.world} lets {launch.teams} films be made at once, and "
            f"the stories are {len(stories)}: name more stories, start fewer processes, or let more make one film"
        )
    grid = find_grid(settings.runtime, launch, model=settings.model, sampler=settings.sampler)
    if settings.dry_run:
        if launch.is_first and launch.team == 0:
            _print_plans(stories, settings)
        return []
    from storymem.wan.sources import check_weights

    text_to_video = any(uses_text_to_video(story, settings) for story in stories)
    check_weights(settings.model, text_to_video=text_to_video, continuity=settings.continuity, sampler=settings.sampler)
    if launch.is_first and launch.team == 0:
        _tell_what_is_not_read(stories, settings)
    from storymem.film.progress import Progress, film_table
    from storymem.film.ranks import among_ranks
    from storymem.wan.runtime import check_runtime

    films: list[Film] = []
    generator = build_generator(settings)
    with among_ranks(generator, launch, check_runtime(settings.runtime)) as shared:
        if shared is None:
            return films
        if launch.world > 1:
            print(grid, file=sys.stderr)
        generator.check_machine()
        teller = build_storyteller(settings, config, shared)
        for story in launch.share(stories):
            film = teller.tell(story, _folder(story, settings), resume=settings.resume, progress=Progress())
            print(film_table(film), file=sys.stderr)
            print(film.video, flush=True)
            films.append(film)
    return films


def _print_plans(stories: Sequence[Story], settings: GenerateSettings) -> None:
    """Print the plans.

    Raises:
        ValueError: if films cannot be made as planned.
    """
    from storymem.film.plan import make_plan

    plans = [make_plan(story, settings, _folder(story, settings)) for story in stories]
    print("\n\n".join(text for text, _ in plans), flush=True)
    if problems := dict.fromkeys(problem for _, found in plans for problem in found):
        raise ValueError(f"not ready: {len(problems)} marked MISSING, UNFIT or TOO SMALL in the plan")


def _tell_what_is_not_read(stories: Sequence[Story], settings: GenerateSettings) -> None:
    from storymem.story.prompts import remarks_on
    from storymem.story.references import reference_remarks

    for remark in remarks_on(stories, settings.model, settings.sampler):
        print(remark, file=sys.stderr)
    video = settings.model.video
    for story in stories:
        for remark in reference_remarks(story, video.height, video.width, settings.memory.reference_fit):
            print(remark if len(stories) == 1 else f"{story.title}: {remark}", file=sys.stderr)


def _check_story(story: Story, settings: GenerateSettings, *, among: int) -> None:
    """Raise ``ValueError`` for what would keep one of ``among`` stories from being filmed in its folder."""
    frames, continuity, first_shot = settings.model.video.frames, settings.continuity, settings.first_shot
    check_lengths(story, frames=frames, continuity=continuity, first_shot=first_shot)
    if parse_resume(settings.resume, len(story.shots)) is not None and among > 1:
        raise ValueError(f"resume={settings.resume} is for one story, and {among} were named")
    check_folder(_folder(story, settings))


def _folder(story: Story, settings: GenerateSettings) -> Path:
    """Where a film lies: ``output`` itself for a story's file, a folder in it for stories of a list or a folder."""
    if isinstance(settings.story, str) and not Path(settings.story).is_dir():
        return Path(settings.output or Path("films") / story.slug)
    return Path(settings.output or "films") / story.slug


def build_generator(settings: GenerateSettings) -> WanShotGenerator:
    """What makes the shots; it loads its networks when they are needed."""
    from storymem.scorers import scorer_bytes
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

    from storymem.film.storyteller import Storyteller
    from storymem.wan.runtime import check_machine, check_runtime

    device = check_runtime(settings.runtime)
    check_machine(settings.model, settings.runtime)
    if generator is None and (settings.runtime.spread or settings.runtime.processes_per_film is not None):
        raise ValueError(
            "runtime.context_parallel, guidance_parallel, shard_weights and processes_per_film are for "
            "scripts/generate.py, where several processes make one film; here each process makes films of its own. For "
            "ST-Bench: torchrun ... scripts/generate.py st_bench/stories output=FOLDER, and then films=FOLDER"
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
        config=_recorded(config) | {"weights": _hashes(settings)},
    )


def _recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration a film is made with, and may not change when it is gone on with."""
    runtime: Mapping[str, Any] = config.get("runtime", {})
    changed = {name: runtime[name] for name in _APPROXIMATE if runtime.get(name) not in (None, "none", "as_is")}
    if runtime.get("attention") == "sage":  # the one kernel that rounds to 8 bits
        changed["attention"] = "sage"
    kept = {key: value for key, value in config.items() if key not in _BESIDES}
    return {**kept, "runtime": changed} if changed else kept


def _hashes(settings: GenerateSettings) -> dict[str, str]:
    """Name of weights -> what tells them from others of that name.

    Text-to-video is left out: it makes a film's first shot and no other, and a film that is gone on with has that.
    """
    from storymem.scorers import scorer_weights
    from storymem.wan.sources import required_weights
    from storymem.weights import locate, sample_hash

    wanted = required_weights(
        settings.model, text_to_video=False, continuity=settings.continuity, sampler=settings.sampler
    )
    for scorer in (settings.scorer.clip, settings.scorer.quality):
        wanted += scorer_weights(scorer)
    places: dict[str, list[Path]] = {}
    for weights in wanted:  # several may go by one name: both files of a GGUF pair, say
        places.setdefault(weights.name, []).append(locate(weights))
    return {name: sample_hash(*found) for name, found in places.items()}


def _on_cpu(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's node with the CPU as its device: the loop moves it to the accelerator when its turn comes."""
    return {**scorer, "device": "cpu"} if "device" in scorer else dict(scorer)
