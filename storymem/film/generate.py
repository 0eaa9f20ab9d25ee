"""From settings to films: what is built from ``generate.yaml``, and run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storymem.composition import composed
from storymem.config import build_settings
from storymem.film.folder import Film, edited_film
from storymem.film.manifest import FilmError, check_folder
from storymem.film.matching import match, stale
from storymem.film.progress import Progress
from storymem.film.resume import match_film, story_record
from storymem.film.settings import (
    GenerateSettings,
    Work,
    build_part,
    build_policy,
    check_lengths,
    uses_text_to_video,
    work_of,
)
from storymem.film.tables import film_table
from storymem.memory.bank import read_entries
from storymem.overrides import hydra_arguments
from storymem.scorers import check_scorers, scorer_bytes, scorer_weights
from storymem.stopping import stopping_on_signals
from storymem.story import Story, load_stories, load_story
from storymem.wan.processes import Launch, find_grid
from storymem.wan.settings import RuntimeSettings, VideoSettings
from storymem.weights import Weights, locate, sample_hash

if TYPE_CHECKING:  # they load torch
    from storymem.film.parts import ShotGenerator
    from storymem.film.storyteller import Storyteller
    from storymem.wan.shots import WanShotGenerator

# What does not influence what the film looks like, and may change when a film is resumed.
_BESIDES = ("story", "output", "aspect", "size", "shot", "following", "takes", "take", "resume", "dry_run", "runtime")
_APPROXIMATE = ("precision", "cache", "cache_threshold")  # of the runtime, what changes the film


def generate(
    story: str | Path | Story,
    *,
    output: str | Path | None = None,
    model: str = "toy",
    overrides: Sequence[str] = (),
    progress: bool | Progress = True,
) -> Film:
    """Generate the film of a story, or resume it: the command ``storymem generate`` from Python.

    Args:
        story: its file, or a story from :func:`storymem.story.load_story`.
        output: the film's folder; films/<title> by default.
        model: "toy" (embedded), "wan2.2-a14b" or another choice of ``configs/model``.
        overrides: more settings, as on the command line: ``["seed=7", "memory.recall.capacity=7"]``.
        progress: whether to show notes, shots and steps; or what shows the latter. Warnings are logged in any case.

    Returns:
        The film; ``video`` is the path of the joined film.

    Raises:
        ValueError: for a mistake in the story or the settings, before anything is generated.
    """
    config = config_of([f"model={model}", *overrides, "dry_run=false"])
    config |= {"story": "." if isinstance(story, Story) else str(story), "output": output and str(output)}
    settings = build_settings(GenerateSettings, config)
    loaded = story if isinstance(story, Story) else load_story(str(settings.story))
    folder = Path(settings.output or Path("films") / loaded.slug)
    with stopping_on_signals():
        _generate(settings, config, {folder: loaded}, progress=progress)
    return Film.open(folder)


def config_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration of ``storymem generate`` with these arguments, as plain containers, without a story."""
    return composed("generate", hydra_arguments([*arguments, "story=."], None, GenerateSettings))


def generate_films(config: Mapping[str, Any]) -> list[Film]:
    """Generate the films that a composed configuration (plain containers) describes, and print their paths.

    All stories, folders and settings are checked first, before torch is imported.

    Returns:
        The films that this process made: all of them, unless teams of processes share them out; none in a dry run, and
        none in all but the first process of a team.

    Raises:
        Stopped: for SIGINT, SIGTERM and SIGUSR1, with a note that names the command to resume; finished shots are kept.
    """
    with stopping_on_signals():
        settings = build_settings(GenerateSettings, config)
        stories = load_stories([settings.story] if isinstance(settings.story, str) else settings.story)
        return _generate(settings, config, {_folder(story, settings): story for story in stories})


def _generate(
    settings: GenerateSettings,
    config: Mapping[str, Any],
    stories: Mapping[Path, Story],
    *,
    progress: bool | Progress = True,
) -> list[Film]:
    """Check everything, then make the films; ``stories`` by their films' folders."""
    launch = Launch.of(settings.runtime)
    _check(settings, stories, launch)
    reports = bool(progress) and launch.is_first and launch.team == 0
    if settings.take is not None and not settings.dry_run:
        ((folder, story),) = stories.items()
        return [_choose(settings, story, folder, reports=reports)] if launch.is_first else []
    grid = find_grid(settings.runtime, launch, model=settings.model, sampler=settings.sampler)
    if settings.dry_run:
        if reports:
            _print_plans(settings, config, stories)
        return []
    _check_weights(settings, stories, reports=reports)
    from storymem.film.processes import among_processes
    from storymem.wan.runtime import check_runtime

    films: list[Film] = []
    shown = progress if isinstance(progress, Progress) else Progress(enabled=progress)
    generator = build_generator(settings)
    generator.on_preview = shown.on_preview
    with among_processes(generator, launch, check_runtime(settings.runtime)) as shared:
        if shared is None:
            return films
        if progress and launch.world > 1:
            print(grid, file=sys.stderr)
        generator.check_machine()
        storyteller = build_storyteller(settings, config, shared)
        for folder, story in launch.share(list(stories.items())):
            film = storyteller.tell(
                story,
                folder,
                resume=settings.resume,
                shot=settings.shot,
                following=settings.following,
                takes=settings.takes,
                progress=shown,
            )
            if progress:
                _print_film(film)
            films.append(film)
    return films


