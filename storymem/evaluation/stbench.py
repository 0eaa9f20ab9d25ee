"""``eval_stbench``: make the films of methods, score films, write the results."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, StoryPath, UserPath, build_settings, first_of
from storymem.evaluation.films import Films, find_films, only_named, stories_of, stories_of_films
from storymem.evaluation.mapping import MAPPING, MAPPING_SUFFIXES
from storymem.evaluation.statistics import StatisticsSettings
from storymem.evaluation.workers import from_first, workers, working_together
from storymem.film.manifest import FilmError, OtherFilmError
from storymem.film.settings import FirstShot, MemorySettings
from storymem.io import FileError, folder_lock, write_text
from storymem.story import Story
from storymem.wan.processes import Launch
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings
from storymem.weights import MissingWeights, locate

if TYPE_CHECKING:
    from storymem.evaluation.metric import Column, Metric
    from storymem.evaluation.results import Results
    from storymem.evaluation.scoring import StoryResult
    from storymem.methods import Method

_SYSTEM = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}")  # a name that a folder can have
_MARK = ".eval_stbench"  # a file that identifies a folder of results
_LISTED = 8  # names in a line before the rest is only counted
_WAIT_S = 60  # for another job that writes its tables into the same folder
_writing_tables = partial(folder_lock, doing="writing tables to", wait=_WAIT_S)  # a lock on the files directly in it
_WITHOUT_WEIGHTS = (
    "Without these weights: metrics=[toy] scores films of the toy world (st_bench/toy); metrics=[tiny] tries the "
    "command on untrained scorers, and its numbers mean nothing."
)

Compose = Callable[[str], Mapping[str, Any]]
"""Name of a method or an ablation -> the whole configuration with it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StbenchSettings:
    """Which stories are filmed and scored.

    Args:
        stories: a folder of stories, ours or the published JSON files.
        only: titles, short names or file names of the stories wanted; all by default.
    """

    stories: StoryPath = "st_bench/stories"
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings:
    """Settings of ``configs/eval_stbench.yaml``.

    Args:
        films: a folder with the films of one system, or a mapping file (see `find_films`); or name -> one of these.
        method: a ``_target_`` node of `storymem.methods.Method`, which makes its films first.
        methods: names of methods and ablations; each makes its films and is scored.
        label: name of ``method`` in the tables; by default that of its class.
        stbench: the stories.
        metrics: name -> ``_target_`` node of `storymem.evaluation.metric.Metric`.
        controls: also score control films, made in RAM of the films of the first system that is not `independent`.
        untrained: allow metrics with untrained scorers; set by ``metrics=[tiny]``.
        statistics: of intervals and tests.
        output: folder of the results and of the films that methods make.
        dry_run: find films, check everything, and print the plan.
        model, sampler, memory, scorer, runtime, continuity, first_shot, seed: as in ``generate.yaml``, for methods.
    """

    metrics: dict[str, dict[str, Any]]
    model: ModelSettings
    sampler: SamplerSettings
    memory: MemorySettings
    scorer: dict[str, dict[str, Any]]
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    films: UserPath | dict[str, UserPath] | None = None
    method: dict[str, Any] | None = None
    methods: tuple[str, ...] = ()
    label: str | None = None
    stbench: StbenchSettings = field(default_factory=StbenchSettings)
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    controls: bool = False
    untrained: bool = False
    output: UserPath = "results/stbench"
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    seed: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the tables: films in a folder. The ``_target_`` node ``method``, if any, makes them first."""

    name: str
    films: Path
    method: dict[str, Any] | None = None


def evaluate(config: Mapping[str, Any], compose: Compose | None = None) -> Results | None:
    """Make, score and compare films as a composed configuration (plain containers) specifies.

    The processes of a launcher divide the stories. The result of each story is a file, which is recomputed only if
    something that decides it has changed, so the same command resumes after a kill. All that can be refused (films that
    do not fit the stories, missing weights, an output folder with other files) is refused before anything is written.

    Args:
        config: of ``configs/eval_stbench.yaml``.
        compose: the configuration for each name in ``methods``.

    Returns:
        the results; None in a dry run and in all processes but the first.
    """
    settings = build_settings(EvaluateSettings, config)
    from storymem.scorers import check_targets

    check_targets(settings.metrics, "metrics")
    systems = find_systems(settings, compose)
    where, stories = find_stories(settings, systems)
    there = {one.name: find_films(one.films, stories) for one in systems if one.films.exists() or one.method is None}
    plan, missing = make_plan(systems, stories, there), missing_weights(settings.metrics)
    check_output(Path(settings.output))
    if settings.dry_run:
        needs = ["metrics need what is not on this machine:"] if missing else []
        lacking = [*needs, *map(str, missing), *what_methods_lack(systems, stories)]
        print("\n".join([plan, *lacking]), flush=True)
        if lacking:
            raise ValueError("not ready: the end of the plan says what is missing")
        return None
    if missing:
        raise MissingWeights("\n".join([*map(str, missing), _WITHOUT_WEIGHTS]))
    check_films(systems, stories, there)
    from storymem.evaluation.controls import controls_for
    from storymem.evaluation.jobs import find_jobs, score_jobs
    from storymem.evaluation.scoring import metric_settings

    launch = workers()
    if launch.team == 0:
        report(plan)
    made = [system for system in systems if system.method is not None]
    with working_together(launch):
        metrics = build_metrics(settings.metrics)
        for metric, story in product(metrics.values(), stories):
            metric.check(story)
        measured = metric_settings(metrics)
        check_trained(measured, settings)
        columns = [column for metric in metrics.values() for column in metric.columns]
        if made:
            metrics = {}  # frees RAM and VRAM for the methods' models
            check_methods(made, stories, settings, launch)
        with owned_output(Path(settings.output), systems, launch):
            for system in made:
                make_films(system, launch.share(stories))
            from_first(None)  # films to score are divided among all processes again
            metrics = metrics or build_metrics(settings.metrics)
            folders = {system.name: system.films for system in systems}
            jobs = find_jobs(
                folders, stories, controls_for(metrics) if settings.controls else (), Path(settings.output)
            )
            found = score_jobs(jobs, metrics, measured, launch)
            return _summarise(settings, systems, stories, where, found, columns, measured) if launch.team == 0 else None


def _summarise(
    settings: EvaluateSettings,
    systems: Sequence[System],
    stories: Sequence[Story],
    where: str,
    found: Mapping[tuple[str, str | None], Sequence[StoryResult]],
    columns: Sequence[Column],
    measured: Mapping[str, Any],
) -> Results:
    """Put the results together, write and print them."""
    from storymem.evaluation.report import write_report
    from storymem.evaluation.results import Results

    results = Results(
        columns=tuple(columns),
        stories={system: tuple(one) for (system, control), one in found.items() if control is None},
        metrics=dict(measured),
        statistics=settings.statistics,
        benchmark={"folder": where, "titles": [story.title for story in stories]},
        systems={system.name: {"films": str(system.films), "method": system.method} for system in systems},
        controlled=next((system for system, control in found if control is not None), None),
        controls={control: tuple(one) for (_, control), one in found.items() if control is not None},
    )
    output = Path(settings.output)
    with _writing_tables(output):
        print(write_report(results, output))
    if results.banner is not None:
        report(f"\033[1;31m{results.banner}\033[0m" if sys.stderr.isatty() else results.banner)
    report(f"the page: {output / 'index.html'}")
    return results


# --- what is compared


def find_stories(settings: EvaluateSettings, systems: Sequence[System]) -> tuple[str, list[Story]]:
    """Where the stories are from, and the stories.

    They are those of ``stbench.stories``; but if this is the default, and none of the films to score (all of them with
    manifests) is of these stories, those that the films were made from.
    """
    given = settings.stbench.stories
    if given == StbenchSettings().stories and not any(system.method for system in systems):
        own = stories_of_films([system.films for system in systems])
        if own and not {story.title for story in own} & {story.title for story in stories_of(given)}:
            return "those of the films", only_named(own, settings.stbench.only)
    return given, stories_of(given, settings.stbench.only)


def find_systems(settings: EvaluateSettings, compose: Compose | None) -> list[System]:
    """The rows of the tables: folders of films first, then methods.

    Raises:
        ValueError: if there are none, or two with one name.
    """
    folders = {_name_of(settings.films): settings.films} if isinstance(settings.films, str) else settings.films or {}
    systems = [System(name=name, films=Path(folder)) for name, folder in folders.items()]
    nodes: list[tuple[str, dict[str, Any]]] = []
    if settings.method is not None:
        nodes.append((settings.label or str(settings.method.get("_target_")).rpartition(".")[2], settings.method))
    for name in settings.methods:
        assert compose is not None, "methods are looked up by name"
        nodes.append((name, build_settings(EvaluateSettings, compose(name)).method or {}))
    systems += [System(name=name, films=Path(settings.output) / "films" / name, method=node) for name, node in nodes]
    names = [system.name for system in systems]
    if not names:
        raise ValueError("nothing to score: write films=FOLDER, method=NAME or methods=[NAME,NAME]")
    if wrong := [name for name in names if not _SYSTEM.fullmatch(name)]:
        raise ValueError(f"a system cannot be called {wrong[0]!r}, which names no folder: write films={{NAME: FOLDER}}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two systems are called {twice[0]}: name folders of films as films={{NAME: FOLDER}}")
    return systems


def _name_of(films: str) -> str:
    """The name of a system by its folder, or by its mapping file."""
    path = Path(os.path.abspath(films))
    if path.name == MAPPING:
        return path.parent.name
    return path.stem if path.suffix.lower() in MAPPING_SUFFIXES else path.name


def _count(there: Films | None) -> int:
    return sum(shot.path is not None for film in (there.films if there else ()) for shot in film.shots)


def make_plan(systems: Sequence[System], stories: Sequence[Story], there: Mapping[str, Films]) -> str:
    """What will be made and scored: for each system the film of each story, and missing shots."""
    shots = sum(len(story.shots) for story in stories)
    lines = [f"{len(stories)} {'story' if len(stories) == 1 else 'stories'}, {shots} shots"]
    for system in systems:
        found = _count(there.get(system.name))
        rest = "; the others will be made" if system.method is not None and found < shots else ""
        lines.append(f"{system.name}: {found} of {shots} shots in {system.films}{rest}")
        if system.method is None:
            lines += _films_found(there[system.name], stories)
    return "\n".join(lines)


def check_films(systems: Sequence[System], stories: Sequence[Story], there: Mapping[str, Films]) -> None:
    """Raise ``ValueError`` for a folder of films without a shot of any of the stories."""
    advice = f"a folder such as {stories[0].slug}/ is expected; dry_run=true lists what is missing"
    for system in systems:
        if system.method is None and not _count(there[system.name]):
            raise ValueError(f"films={system.films} holds no film of the stories: {advice}")


def _films_found(there: Films, stories: Sequence[Story]) -> Iterator[str]:
    for story, film in zip(stories, there.films, strict=True):
        if film.folder is not None:
            name = film.folder.relative_to(there.root) if film.folder.is_relative_to(there.root) else film.folder
            where = there.root.name if str(name) == "." else name
            yield f"  {story.title}: {where}" + (f", {film.layout}" if film.layout else "")
        yield from (f"  {story.title}: {reason}" for reason in dict.fromkeys(s.reason for s in film.shots) if reason)
        if film.ignored:
            yield f"  {story.title}: not used: {first_of(film.ignored, _LISTED)}"
    if there.unused:
        yield f"  of no story: {first_of(there.unused, _LISTED)}"


# --- metrics


def missing_weights(nodes: Mapping[str, Any]) -> list[MissingWeights]:
    """The published weights that metrics need and that are not on this machine."""
    from storymem.scorers import scorer_weights

    missing = []
    for weights in dict.fromkeys(scorer_weights(nodes)):
        try:
            locate(weights)
        except MissingWeights as error:
            missing.append(error)
    return missing


def build_metrics(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics by name.

    Raises:
        ValueError: if there is none or two have a column of one name.
    """
    from hydra.utils import instantiate

    from storymem.evaluation.metric import Metric

    metrics: dict[str, Metric] = {name: instantiate(node, _convert_="all") for name, node in nodes.items()}
    if not metrics:
        raise ValueError("metrics: there are none; write metrics=[stbench] or metrics=[stbench,identity-clip]")
    if other := [name for name, metric in metrics.items() if not isinstance(metric, Metric)]:
        raise ValueError(f"metrics.{other[0]}: its class must be a subclass of storymem.evaluation.metric.Metric")
    columns = [column.name for metric in metrics.values() for column in metric.columns]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"metrics: two of them measure {twice[0]}; leave one out")
    return _with_motion(metrics)


