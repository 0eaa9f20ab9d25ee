"""Training as a command: whatever ends it, it ends soon with a message, and resumes to the same adapter."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from storymem.data.cache import LatentCache
from storymem.data.manifest import read_checked, write_checked
from storymem.io import FileError, hash_file
from storymem.training.checkpoints import Checkpoints
from storymem.training.method import ExpertTraining
from storymem.wan.shots import WanShotGenerator
from tests import stories
from tests.training.commands import SCRIPT, TRAIN, Command, prepare_set, train
from tests.training.tiny import read_metrics

pytestmark = pytest.mark.trains_in_forks

TIMED = ("seconds_", "samples_per_second", "peak_gb")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged, without what differs from one run to the next."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read_metrics(folder)]


def same(one: Path, other: Path) -> None:
    """Raise unless two finished runs have logged and exported the same."""
    assert rows(one) == rows(other)
    adapters = [load_file(folder / "storymem" / "high_noise.safetensors") for folder in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.fixture(scope="module")
def whole(training_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, printed = train(f"dataset={training_set}", f"output={folder}", folder=folder.parent)
    assert status == 0, printed
    return folder


def clip_shard(folder: Path) -> Path:
    """The shard with the clips' latents."""
    shards = folder.rglob("shard-*.safetensors")
    return next(path for path in shards if any(name.endswith("/video") for name in load_file(path)))


