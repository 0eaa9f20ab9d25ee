"""``kill -9`` at any moment loses at most the current take, and the finished film is the same; full disks, signals."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from storymem.commands.cli import main
from storymem.film.folder import Film, edited_film
from storymem.film.generate import generate_films
from storymem.film.manifest import Take
from storymem.film.matching import stale
from storymem.io import FileError, hash_file
from storymem.memory import MemoryBank
from storymem.memory.bank import read_entries
from tests.composing import SMALL, composed
from tests.stories import FOUR_SHOTS, TWO_SHOTS, content, single_thread, story, storyteller

THREE_SHOTS = """\
title: Three
overview: A short walk.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
      - {prompt: "A cat sits on a wall."}
"""
EDITED = """\
title: Edited
overview: A short walk.
scenes:
  - shots:
      - {prompt: "A cat sits on a wall."}
      - {prompt: "A dog walks out of a door."}
      - {prompt: "A fox runs.", cut: false}
"""
KILLS = 5  # of a new film, and as many of one that is regenerated
_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}


def in_a_child(
    work: Callable[[], Any], *, kill_at: int | None = None, folder: Path | None = None, kill_after: float | None = None
) -> int:
    """Do ``work`` in a forked child, which has all imports done, and return its exit status.

    Args:
        work: what to do.
        kill_at: the child is killed just before this change of files in ``folder``, counted from 1.
        folder: other changes do not count.
        kill_after: the child is killed after so many seconds.
    """
    child = os.fork()
    if child == 0:
        changes = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if (event in _WRITES or writes) and str(arguments[0]).startswith(str(folder)):
                changes += 1
                if changes == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_at is not None:
            sys.addaudithook(watch)
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(folder: Path) -> Film:
    """The film in a folder, which opens and has every file as it was written."""
    film = Film.open(folder)
    film.check()
    for shot in film.shots:
        film.last_frames(shot.index, 5)
    if (folder / "memory.json").exists():  # after the first shot it may have another name yet
        MemoryBank.load(folder)
    return film


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_killed_film_is_resumed_and_ends_the_same(tmp_path: Path) -> None:
    single_thread()
    story(tmp_path, THREE_SHOTS)
    chance = random.Random(16)

    def command(name: str, *overrides: str) -> Callable[[], Any]:
        chosen = ("first_shot=m2v", *overrides)  # one pair of networks is loaded sooner than two
        config = composed(f"story={tmp_path}/story.yaml", f"output={tmp_path / name}", *SMALL, *chosen)
        return lambda: generate_films(config)

    def kill(name: str, *overrides: str) -> None:
        moment = chance.randint(1, 60)  # a shot is about 40 changes
        assert in_a_child(command(name, *overrides), kill_at=moment, folder=tmp_path / name) in (-signal.SIGKILL, 0)

    assert in_a_child(command("whole")) == 0
    expected = content(tmp_path / "whole")
    for _ in range(KILLS):
        kill("film")
        assert not Film.exists(tmp_path / "film") or whole(tmp_path / "film")
    assert in_a_child(command("film")) == 0
    assert content(tmp_path / "film") == expected
    assert names(tmp_path / "film") == names(tmp_path / "whole")

    again = ["seed=7", "resume=from_shot:2"]
    for _ in range(KILLS):
        kill("film", *again)
        film = whole(tmp_path / "film")
        assert (tmp_path / "film" / "film.mp4").is_file(), "the old one, until there is another"
        if [shot.seed for shot in film.shots] == [0, 1, 2]:
            assert content(tmp_path / "film") == expected
        else:
            again = ["seed=7"]
    assert in_a_child(command("film", *again)) == 0
    assert in_a_child(command("whole", "seed=7", "resume=from_shot:2")) == 0
    assert content(tmp_path / "film") == content(tmp_path / "whole") != expected
    assert names(tmp_path / "film") == names(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("continuity", "first"), [("none", 1), ("mi2v", 3), ("mm2v", 5)])
def test_killed_before_a_change_of_a_file_nothing_is_lost(tmp_path: Path, continuity: str, first: int) -> None:
    single_thread()
    loaded = story(tmp_path, THREE_SHOTS)

    def tell(name: str, *, seed: int = 0, resume: str = "auto") -> Callable[[], Any]:
        return lambda: storyteller(continuity, seed=seed).tell(loaded, tmp_path / name, resume=resume)

    assert in_a_child(tell("whole")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    assert in_a_child(tell("again", seed=7, resume="from_shot:2")) == 0
    for moment in count(first, 7):
        folder = tmp_path / f"new_{moment}"
        status = in_a_child(tell(folder.name), kill_at=moment, folder=folder)
        assert not Film.exists(folder) or whole(folder)
        assert in_a_child(tell(folder.name)) == 0
        assert content(folder) == content(tmp_path / "whole")
        assert names(folder) == names(tmp_path / "whole")
        if status == 0:
            break
    for moment in count(first, 7):
        folder = tmp_path / f"again_{moment}"
        shutil.copytree(tmp_path / "whole", folder)
        status = in_a_child(tell(folder.name, seed=7, resume="from_shot:2"), kill_at=moment, folder=folder)
        resume = "auto"
        if [shot.seed for shot in whole(folder).shots] == [0, 1, 2]:
            resume = "from_shot:2"
            assert in_a_child(tell(folder.name)) == 0
            assert content(folder) == content(tmp_path / "whole")
            assert names(folder) == names(tmp_path / "whole")
        assert in_a_child(tell(folder.name, seed=7, resume=resume)) == 0
        assert content(folder) == content(tmp_path / "again")
        assert names(folder) == names(tmp_path / "again")
        if status == 0:
            break


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_over_takes_choices_edits_and_cleaning_lose_no_take(tmp_path: Path, kills: int) -> None:
    single_thread()
    chance, folder = random.Random(kills), tmp_path / "film"
    stories = [story(tmp_path / name, text) for name, text in {"a": THREE_SHOTS, "b": EDITED}.items()]

    def tell(**how: Any) -> Callable[[], Any]:
        loaded = chance.choice(stories)
        return lambda: storyteller().tell(loaded, folder, **how)

    def choose(shot: int, take: int) -> None:
        with edited_film(folder) as film:
            film.show(shot, take)

    def clean() -> None:
        with edited_film(folder) as film:
            film.clean()

    storyteller().tell(stories[0], folder)
    for number in range(kills):
        before = Film.open(folder)
        takes = [(index, take.take) for index in range(len(before.slots)) for take in before.takes_of(index)]
        works = [
            *(tell(), tell(shot=str(chance.randint(1, 3))), tell(shot=str(chance.randint(1, 3)), following=True)),
            *(partial(choose, *chance.choice(takes)), partial(choose, *chance.choice(takes)), clean),
        ]
        work = works[number % len(works)]
        if number % 2:
            in_a_child(work, kill_at=chance.randint(1, 60), folder=folder)
        else:
            in_a_child(work, kill_after=chance.uniform(0, 1.5))
        after = whole(folder)
        kept = {(take.file, take.seed) for take in after.takes}
        assert kept >= {(take.file, take.seed) for take in (before.shots if work is clean else before.takes)}
        for take in after.takes:
            assert all(hash_file(folder / name) == digest for name, digest in take.sha256.items())
    assert in_a_child(tell(resume="from_shot:1")) == 0
    film = whole(folder)
    assert stale(film, read_entries(folder)) == {}
    afresh = storyteller().tell(stories[0 if film.story["title"] == "Three" else 1], tmp_path / "afresh")
    assert content(folder) == content(afresh.folder)
    clean()
    assert names(folder / "shots") == {name for t in film.shots for name in in_shots(t)}, "nothing is left behind"


def in_shots(take: Take) -> set[str]:
    """Names of a take's files and folders below shots/."""
    files = [Path(name).relative_to("shots") for name in take.sha256]
    return {str(path) for file in files for path in (file, *file.parents) if path != Path(".")}