def _with_motion(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """``metrics``, and the films' motion after the first that measures consistency."""
    from storymem.evaluation.motion import Motion

    first = next((name for name, one in metrics.items() if any(column.consistency for column in one.columns)), None)
    if first is None or any(isinstance(metric, Motion) for metric in metrics.values()) or "motion" in metrics:
        return dict(metrics)
    found: dict[str, Metric] = {}
    for name, metric in metrics.items():
        found[name] = metric
        if name == first:
            found["motion"] = Motion()
    return found


def check_trained(measured: Mapping[str, Any], settings: EvaluateSettings) -> None:
    """Raise ``ValueError`` if a scorer is untrained and the user has not asked for that."""
    untrained = [name for name, metric in measured.items() if metric["weights"] == "untrained"]
    if untrained and not settings.untrained:
        raise ValueError(
            f"metrics: {', '.join(untrained)} have untrained scorers: the numbers would mean nothing. "
            "Give their weights; or write metrics=[tiny] to try the command on untrained scorers"
        )


# --- methods


def build_method(system: System) -> Method:
    """The method of a system. Raises ``ValueError`` if its class is no method."""
    from hydra.utils import instantiate

    from storymem.methods import Method

    method = instantiate(system.method, _convert_="all")
    if not isinstance(method, Method):
        raise ValueError(f"{system.name}: the class of method._target_ must have the methods check and run")
    return method


def check_methods(
    systems: Sequence[System], stories: Sequence[Story], settings: EvaluateSettings, launch: Launch
) -> None:
    """Check every story with every method, before the first film is made."""
    from storymem.methods import check_all

    check_all(*(partial(check_method, system, stories) for system in systems))
    if launch.team == 0:
        from storymem.story.notes import notes_on

        for note in notes_on(stories, settings.model, settings.sampler, settings.memory.reference_fit):
            report(note)


def check_method(system: System, stories: Sequence[Story]) -> None:
    """Raise what keeps a method from making its films: their stories, missing weights, other films in their folders."""
    from storymem.methods import ChecksFilms, check_all

    method = build_method(system)

    def check(story: Story) -> None:
        method.check(story)
        if isinstance(method, ChecksFilms):
            with _advice_on_other_films():
                method.check_film(story, system.films / story.slug)

    check_all(*(partial(check, story) for story in stories))


@contextmanager
def _advice_on_other_films() -> Iterator[None]:
    """Add to the error that names another film what to do here."""
    try:
        yield
    except OtherFilmError as error:
        advice = "delete its folder, so that the film is made again, or choose another output"
        raise FilmError(f"{error.differs}\n{advice}") from None


def what_methods_lack(systems: Sequence[System], stories: Sequence[Story]) -> list[str]:
    """Why methods cannot make films here, each reason with the methods that it holds for."""
    from storymem.methods import causes_of

    found: dict[str, list[str]] = {}
    for system in systems:
        try:
            if system.method is not None:
                check_method(system, stories)
        except (ValueError, OSError, ImportError) as error:
            for cause in causes_of(error):
                found.setdefault(str(cause), []).append(system.name)
    return [f"{', '.join(names)} cannot make films here: {reason}" for reason, names in found.items()]


def make_films(system: System, stories: Sequence[Story]) -> None:
    """The films of a method, whose models are freed at the end.

    Raises:
        FilmError: if there is a film that was made differently.
    """
    method = build_method(system)
    for number, story in enumerate(stories, start=1):
        report(f"{system.name}: film {number} of {len(stories)}, {story.title}")
        with _advice_on_other_films():
            method.run(story, system.films / story.slug)
    del method
    gc.collect()


# --- the output folder


def check_output(output: Path) -> None:
    """Raise ``FileError`` unless ``output`` is new, empty or a folder of results."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileError(f"output={output} is a file: name a folder")
    # A new folder may hold our lock, and Hydra's folder for jobs on a cluster.
    others = sorted(path.name for path in output.iterdir() if path.name not in (".lock", "jobs"))
    if others and not (output / _MARK).is_file():
        raise FileError(
            f"output={output} is not empty and not a folder of results: it holds {first_of(others, _LISTED)}. "
            "Nothing was written; choose a new or empty folder"
        )


@contextmanager
def owned_output(output: Path, systems: Sequence[System], launch: Launch) -> Iterator[None]:
    """The output folder with our mark, locked by the first process for each system.

    Jobs for other systems may use the same folder at the same time.

    Raises:
        FileError: if the folder holds other files or cannot be written, or another job scores one of the systems.
    """
    with ExitStack() as locks:
        problem = None
        try:
            if launch.team == 0:
                with _writing_tables(output):
                    check_output(output)
                    write_text(output / _MARK, "This folder holds results of eval_stbench.\n")
                for system in systems:
                    locks.enter_context(folder_lock(output / "stories" / system.name, "scoring films in"))
        except FileError as error:
            problem = str(error)
        if (problem := from_first(problem)) is not None:
            raise FileError(problem)
        yield


def report(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)
