"""Films whose shots are generated together: all takes are made at once, so there is no memory and nothing to resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from storymem.film.differences import flat, setting_changes
from storymem.film.folder import Film
from storymem.film.manifest import FilmError, film_folder
from storymem.film.progress import Progress
from storymem.film.resume import film_changes, story_record
from storymem.film.settings import estimated_bytes
from storymem.io import check_room
from storymem.story import Story
from storymem.wan.settings import VideoSettings
from storymem.wan.shots import OnStep


def make_together(
    story: Story,
    folder: str | Path,
    generate: Callable[[OnStep], Sequence[np.ndarray]],
    *,
    frames: Sequence[int],
    config: Mapping[str, Any],
    video: VideoSettings,
    seed: int,
    progress: Progress | None = None,
) -> Film:
    """Make the film of ``story`` in ``folder`` from shots that are generated in one call.

    A finished film is left as it is. An unfinished one, of a process that was killed while it wrote, is generated again
    as a whole.

    Args:
        generate: returns the frames of each shot, uint8 [F, H, W, 3]; it is not called for a finished film.
        frames: of each shot.
        config: the settings that decide what the film looks like, plain JSON types.
        video: size and rate of the shots.
        seed: of the noise.

    Raises:
        FilmError: before anything is generated, if the folder holds another film or cannot be used.
    """
    progress = progress or Progress(enabled=False)
    with film_folder(folder) as folder:
        film = _opened(folder, story_record(story), config)
        if film.is_complete:
            film.check()
        else:
            check_room(folder, sum(estimated_bytes(one, video.height, video.width) for one in frames), "the film")
            with progress.film(total=len(story.shots), finished=0, making=len(story.shots)):
                progress.begin("all shots together")
                start = time.perf_counter()
                shots = generate(progress.step)
                seconds = time.perf_counter() - start
                _write(film, shots, video.fps, seed, seconds)
                progress.end(f"{len(shots)} shots together: {seconds:.1f} s", len(shots))
        film.refresh()
    return film


def _opened(folder: Path, story: Mapping[str, Any], config: Mapping[str, Any]) -> Film:
    """The film in a folder, if it is of this story and these settings, or a new one."""
    if not Film.exists(folder):
        return Film(folder, story=story, config=config)
    film = Film.open(folder)
    check_same(film, story, config)
    film.remove_unfinished()
    return film


def check_same(film: Film, story: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ``FilmError`` if ``film`` is not of this story (its record) and these settings: what differs."""
    changes = [*film_changes(film.story, story), *setting_changes(film.config, config)]
    if flat(film.story["scenes"]) != flat(story["scenes"]):
        changes.append("its shots are not those of the story")
    if changes:
        lines = [f"{film.folder} holds another film:", *(f"  {line}" for line in changes)]
        raise FilmError("\n".join([*lines, "choose another output: its shots are generated together"]))


def _write(film: Film, shots: Sequence[np.ndarray], fps: int, seed: int, seconds: float) -> None:
    """Write a take of every shot; those of an attempt that was not finished are deleted after it."""
    again = bool(film.takes)
    for index, frames in enumerate(shots):
        take = film.write_take(index, frames, mode="t2v", seed=seed, fps=fps)
        film.add(replace(take, candidates=(), seconds={"generate": round(seconds / len(shots), 4)}))
    if again:
        film.clean()