def damaged(training_set: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a training set with one byte of its clips changed, and the file in question."""
    copy = folder / "set"
    shutil.copytree(training_set, copy)
    shard = clip_shard(copy)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 255
    shard.write_bytes(content)
    return copy, shard


def spoilt_from(call: int) -> Callable[[], None]:
    """Lets clips be read as damaged from the ``call``-th on."""
    true, count = LatentCache.video, 0

    def video(self: LatentCache, index: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count >= call:
            raise FileError("shard-w000-00000.safetensors is damaged")
        return true(self, index)

    return lambda: setattr(LatentCache, "video", video)


def test_an_error_of_a_reader_costs_no_step(training_set: Path, whole: Path, tmp_path: Path) -> None:
    arguments = (f"dataset={training_set}", f"output={tmp_path / 'run'}", "batch.workers=1")
    status, printed = train(*arguments, folder=tmp_path, before=spoilt_from(11))
    assert (status, "shard-w000-00000.safetensors is damaged" in printed) == (2, True), printed
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=2).steps() == [3, 5]
    assert train(*arguments, folder=tmp_path)[0] == 0
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_reader_ends_the_run_with_a_message(training_set: Path, tmp_path: Path, workers: int) -> None:
    copy, shard = damaged(training_set, tmp_path)
    command = Command(f"dataset={copy}", f"output={tmp_path / 'run'}", f"batch.workers={workers}", folder=tmp_path)
    assert command.wait(20) == 2, command.printed
    assert f"{shard} is damaged" in command.printed
    assert "Traceback" not in command.printed


@pytest.mark.slow
def test_the_interpreter_ends_after_an_error_of_a_reader(training_set: Path, tmp_path: Path) -> None:
    copy, shard = damaged(training_set, tmp_path)
    command = [sys.executable, str(SCRIPT), *TRAIN, f"dataset={copy}", f"output={tmp_path / 'run'}", "batch.workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, f"{shard} is damaged" in done.stderr) == (2, True)


def once_slow(cls: type, name: str, calls: int) -> Callable[[], None]:
    """Lets the method ``name`` of ``cls`` hang from its ``calls``-th call on."""
    true, count = getattr(cls, name), 0

    def slow(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            print("hanging", file=sys.stderr)
            time.sleep(60)
        return true(self, *arguments)

    return lambda: setattr(cls, name, slow)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGUSR1, 2)])
def test_a_signal_while_waiting_for_data_saves_and_ends(
    training_set: Path, whole: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    run = tmp_path / "run"
    arguments = (f"dataset={training_set}", f"output={run}", f"batch.workers={workers}")
    command = Command(*arguments, folder=tmp_path, before=once_slow(LatentCache, "video", 8))
    # Of two readers one may be far behind the other when both hang.
    command.until_it_prints("hanging", *(["step 4 of"] if workers < 2 else []))
    os.kill(command.pid, number)
    assert command.wait(10) == 128 + number, command.printed
    assert "the same command resumes" in command.printed
    assert workers == 2 or Checkpoints(run / "checkpoints", keep=2).steps() == [3, 4]
    assert train(*arguments, folder=tmp_path)[0] == 0
    same(run, whole)


def slowly(cls: type, name: str, seconds: float) -> Callable[[], None]:
    """Lets each call of a method take longer."""
    true = getattr(cls, name)

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return true(self, *arguments)

    return lambda: setattr(cls, name, slow)


def test_a_signal_in_a_validation_saves_and_the_validation_is_made_up_for(training_set: Path, tmp_path: Path) -> None:
    arguments = (f"dataset={training_set}", "steps=2", "validation.every=1", "validation.samples=8")
    command = Command(
        *arguments, f"output={tmp_path / 'run'}", folder=tmp_path, before=slowly(ExpertTraining, "evaluate", 1.0)
    )
    command.until_it_prints("step 1 of 2")
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(10) == 143, command.printed
    assert [set(row) >= {"loss"} for row in read_metrics(tmp_path / "run")] == [True]
    for name in ("run", "whole"):
        assert train(*arguments, f"output={tmp_path / name}", folder=tmp_path)[0] == 0
    same(tmp_path / "run", tmp_path / "whole")
    assert sum("valid_loss_high_noise" in row for row in rows(tmp_path / "run")) == 2


def test_a_signal_during_a_sample_film_saves_and_the_film_is_regenerated(training_set: Path, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(stories.TWO_SHOTS)
    arguments = (
        *(f"dataset={training_set}", "steps=2", "samples.every=1", f"samples.story={tmp_path / 'story.yaml'}"),
        *("scorer/clip=tiny", "scorer/quality=none", "sampler.steps=4"),
    )
    command = Command(
        *arguments, f"output={tmp_path / 'run'}", folder=tmp_path, before=slowly(WanShotGenerator, "generate", 0.5)
    )
    command.until_it_prints("step 1 of 2")
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(10) == 143, command.printed
    assert not (tmp_path / "run" / "samples" / "step_00000001.png").exists()
    for name in ("run", "whole"):
        status, printed = train(*arguments, f"output={tmp_path / name}", folder=tmp_path)
        assert status == 0, printed
    same(tmp_path / "run", tmp_path / "whole")
    assert sum("cross_shot" in row for row in rows(tmp_path / "run")) == 2


def test_what_a_callback_lacks_costs_no_step(training_set: Path, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(stories.TWO_SHOTS)
    arguments = (f"dataset={training_set}", f"output={tmp_path / 'run'}", "steps=2")
    samples = ("scorer/clip=tiny", "scorer/quality=none", "samples.every=1", f"samples.story={tmp_path}/story.yaml")

    def fail() -> None:
        def generate(*_: Any) -> None:
            raise FileError("no room for a film")

        WanShotGenerator.generate = generate  # type: ignore[method-assign, assignment]

    assert train(*arguments, *samples, folder=tmp_path, before=fail)[0] == 2
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=2).steps() == [1]
    assert train(*arguments, folder=tmp_path)[0] == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


KILLED_AT = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def killed_at(call: int) -> Callable[[], None]:
    """Lets the process be killed right before the ``call``-th change that it makes to a file system."""

    def prepare() -> None:
        count = 0

        def mortal(true: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return true(*arguments, **named)

            return counting

        for name in KILLED_AT:
            setattr(os, name, mortal(getattr(os, name)))

    return prepare


def run_to_the_end(arguments: tuple[str, ...], folder: Path) -> None:
    status, printed = train(*arguments, folder=folder)
    assert status == 0, printed
    left = [path.name for path in (folder / "run").rglob(".*") if path.name != ".lock"]
    assert left == []


@pytest.mark.parametrize("calls", [(4, 12, 23), pytest.param(range(1, 300, 2), marks=pytest.mark.slow)])
def test_killed_at_any_change_on_disk_it_resumes_to_the_same_adapter(
    training_set: Path, tmp_path: Path, calls: Sequence[int]
) -> None:
    def arguments(name: str) -> tuple[str, ...]:
        return (f"dataset={training_set}", f"output={tmp_path / name / 'run'}", "steps=3", *every)

    every = ("checkpoint.every=1", "checkpoint.keep=1")
    run_to_the_end(arguments("whole"), tmp_path / "whole")
    survived = False
    for number in calls:
        name = f"killed_{number}"
        command = Command(*arguments(name), folder=tmp_path / name, before=killed_at(number))
        survived = command.wait() == 0
        if survived:
            break
        run_to_the_end(arguments(name), tmp_path / name)
        same(tmp_path / name / "run", tmp_path / "whole" / "run")
    assert survived == (len(calls) > 3)


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_same_adapter(training_set: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> tuple[str, ...]:
        return (f"dataset={training_set}", f"output={tmp_path / name / 'run'}", "steps=120", *every)

    every = ("checkpoint.every=2", "optimizer.schedule=cosine", "optimizer.ema_decay=0.9")
    run_to_the_end(arguments("whole"), tmp_path / "whole")
    drawn = random.Random(0)
    for _ in range(30):
        command = Command(*arguments("killed"), folder=tmp_path / "killed")
        time.sleep(0.4 + 0.8 * drawn.random())
        os.kill(command.pid, signal.SIGKILL)
        if command.wait() == 0:
            break
    run_to_the_end(arguments("killed"), tmp_path / "killed")
    same(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


def test_two_processes_do_not_train_in_one_folder(training_set: Path, whole: Path, tmp_path: Path) -> None:
    arguments = (f"dataset={training_set}", f"output={tmp_path / 'run'}", "batch.workers=1")
    first = Command(*arguments, folder=tmp_path / "first", before=once_slow(LatentCache, "video", 8))
    first.until_it_prints("step 4 of")
    status, printed = train(*arguments, folder=tmp_path / "second")
    assert (status, "another process is training in" in printed) == (2, True), printed
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 143
    assert train(*arguments, folder=tmp_path / "second")[0] == 0
    same(tmp_path / "run", whole)


def limited(bytes_: int) -> Callable[[], None]:
    """Lets no file grow larger."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def test_write_errors_are_reported_and_nothing_is_lost(training_set: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (f"dataset={training_set}", f"output={run}")
    assert train(*arguments, "steps=3", folder=tmp_path)[0] == 0
    size = max(path.stat().st_size for path in (run / "checkpoints").rglob("*.safetensors"))
    status, printed = train(*arguments, folder=tmp_path, before=limited(size - 1))
    assert status == 2, printed
    assert re.search(
        r"step_00000006\S* could not be written: the file is larger.* run the same command again", printed
    ), printed
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003"]
    assert train(*arguments, folder=tmp_path)[0] == 0
    same(run, whole)


def test_files_obey_the_umask(whole: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) >= 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def poison(folder: Path) -> None:
    """Put a NaN into a clip's latents, and the recorded size and hash with it."""
    shard = clip_shard(folder)
    tensors = {key: tensor.clone() for key, tensor in load_file(shard).items()}
    next(tensor for key, tensor in tensors.items() if key.endswith("/video"))[0, 0, 0, 0] = float("nan")
    save_file(tensors, shard)
    cache = read_checked(shard.with_name("cache.json"))
    cache["shards"][shard.stem] = [shard.stat().st_size, hash_file(shard)]
    write_checked(shard.with_name("cache.json"), cache)


def test_the_advice_about_a_clip_with_nan_works(training_set: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("set", "videos"):
        shutil.copytree(training_set.parent / name, tmp_path / name)
    poison(tmp_path / "set")
    arguments = (f"dataset={tmp_path / 'set'}", f"output={tmp_path / 'run'}")
    status, printed = train(*arguments, folder=tmp_path)
    assert status == 2, printed
    assert re.search(r"step \d+: (latents|keyframe 0) of clip \d/\d\.mp4@0.000: NaN", printed), printed
    for file in re.findall(r"\S+\.safetensors", printed):
        Path(file).unlink()
    prepare_set(tmp_path)
    assert train(*arguments, folder=tmp_path)[0] == 0
    same(tmp_path / "run", whole)
