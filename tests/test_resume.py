"""``kill -9`` at any moment loses at most the shot in the making, and the film comes out the same to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from storymem.film import Film, FilmError
from storymem.story import Story
from tests.stories import FOUR_SHOTS, all_frames, single_thread, story, storyteller

KILLS = 8


def in_a_child(continuity: str, told: Story, folder: Path) -> int:
    """Start telling in a forked child, which has all imports done; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            storyteller(continuity).tell(told, folder)
            status = 0
        finally:
            os._exit(status)
    return child


def finished_shots(folder: Path) -> int:
    return len(Film.open(folder).shots) if Film.exists(folder) else 0


@pytest.mark.parametrize(
    "continuity", ["mi2v", *(pytest.param(other, marks=pytest.mark.slow) for other in ("none", "mm2v"))]
)
def test_a_killed_film_is_gone_on_with_and_ends_the_same(tmp_path: Path, continuity: str) -> None:
    single_thread()
    told = story(tmp_path, FOUR_SHOTS)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(continuity, told, tmp_path / "whole"), 0)[1]) == 0
    whole = time.monotonic() - started

    chance, kills, folder = random.Random(continuity), 0, tmp_path / "killed"
    while kills < KILLS:
        before = finished_shots(folder)
        child = in_a_child(continuity, told, folder)
        time.sleep(chance.uniform(0.02, 0.45) * whole)
        os.kill(child, signal.SIGKILL)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert finished_shots(folder) >= before
        kills += died
        if not died or finished_shots(folder) == len(told.shots):
            # The film was finished before its kills were: make its second half again, and go on killing.
            storyteller(continuity).tell(told, folder)
            folder.rename(tmp_path / f"finished_{kills}")
    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(continuity, told, folder), 0)[1]) == 0

    expected = all_frames(tmp_path / "whole")
    for ended in [folder, *tmp_path.glob("finished_*")]:
        assert all_frames(ended) == expected
        assert told_of(ended) == told_of(tmp_path / "whole")
        assert not list(ended.rglob("*.partial"))


def told_of(folder: Path) -> dict:
    """The manifest without its timings."""
    manifest = json.loads((folder / "film.json").read_text())
    del manifest["seconds"]
    for shot in manifest["shots"]:
        del shot["seconds"]
    return manifest


def test_a_second_process_on_one_folder_is_refused(tmp_path: Path) -> None:
    single_thread()
    told = story(tmp_path, FOUR_SHOTS)
    child = in_a_child("none", told, tmp_path / "film")
    try:
        while not (tmp_path / "film" / "film.json").exists():
            time.sleep(0.01)
        with pytest.raises(FilmError, match="another process is making the film"):
            storyteller("none").tell(told, tmp_path / "film")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert storyteller("none").tell(told, tmp_path / "film").video is not None