def test_a_second_process_on_one_folder_is_refused(tmp_path: Path) -> None:
    single_thread()
    loaded = story(tmp_path, FOUR_SHOTS)
    child = os.fork()
    if child == 0:
        try:
            storyteller("none").tell(loaded, tmp_path / "film")
        finally:
            os._exit(0)
    try:
        while not (tmp_path / "film" / "film.json").exists():
            time.sleep(0.01)
        with pytest.raises(FileError, match="another process is making the film"):
            storyteller("none").tell(loaded, tmp_path / "film")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert storyteller("none").tell(loaded, tmp_path / "film").video is not None


# Disks and signals


def script(*arguments: str) -> None:
    """``storymem generate`` with these arguments."""
    sys.argv = ["generate.py", *arguments]
    main("generate")


@pytest.mark.parametrize("limit", [1500, 4000])
def test_a_full_disk_is_reported_and_the_same_command_resumes(
    tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit of the size of files stands for a full disk: both are errors of the system's write."""
    single_thread()
    story(tmp_path, TWO_SHOTS)
    arguments = [str(tmp_path / "story.yaml"), f"output={tmp_path / 'film'}", *SMALL]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        script(*arguments)

    assert in_a_child(limited) == 2
    message = capfd.readouterr().err
    assert "could not be written: the file is larger than this process may write; make room and run" in message
    assert "Traceback" not in message
    assert {path.name for path in (tmp_path / "film").rglob("*.*")} <= {".lock", "film.json"}, "nothing takes up room"
    if Film.exists(tmp_path / "film"):
        Film.open(tmp_path / "film").check()
    assert in_a_child(lambda: script(*arguments)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_within_seconds_and_the_command_that_resumes_is_named(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    single_thread()
    story(tmp_path, TWO_SHOTS)
    arguments = [str(tmp_path / "story.yaml"), f"output={tmp_path / 'film'}", *SMALL, "sampler.steps=1000"]
    child = os.fork()
    if child == 0:
        try:
            script(*arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
    while not (tmp_path / "film" / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(child, number)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert time.monotonic() - started < 5
    message = capfd.readouterr().err
    assert f"stopped by {number.name}; the same command resumes" in message
    assert "Traceback" not in message
    generate_films(composed(f"story='{tmp_path}/story.yaml'", f"output={tmp_path / 'film'}", *SMALL))
