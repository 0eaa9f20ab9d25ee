"""From a composed ``eval_stbench.yaml`` to tables: make films if need be, score them, put the results together."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, StoryPath, UserPath, build_settings
from storymem.evaluation.films import FilmFiles, Films, find_all, find_films, stories_of
from storymem.evaluation.layouts import MAPPING, MAPPING_SUFFIXES
from storymem.evaluation.output import check_output, owned_output, written_by_one
from storymem.evaluation.statistics import StatisticsSettings
from storymem.evaluation.workers import Workers
from storymem.film.modes import FirstShot
from storymem.film.settings import MemorySettings
from storymem.io import FileError, naming_full_disk, remove_leftovers, write_atomically, write_text
from storymem.story import Story
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings
from storymem.weights import MissingWeights, locate

if TYPE_CHECKING:
    from storymem.evaluation.methods import Method
    from storymem.evaluation.metric import Metric
    from storymem.evaluation.results import Results
    from storymem.evaluation.scoring import StoryResult

_SYSTEM = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}")  # a folder's name
_LISTED = 8  # names in the plan before the rest is only counted
_WITHOUT_WEIGHTS = (
    "Without these weights: metrics=[toy] scores films of the toy world (st_bench/toy); metrics=[tiny] tries the "
    "command on untrained scorers, and its numbers mean nothing."
)

Compose = Callable[[str], Mapping[str, Any]]
"""Name of a method or an experiment -> the whole configuration with it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StbenchSettings:
    """Which stories: all of a folder, or those that ``only`` names by title, slug or file."""

    stories: StoryPath = "st_bench/stories"
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings:
    """Everything ``scripts/eval_stbench.py`` can be told.

    Args:
        films: a folder with the films of one system, or a mapping file (see `find_all`), or name -> one of these for
            several systems.
        method: a ``_target_`` node of `storymem.evaluation.methods.Method`; it makes its films first.
        methods: names of files in ``configs/method`` or ``configs/experiment``, each made and scored.
        label: name of ``method``'s row where it is not its own: the experiment's.
        stbench: the stories.
        metrics: name -> ``_target_`` node of `storymem.evaluation.metric.Metric`.
        statistics: resampling.
        output: the folder for results and for the films that methods make.
        dry_run: find films, check everything, print what would be done.
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
    output: UserPath = "results/stbench"
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    seed: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the table: films in a folder, which ``method`` (a ``_target_`` node) makes first if there is one."""

    name: str
    films: Path
    method: dict[str, Any] | None = None


def evaluate(config: Mapping[str, Any], compose: Compose | None = None) -> Results | None:
    """Score what a composed configuration (plain containers) names; None for a dry run and for all but one worker.

    Stories are shared out over the processes of a launcher. The result of each story is a file of its own, which is not
    made again as long as nothing that decides it has changed, so the same command goes on after a kill. Whatever can be
    refused is refused before anything is made or written: films that cannot be told apart, weights that are not there,
    a story that a method cannot film, an output folder of somebody else's.

    Args:
        config: of ``configs/eval_stbench.yaml``.
        compose: looks up the names in ``methods``; without it there must be none.
    """
    settings = build_settings(EvaluateSettings, config)
    stories = stories_of(settings.stbench.stories, settings.stbench.only)
    systems = find_systems(settings, config, compose)
    planned, missing = plan(systems, stories), missing_weights(settings.metrics)
    if settings.dry_run:
        print("\n".join([planned, *(f"metrics need what is not on this machine: {one}" for one in missing)]))
        return None
    if missing:
        raise MissingWeights("\n".join([*map(str, missing), _WITHOUT_WEIGHTS]))
    output = Path(settings.output)
    check_output(output)
    workers = Workers.of_environment()
    if workers.is_first:
        say(planned)
    from storymem.evaluation.scoring import metric_settings

    workers.take_accelerator()
    metrics = build_metrics(settings.metrics)
    measured = metric_settings(metrics)
    made = [system for system in systems if system.method is not None]
    if made:  # the models need the room
        metrics.clear()
        gc.collect()
        check_methods(made, stories)
        if workers.is_first:
            from storymem.story.prompts import remarks_on

            for remark in remarks_on(stories, settings.model, settings.sampler):
                say(remark)
    workers.begin()
    try:
        with owned_output(output, [system.name for system in systems], workers):
            for system in made:
                make_films(system, workers.share(stories))
            workers.wait_for_all()  # films are shared out anew to be scored
            metrics = metrics or build_metrics(settings.metrics)
            results = score(systems, stories, metrics, measured, output, workers)
            if not workers.is_first:
                return None
            summary = _summary(settings, systems, stories, results, metrics, measured)
            with written_by_one(output):
                report(summary, output)
    finally:
        workers.end()
    return summary


