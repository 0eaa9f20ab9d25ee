"""All films of a run, and control films made of them: divided among processes, scored, and read back."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from storymem.evaluation.controls import Control
from storymem.evaluation.films import find_films
from storymem.evaluation.metric import Metric
from storymem.evaluation.results import INDEPENDENT
from storymem.evaluation.scoring import Job, StoryResult, read_result, score
from storymem.evaluation.workers import from_first
from storymem.io import FileError
from storymem.story import Story
from storymem.wan.processes import Launch


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
) -> dict[tuple[str, str | None], list[StoryResult]]:
    """Score this process's share of the films and wait for the others.

    Returns:
        by `Job.row`, a result for each of its jobs, in order; nothing in all processes but the first.
    """
    share = launch.share(jobs)
    for number, job in enumerate(share, start=1):
        what = job.system if job.control is None else f"{job.system}, {job.control.title.lower()}"
        print(f"scoring {number} of {len(share)}: {what}, {job.story.title}", file=sys.stderr, flush=True)
        score(job, metrics, measured)
    from_first(None)
    results: dict[tuple[str, str | None], list[StoryResult]] = {}
    for job in jobs if launch.team == 0 else ():
        if (result := read_result(job.path)) is None:
            raise FileError(f"{job.path} was written and cannot be read back: run the same command again")
        results.setdefault(job.row, []).append(result)
    return results