def _check(settings: GenerateSettings, stories: Mapping[Path, Story], launch: Launch) -> None:
    """Raise ``ValueError`` for stories or folders that do not go with the settings."""
    for folder, story in stories.items():
        frames, continuity, first_shot = settings.model.video.frames, settings.continuity, settings.first_shot
        check_lengths(story, frames=frames, continuity=continuity, first_shot=first_shot)
        work = work_of(settings, len(story.shots))
        if work.words and len(stories) > 1:
            raise ValueError(f"{work.words} is for one story, not for {len(stories)}")
        check_folder(folder)
        if settings.take is not None:
            _check_choice(settings, work, folder)
    if launch.teams > len(stories):
        raise ValueError(
            f"runtime.processes_per_film={launch.world} makes {launch.teams} films at once, and there are "
            f"{len(stories)} stories: name more stories, start fewer processes, or use more processes per film"
        )


def _check_weights(settings: GenerateSettings, stories: Mapping[Path, Story], *, reports: bool) -> None:
    """Raise ``ValueError`` or ``OSError`` for weights and scorers that cannot be used; print notes if ``reports``."""
    for folder, story in stories.items() if reports else ():
        print(f"{story.title}: {len(story.shots)} shots with {settings.model.name}, to {folder}", file=sys.stderr)
    from storymem.story.notes import notes_on  # these load transformers
    from storymem.wan.sources import check_weights

    text_to_video = any(uses_text_to_video(story, settings) for story in stories.values())
    check_weights(settings.model, text_to_video=text_to_video, continuity=settings.continuity, sampler=settings.sampler)
    check_scorers(vars(settings.scorer))  # loads torch, which the report of missing weights does not
    if reports:
        for note in notes_on(list(stories.values()), settings.model, settings.sampler, settings.memory.reference_fit):
            print(note, file=sys.stderr)


def _check_choice(settings: GenerateSettings, work: Work, folder: Path) -> None:
    """Raise ``ValueError`` if no take can be chosen, or a seed is given, which a take that exists does not follow."""
    if work.shots is None or len(work.shots) != 1:
        raise ValueError(f"take={settings.take} is for one shot, not for shot={settings.shot}")
    if not Film.exists(folder):
        raise FilmError(f"{folder} holds no film yet: leave take out to make one")
    film = Film.open(folder)
    used = [film.config, *film.configs.values()]  # with the seed that made a take, its command is repeated as it was
    if settings.seed not in (GenerateSettings.seed, *(config.get("seed") for config in used)):
        raise ValueError(
            f"take={settings.take} shows a take that exists, whose noise seed={settings.seed} cannot change: leave "
            f"seed out to show it, or take out to make another (shot={settings.shot} seed={settings.seed})"
        )


def _choose(settings: GenerateSettings, story: Story, folder: Path, *, reports: bool) -> Film:
    """Let a shot show another of its takes (``shot=3 take=2``); nothing is generated."""
    work = work_of(settings, len(story.shots))
    assert work.shots is not None
    assert settings.take is not None
    with edited_film(folder) as film:
        wanted = match(film.slots, film.takes, film.story, story_record(story))[work.shots[0]].folder
        places = [place for place, slot in enumerate(film.slots) if slot.folder == wanted]
        if not places:
            raise FilmError(f"shot {settings.shot} of this story is not in the film yet: leave take out, once")
        film.show(places[0], settings.take)
        film.check()
    if reports:
        _print_film(film)
    return film


def _print_film(film: Film) -> None:
    print(film_table(film, stale(film, read_entries(film.folder)), film.other_videos()), file=sys.stderr)
    print(film.video, flush=True)


def _print_plans(settings: GenerateSettings, config: Mapping[str, Any], stories: Mapping[Path, Story]) -> None:
    """Print the plans. ``ValueError`` if films cannot be made as planned, or folders hold others."""
    from storymem.film.plan import make_plan

    check_scorers(vars(settings.scorer))
    plans = [make_plan(story, settings, folder) for folder, story in stories.items()]
    print("\n\n".join(text for text, _ in plans), flush=True)
    if problems := dict.fromkeys(problem for _, found in plans for problem in found):
        raise ValueError(f"not ready: {len(problems)} marked MISSING, UNFIT or TOO SMALL in the plan")
    for folder, story in stories.items():
        if Film.exists(folder):
            work = work_of(settings, len(story.shots))
            match_film(Film.open(folder), story_record(story), recorded(settings, config), work)


