"""All films of a run, and control films made of them: divided among processes, scored, and read back."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storymem.evaluation.controls import Control
from storymem.evaluation.films import find_films
from storymem.evaluation.layouts import FilmFiles
from storymem.evaluation.metric import Metric
from storymem.evaluation.results import INDEPENDENT
from storymem.evaluation.scoring import StoryResult, read_result, score_story
from storymem.evaluation.workers import from_first
from storymem.io import FileError
from storymem.story import Story
from storymem.wan.processes import Launch

Row = tuple[str, str | None]
"""A system, and the control if its films were altered."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A film to score.

    Args:
        system: of the film.
        story, film: what it shows, and its files.
        folder: of the result.
        control: how the film is altered; None for the film itself.
    """

    system: str
    story: Story
    film: FilmFiles
    folder: Path
    control: Control | None = None

    @property
    def row(self) -> Row:
        """Of the tables."""
        return self.system, None if self.control is None else self.control.name


def find_jobs(
    systems: Mapping[str, Path], stories: Sequence[Story], controls: Sequence[Control], output: Path
) -> list[Job]:
    """All films to score, and control films of the first system that is not ``independent``.

    Args:
        systems: name -> folder of films.
        stories: of each system.
        controls: what control films to score; none by default.
        output: folder of the results.
    """
    jobs = [
        Job(system=name, story=story, film=film, folder=output / "stories" / name)
        for name, folder in systems.items()
        for story, film in zip(stories, find_films(folder, stories).films, strict=True)
    ]
    first = next((name for name in systems if name != INDEPENDENT), INDEPENDENT)
    altered = [
        replace(job, story=story, folder=output / "controls" / first / control.name, control=control)
        for control in controls
        for job in jobs
        if job.system == first and (story := control.story(job.story)) is not None
    ]
    return jobs + altered


def score_jobs(
    jobs: Sequence[Job], metrics: Mapping[str, Metric], measured: Mapping[str, Any], launch: Launch
) -> dict[Row, list[StoryResult]]:
    """Score this process's share of the films and wait for the others.

    Returns:
        a result for each job of a row, in order; nothing in all processes but the first.
    """
    share = launch.share(jobs)
    for number, job in enumerate(share, start=1):
        what = job.system if job.control is None else f"{job.system}, {job.control.title.lower()}"
        print(f"scoring {number} of {len(share)}: {what}, {job.story.title}", file=sys.stderr, flush=True)
        score_story(job.story, job.film, metrics, measured, job.folder, job.control)
    from_first(None)
    results: dict[Row, list[StoryResult]] = {}
    for job in jobs if launch.team == 0 else ():
        path = job.folder / f"{job.story.slug}.json"
        if (result := read_result(path)) is None:
            raise FileError(f"{path} was written and cannot be read back: run the same command again")
        results.setdefault(job.row, []).append(result)
    return results