def _summary(
    settings: EvaluateSettings,
    systems: Sequence[System],
    stories: Sequence[Story],
    results: Mapping[str, Sequence[StoryResult]],
    metrics: Mapping[str, Metric],
    measured: Mapping[str, Any],
) -> Results:
    from storymem.evaluation.results import summarise

    return summarise(
        results,
        metrics=measured,
        columns=[column for metric in metrics.values() for column in metric.columns],
        settings=settings.statistics,
        stories={"folder": settings.stbench.stories, "titles": [story.title for story in stories]},
        systems={system.name: {"films": str(system.films), "method": system.method} for system in systems},
    )


def missing_weights(nodes: Mapping[str, Mapping[str, Any]]) -> list[MissingWeights]:
    """The published weights that metrics need and that are not on this machine."""
    from storymem.scorers import scorer_weights

    missing = {}
    for weights in (found for node in nodes.values() for target in _targets(node) for found in scorer_weights(target)):
        try:
            locate(weights)
        except MissingWeights as error:
            missing[weights] = error
    return list(missing.values())


def _targets(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _targets(value)


def check_methods(systems: Sequence[System], stories: Sequence[Story]) -> None:
    """Ask each method about each story: what keeps it from being filmed is told now, not when others have been made."""
    for system in systems:
        method = build_method(system)
        for story in stories:
            method.check(story)
        method.free()


def find_systems(settings: EvaluateSettings, config: Mapping[str, Any], compose: Compose | None) -> list[System]:
    """The rows of the table: folders of films first, then methods.

    Raises:
        ValueError: if there are none, or two with one name.
    """
    folders = {_name_of(settings.films): settings.films} if isinstance(settings.films, str) else settings.films
    made = Path(settings.output) / "films"
    systems = [System(name=name, films=Path(folder)) for name, folder in (folders or {}).items()]
    chosen = settings.method
    nodes = [] if chosen is None else [(settings.label or str(chosen.get("name", "")), chosen)]
    for name in settings.methods:
        assert compose is not None, "names of methods can be looked up"
        other = compose(name)
        nodes.append((name, build_settings(EvaluateSettings, other).method or {}))
    for name, node in nodes:
        systems.append(System(name=name, films=made / name, method={**node, "name": name}))
    names = [system.name for system in systems]
    if not names:
        raise ValueError("what shall be scored? Write films=FOLDER, method=NAME or methods=[NAME,NAME]")
    if wrong := [name for name in names if not _SYSTEM.fullmatch(name)]:
        raise ValueError(f"a system cannot be called {wrong[0]!r}, which names no folder: write films={{NAME: FOLDER}}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two systems are called {twice[0]}: name folders of films as films={{NAME: FOLDER}}")
    return systems


def _name_of(films: str) -> str:
    """The name of a system whose films lie in this folder, or where this mapping file says."""
    path = Path(os.path.abspath(films))
    if path.name == MAPPING:
        return path.parent.name
    return path.stem if path.suffix.lower() in MAPPING_SUFFIXES else path.name


def plan(systems: Sequence[System], stories: Sequence[Story]) -> str:
    """What will be scored and what made: for each system the film of each story, and each shot that is missing.

    Raises:
        ValueError: as `find_all`.
    """
    shots = sum(len(story.shots) for story in stories)
    lines = [f"{len(stories)} stories, {shots} shots"]
    for system in systems:
        there = find_all(system.films, stories) if system.films.exists() or system.method is None else None
        films = () if there is None else there.films
        found = sum(shot.path is not None for film in films for shot in film.shots)
        lines.append(f"{system.name}: {found} of {shots} shots in {system.films}")
        if system.method is not None:
            lines[-1] += "; the others will be made"
        elif there is not None:
            lines += _films_found(there, stories)
    return "\n".join(lines)


def _films_found(there: Films, stories: Sequence[Story]) -> Iterator[str]:
    for story, film in zip(stories, there.films, strict=True):
        if film.folder is not None:
            name = film.folder.relative_to(there.root) if film.folder.is_relative_to(there.root) else film.folder
            where = there.root.name if str(name) == "." else name
            yield f"  {story.title}: {where}" + (f", {film.layout}" if film.layout else "")
        yield from (f"  {story.title}: {reason}" for reason in dict.fromkeys(s.reason for s in film.shots) if reason)
        if film.ignored:
            yield f"  {story.title}: no shots are {_listed(film.ignored)}"
    if there.unused:
        yield f"  of no story: {_listed(there.unused)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def build_method(system: System) -> Method:
    """The method of a system, which loads its models when they are needed."""
    from hydra.utils import instantiate

    method = instantiate(system.method, _convert_="all")
    if not callable(getattr(method, "make", None)):
        raise ValueError(f"{system.name}: method must be a _target_ of a class with check, make and free")
    return method


def make_films(system: System, stories: Sequence[Story]) -> None:
    """The films of a method."""
    method = build_method(system)
    for number, story in enumerate(stories, start=1):
        say(f"{system.name}: film {number} of {len(stories)}, {story.title}")
        method.make(story, system.films / story.slug)
    method.free()


def build_metrics(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics by name.

    Raises:
        ValueError: if there is none or two have a column of one name.
    """
    from hydra.utils import instantiate

    from storymem.evaluation.metric import Metric

    metrics = {name: instantiate(node, _convert_="all") for name, node in nodes.items()}
    if not metrics:
        raise ValueError("metrics: there are none; write metrics=[stbench] or metrics=[stbench,identity-clip]")
    if other := [name for name, metric in metrics.items() if not isinstance(metric, Metric)]:
        raise ValueError(f"metrics.{other[0]}: must be a _target_ of a class of storymem.evaluation.metric.Metric")
    columns = [column.name for metric in metrics.values() for column in metric.columns]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"metrics: two of them measure {twice[0]}; leave one out")
    return metrics


def score(
    systems: Sequence[System],
    stories: Sequence[Story],
    metrics: Mapping[str, Metric],
    measured: Mapping[str, Any],
    output: Path,
    workers: Workers,
) -> dict[str, list[StoryResult]]:
    """Score this worker's share and wait for the others.

    Args:
        systems: whose films.
        stories: what they tell.
        metrics: what is measured.
        measured: ``metric_settings(metrics)``.
        output: where results lie, ``stories/<system>/<story>.json``.
        workers: who scores what.

    Returns:
        system -> a result for each story, in their order; empty for all workers but the first.
    """
    from storymem.evaluation.scoring import read_result

    jobs = [
        (system, story, film)
        for system in systems
        for story, film in zip(stories, find_films(system.films, stories), strict=True)
    ]
    share = workers.share(jobs)
    for number, (system, story, film) in enumerate(share, start=1):
        say(f"scoring {number} of {len(share)}: {system.name}, {story.title}")
        score_one(story, film, metrics, measured, output / "stories" / system.name)
    workers.wait_for_all()
    results: dict[str, list[StoryResult]] = {system.name: [] for system in systems}
    for system, story, _ in jobs if workers.is_first else ():
        path = output / "stories" / system.name / f"{story.slug}.json"
        if (result := read_result(path)) is None:
            raise FileError(f"{path} was written and cannot be read back: run the same command again")
        results[system.name].append(result)
    return results


def score_one(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], measured: Mapping[str, Any], folder: Path
) -> None:
    """Score a film unless that was done; its pictures (``<story>/<shot>.jpg``) are written first, its result last.

    Of older pictures those are removed that the result before names; whatever else lies there stays.
    """
    from storymem.evaluation.scoring import picture_name, read_result, result_key, score_film

    key, path = result_key(story, film, measured), folder / f"{story.slug}.json"
    before = read_result(path)
    if before is not None and before.key == key and not before.faults:
        if before.folder != (where := None if film.folder is None else str(film.folder)):
            replace(before, folder=where).write(path)  # the same film elsewhere
        return
    result, strips = score_film(story, film, metrics, key)
    for fault in result.faults:
        say(f"{story.title}: {fault}")
    pictures = folder / story.slug
    with naming_full_disk(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    remove_leftovers(pictures)
    for index, strip in strips.items():
        write_atomically(pictures / picture_name(index), strip)
    replace(result, metrics=dict(measured)).write(path)
    for name in () if before is None else before.pictures:
        if name not in result.pictures and Path(name).name == name:
            (pictures / name).unlink(missing_ok=True)


def report(results: Results, output: Path) -> None:
    """Write ``results.json``, ``.csv``, ``.md``, ``.tex`` and the page ``index.html``, and print the table."""
    from storymem.evaluation.page import write_page
    from storymem.evaluation.tables import csv_lines, latex, markdown, results_json

    text = markdown(results)
    files = {
        "results.json": results_json(results),
        "results.csv": csv_lines(results),
        "results.md": text,
        "results.tex": latex(results),
    }
    for name, content in files.items():
        write_text(output / name, content)
    page = write_page(results, output)
    print(text)
    if results.banner is not None:
        say(f"\033[1;31m{results.banner}\033[0m" if sys.stderr.isatty() else results.banner)
    say(f"the page: {page}")


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr, flush=True)