def _folder(story: Story, settings: GenerateSettings) -> Path:
    """Where a film lies: ``output`` itself for a story's file, a folder in it for stories of a list or a folder."""
    if isinstance(settings.story, str) and not Path(settings.story).is_dir():
        return Path(settings.output or Path("films") / story.slug)
    return Path(settings.output or "films") / story.slug


def build_generator(settings: GenerateSettings) -> WanShotGenerator:
    """The shot generator, which loads its networks when they are needed."""
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
    """The shot loop with all its parts; ``config`` is what the film's manifest records as its settings.

    Raises:
        ValueError: for settings that this machine cannot run, or a runtime of several processes without ``generator``.
    """
    from storymem.film.storyteller import Storyteller
    from storymem.wan.runtime import check_machine, check_runtime
    from storymem.wan.shots import WanShotGenerator

    device = check_runtime(settings.runtime)
    check_machine(settings.model, settings.runtime)
    if generator is None:
        check_one_process(settings.runtime)
    generator = generator or build_generator(settings)
    runtime = generator.settled if isinstance(generator, WanShotGenerator) else settings.runtime
    return Storyteller(
        generator=generator,
        embedder=build_part(_on_cpu(settings.scorer.clip), "scorer.clip"),
        quality=_quality(settings, runtime),
        selector=build_policy(settings.memory.selector, "memory.selector", ("max_keyframes", "select")),
        recall=build_policy(settings.memory.recall, "memory.recall", ("capacity", "recall")),
        continuity=settings.continuity,
        first_shot=settings.first_shot,
        reference_fit=settings.memory.reference_fit,
        seed=settings.seed,
        scorer_device=device,
        config=recorded(settings, config),
    )


def check_one_process(runtime: RuntimeSettings) -> None:
    """Raise ``ValueError`` for a runtime of several processes, where each process makes films of its own."""
    if runtime.spread or runtime.processes_per_film is not None:
        raise ValueError(
            "runtime.context_parallel, guidance_parallel, shard_weights and processes_per_film are for "
            "scripts/generate.py, where several processes make one film; here each process makes films of its own. For "
            "ST-Bench: torchrun ... scripts/generate.py st_bench/stories output=FOLDER, and then films=FOLDER"
        )


def _quality(settings: GenerateSettings, runtime: RuntimeSettings) -> Any:
    """The quality filter; where experts take turns in memory, it takes one too."""
    from storymem.scorers.on_demand import OnDemand

    def build() -> Any:
        return build_part(_on_cpu(settings.scorer.quality), "scorer.quality")

    if runtime.experts == "together":
        return build()
    # Those that come with the package are small.
    return OnDemand(build) if scorer_weights(settings.scorer.quality) else build()


def recorded(settings: GenerateSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a film's manifest records as its settings."""
    return recorded_config(config, settings.model.video) | {"weights": _hashes(settings)}


def recorded_config(config: Mapping[str, Any], video: VideoSettings | None = None) -> dict[str, Any]:
    """The part of a configuration that a film is made with, and that may not change when it is resumed.

    ``video`` has the size of the shots where ``aspect`` or ``size`` may have changed it.
    """
    runtime: Mapping[str, Any] = config.get("runtime", {})
    changed = {name: runtime[name] for name in _APPROXIMATE if runtime.get(name) not in (None, "none", "as_is")}
    if runtime.get("attention") == "sage":  # the one kernel that rounds to 8 bits
        changed["attention"] = "sage"
    kept = {key: value for key, value in config.items() if key not in _BESIDES}
    if video is not None and "model" in config:
        kept["model"] = config["model"] | {"video": dict(vars(video))}
    return {**kept, "runtime": changed} if changed else kept


def _hashes(settings: GenerateSettings) -> dict[str, str]:
    """See :func:`weight_hashes`.

    Text-to-video is left out: it makes a film's first shot only, and a film that is resumed has that.
    """
    from storymem.wan.sources import required_weights

    wanted = required_weights(
        settings.model, text_to_video=False, continuity=settings.continuity, sampler=settings.sampler
    )
    return weight_hashes(wanted + scorer_weights(vars(settings.scorer)))


def weight_hashes(weights: Sequence[Weights]) -> dict[str, str]:
    """Name of weights -> hash of a sample of their content, for the record of a film."""
    places: dict[str, list[Path]] = {}
    for one in weights:  # several may have one name, as the two files of a GGUF pair
        places.setdefault(one.name, []).append(locate(one))
    return {name: sample_hash(*found) for name, found in places.items()}


def _on_cpu(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's node with the CPU as its device: the loop moves it to the accelerator when it is needed."""
    return {**scorer, "device": "cpu"} if "device" in scorer else dict(scorer)
