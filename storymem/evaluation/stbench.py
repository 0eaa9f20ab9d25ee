"""From a composed ``eval_stbench.yaml`` to tables: make films if need be, score them, put the results together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings
from storymem.evaluation.films import FilmFiles, find_films, stories_of
from storymem.evaluation.statistics import StatisticsSettings
from storymem.evaluation.workers import Workers
from storymem.io import write_atomically
from storymem.modes import FirstShot
from storymem.settings import MemorySettings
from storymem.story import Story
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings

if TYPE_CHECKING:
    from storymem.evaluation.methods import Method
    from storymem.evaluation.metric import Metric
    from storymem.evaluation.results import Results
    from storymem.evaluation.scoring import StoryResult

Compose = Callable[[str], Mapping[str, Any]]
"""Name of a method or an experiment -> the whole configuration with it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StbenchSettings:
    """Which stories: all of a folder, or those that ``only`` names by title, slug or file."""

    stories: str = "st_bench/stories"
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings:
    """Everything ``scripts/eval_stbench.py`` can be told.

    Args:
        films: a folder with the films of one system, or name -> folder for several.
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
    films: str | dict[str, str] | None = None
    method: dict[str, Any] | None = None
    methods: tuple[str, ...] = ()
    label: str | None = None
    stbench: StbenchSettings = field(default_factory=StbenchSettings)
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    output: str = "results/stbench"
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
    made again as long as nothing that decides it has changed, so the same command goes on after a kill.

    Args:
        config: of ``configs/eval_stbench.yaml``.
        compose: looks up the names in ``methods``; without it there must be none.
    """
    settings = build_settings(EvaluateSettings, config)
    stories = stories_of(settings.stbench.stories, settings.stbench.only)
    systems = find_systems(settings, config, compose)
    for system in systems:
        if system.method is None:
            find_films(system.films, stories)
    if settings.dry_run:
        print(plan(systems, stories))
        return None
    from storymem.evaluation.results import summarise
    from storymem.evaluation.scoring import metric_settings

    workers = Workers.of_environment()
    workers.begin()
    try:
        for system in systems:
            if system.method is not None:
                make_films(system, workers.share(stories))
        workers.wait_for_all()  # films are shared out anew to be scored
        metrics = build_metrics(settings.metrics)
        measured = metric_settings(metrics)
        results = score(systems, stories, metrics, measured, Path(settings.output), workers)
    finally:
        workers.end()
    if not workers.is_first:
        return None
    columns = [column for metric in metrics.values() for column in metric.columns]
    summary = summarise(
        results,
        metrics=measured,
        columns=columns,
        settings=settings.statistics,
        stories={"folder": settings.stbench.stories, "titles": [story.title for story in stories]},
        systems={system.name: {"films": str(system.films), "method": system.method} for system in systems},
    )
    report(summary, Path(settings.output))
    return summary


def find_systems(settings: EvaluateSettings, config: Mapping[str, Any], compose: Compose | None) -> list[System]:
    """The rows of the table: folders of films first, then methods.

    Raises:
        ValueError: if there are none, or two with one name.
    """
    folders = {Path(settings.films).name: settings.films} if isinstance(settings.films, str) else settings.films
    made = Path(settings.output) / "films"
    systems = [System(name=name, films=Path(folder)) for name, folder in (folders or {}).items()]
    nodes = [] if settings.method is None else [(settings.label or settings.method["name"], settings.method)]
    for name in settings.methods:
        assert compose is not None, "names of methods can be looked up"
        other = compose(name)
        nodes.append((name, build_settings(EvaluateSettings, other).method or {}))
    for name, node in nodes:
        systems.append(System(name=name, films=made / name, method={**node, "name": name}))
    names = [system.name for system in systems]
    if not names:
        raise ValueError("what shall be scored? Write films=FOLDER, method=NAME or methods=[NAME,NAME]")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two systems are called {twice[0]}: name folders of films as films={{NAME: FOLDER}}")
    return systems


def plan(systems: Sequence[System], stories: Sequence[Story]) -> str:
    """What would be scored and what made, a line a system, and each shot that is missing."""
    shots = sum(len(story.shots) for story in stories)
    lines = [f"{len(stories)} stories, {shots} shots"]
    for system in systems:
        there = find_films(system.films, stories) if system.films.is_dir() else []
        found = sum(shot.path is not None for film in there for shot in film.shots)
        lines.append(f"{system.name}: {found} of {shots} shots in {system.films}")
        if system.method is not None:
            lines[-1] += "; the others will be made"
            continue
        for story, film in zip(stories, there, strict=True):
            lines += [f"  {story.title}: {reason}" for reason in dict.fromkeys(s.reason for s in film.shots) if reason]
    return "\n".join(lines)


def make_films(system: System, stories: Sequence[Story]) -> None:
    """The films of a method; all stories are checked before the first is filmed."""
    from hydra.utils import instantiate

    method: Method = instantiate(system.method, _convert_="all")
    for story in stories:
        method.check(story)
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

    metrics = {name: instantiate(node, _convert_="all") for name, node in nodes.items()}
    if not metrics:
        raise ValueError("metrics: there are none; write metrics=stbench or metrics=[stbench,identity-clip]")
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
        result = read_result(output / "stories" / system.name / f"{story.slug}.json")
        assert result is not None, story.slug
        results[system.name].append(result)
    return results


def score_one(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], measured: Mapping[str, Any], folder: Path
) -> None:
    """Score a film unless that was done; its pictures (``<story>/<shot>.jpg``) are written first, its result last."""
    from storymem.evaluation.scoring import read_result, result_key, score_film

    key, path = result_key(story, film, measured), folder / f"{story.slug}.json"
    before = read_result(path)
    if before is not None and before.key == key:
        return
    result, strips = score_film(story, film, metrics, key)
    pictures = folder / story.slug
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.jpg"):
        old.unlink()
    for index, strip in strips.items():
        write_atomically(pictures / f"{index + 1:02d}.jpg", strip)
    result.write(path)


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
        write_atomically(output / name, content.encode())
    page = write_page(results, output)
    print(text)
    say(f"the page: {page}")


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr, flush=True)
