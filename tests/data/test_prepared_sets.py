"""A prepared set after kills, stops, damage, full disks and several runs: complete, or reported as incomplete."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from storymem.data import encoding
from storymem.data.cache import LatentCache
from storymem.data.prepare import prepare
from storymem.data.steps import Preparation
from storymem.stopping import Stopped
from tests.data.drawn_clips import scene, video
from tests.data.killing import count_changes, run_killed
from tests.data.preparing import config, contents, rejected, same, train_on
from tests.forking import fork

EACH_ALONE = "cache.shard_mb=0.001"  # every clip in a shard of its own: more moments to die at


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos and their set, made without any trouble; beside it ``grouped``, a set before its last step."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(5):
        video(folder / "videos" / f"clip{number}.mp4", scene(number, 12), caption=f"Tiles {number % 3}.")
    prepare(config(folder, EACH_ALONE, "steps=[split,check,embed,group]"))
    shutil.copytree(folder / "set", folder / "grouped")
    prepare(config(folder, EACH_ALONE))
    return folder


@pytest.fixture(scope="module")
def expected(prepared: Path) -> dict[str, Any]:
    cache = LatentCache.open(prepared / "set")
    assert len(cache) == 5
    return contents(cache)


def copy_of(folder: Path, to: Path) -> Path:
    """A set in a place of its own; files keep their times, as when a whole disk is copied."""
    return Path(shutil.copytree(folder, to))


def finish(prepared: Path, output: Path, *overrides: str) -> LatentCache:
    """The same command again, and what it reports as finished must be there for a training."""
    cache = prepare(config(prepared, EACH_ALONE, f"output={output}", *overrides))
    assert cache is not None
    train_on(output)
    return cache


def die_and_resume(prepared: Path, output: Path, expected: dict[str, Any], moments: list[int]) -> None:
    """Kill the command at each of ``moments``, one run after the other, and then let it end."""
    work = partial(prepare, config(prepared, EACH_ALONE, f"output={output}"))
    for at in moments:
        assert run_killed(work, output, at) in (0, -signal.SIGKILL)
    assert same(contents(finish(prepared, output)), expected), f"killed at {moments}"
    assert not [path for path in output.rglob("*") if path.name.endswith(".partial") or path.name.startswith(".tmp")]
    (manifest,) = output.glob("cache/*/tensors-000.jsonl")
    shards = {path.with_suffix("").name for path in output.rglob("*.safetensors")}
    recorded = {json.loads(line).get("shard") for line in manifest.read_text().splitlines() if line.endswith("}")}
    assert shards <= recorded, "no shard is left without its record"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_killed_while_it_caches_ends_with_the_same_set(
    prepared: Path, tmp_path: Path, expected: dict[str, Any], seed: int
) -> None:
    output = copy_of(prepared / "grouped", tmp_path / "set")
    die_and_resume(prepared, output, expected, random.Random(seed).sample(range(80), 2))


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(prepared: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    work = partial(prepare, config(prepared, EACH_ALONE, f"output={tmp_path / 'counted'}"))
    total = count_changes(work, tmp_path / "counted")
    assert total > 100
    for at in range(0, total, 5):
        die_and_resume(prepared, tmp_path / f"set{at}", expected, [at])
    draw = random.Random(0)
    for number in range(5):
        die_and_resume(prepared, tmp_path / f"chain{number}", expected, draw.sample(range(total), 4))


def test_a_set_without_its_blank_videos_is_not_finished(
    prepared: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    output = copy_of(prepared / "set", tmp_path / "set")
    shards = output.rglob("shard-*.safetensors")
    (blank,) = [path for path in shards if any("blank" in name for name in load_file(path))]
    blank.unlink()
    with pytest.raises(ValueError, match=rf"is not complete \({blank.name} is missing\): run prepare_data"):
        train_on(output)
    assert same(contents(finish(prepared, output)), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_without_losing_work(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    output = copy_of(prepared / "grouped", tmp_path / "set")
    read: list[str] = []
    read_clip = Preparation.read

    def signalled_at_fourth(self: Any, clip: Any, indices: Any = None) -> np.ndarray:
        read.append(clip.id)
        if len(read) == 4:
            os.kill(os.getpid(), number)
        return read_clip(self, clip, indices)

    monkeypatch.setattr(Preparation, "read", signalled_at_fourth)
    large = f"output={output}"  # one shard for all clips, which is not full when the signal comes
    with pytest.raises(Stopped) as stopped:
        prepare(config(prepared, large))
    assert stopped.value.status == 128 + number
    assert prepare(config(prepared, large)) is not None
    assert len(read) == 4 + 2, "three were done"


def damages(content: bytes, draw: random.Random) -> list[tuple[str, bytes]]:
    """Ways in which a file comes to harm."""
    middle = draw.randrange(len(content)) if content else 0
    flipped = bytearray(content or b"\0")
    flipped[middle % len(flipped)] ^= 1 << draw.randrange(8)
    return [
        ("empty", b""),
        ("cut", content[:middle]),
        ("flipped", bytes(flipped)),
        (
            "of another type",
            draw.choice([b"[]\n", b"null\n", b'"text"\n', b"{}\n", b'{"format": "2", "records": 3}\n']),
        ),
        ("not UTF-8", content[:middle] + b"\xff\xfe" + content[middle:]),
        ("deep", b"[" * 20_000 + b"\n"),
        ("NaN", content.replace(b"1", b"NaN", 1)),
        ("another name", content.replace(b"clip", b"klip", 1)),
    ]


def check_harmed(
    prepared: Path, output: Path, expected: dict[str, Any], draw: random.Random, *, files: int = 1
) -> None:
    """Harm files of a set: a training reads what was there or names one; the same command makes the set whole again."""
    all_files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    harmed = {}
    for path in draw.sample(all_files, files):
        harmed[path.name], content = draw.choice(damages(path.read_bytes(), draw))
        path.write_bytes(content)
    try:
        assert same(contents(LatentCache.open(output)), expected), harmed
    except ValueError as error:
        if not any(name in str(error) for name in harmed):
            raise
    assert same(contents(finish(prepared, output)), expected), harmed


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_reported_or_recomputed(
    prepared: Path, tmp_path: Path, expected: dict[str, Any], seed: int
) -> None:
    check_harmed(prepared, copy_of(prepared / "set", tmp_path / "set"), expected, random.Random(seed))


@pytest.mark.slow
def test_many_damaged_files(prepared: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    for seed in range(100, 250):
        output = copy_of(prepared / "set", tmp_path / str(seed))
        draw = random.Random(seed)
        check_harmed(prepared, output, expected, draw, files=draw.randint(1, 4))


def test_groups_that_are_damaged_are_named_if_they_may_not_be_made(prepared: Path, tmp_path: Path) -> None:
    output = copy_of(prepared / "set", tmp_path / "set")
    (groups,) = output.glob("manifest/group-*.jsonl")
    groups.write_text(groups.read_text().replace("clip", "klip"))
    with pytest.raises(ValueError, match=r"its result is damaged: run it again \(steps=\[group,cache\]\)"):
        finish(prepared, output, "steps=[cache]")
    finish(prepared, output, "steps=[group,cache]")  # as the message message


def test_a_file_that_is_a_folder_is_named(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "rejected.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"rejected\.jsonl could not be written: .*move it away"):
        finish(prepared, tmp_path / "set", "steps=[split]")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest").write_text("mine")
    with pytest.raises(ValueError, match=r"manifest could not be written: .*move it away"):
        finish(prepared, tmp_path / "other", "steps=[split]")
    with pytest.raises(ValueError, match=r"manifest cannot be written"):
        finish(prepared, tmp_path / "other" / "manifest", "steps=[split]")


def test_what_killed_processes_left_is_removed_and_nothing_else(prepared: Path, tmp_path: Path) -> None:
    output = copy_of(prepared / "set", tmp_path / "set")
    (folder,) = (output / "cache").iterdir()
    mine = [output / "notes.txt", output / "cache" / "mine-00001.safetensors", folder / "model-00001.safetensors"]
    left = [output / ".rejected.jsonl.partial", folder / ".shard-w000-00009.safetensors.partial", folder / ".tmpAb12Cd"]
    left.append(folder / "shard-w001-00009.safetensors")
    for path in [*mine, *left]:
        path.write_text("x")
    finish(prepared, output)
    assert [path.exists() for path in mine] == [True] * 3
    assert [path.exists() for path in left] == [False] * 4


def test_files_have_the_mode_of_the_umask(prepared: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in (prepared / "set").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}


def test_a_full_disk_is_reported_and_the_same_command_resumes(
    prepared: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    output = copy_of(prepared / "grouped", tmp_path / "set")

    def limited(limit: int) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # pytest's capture is a file
                prepare(config(prepared, f"output={output}"))
        except ValueError as error:
            sys.exit(5 if "could not be written: the file is larger than this process may write" in str(error) else 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    for limit in (100, 4000, 9000):  # a manifest, a shard of texts, one of clips
        assert fork(1, partial(limited, limit)) == [5]
    assert same(contents(finish(prepared, output)), expected)


def test_a_disk_without_room_is_reported_before_anything_is_loaded(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = copy_of(prepared / "grouped", tmp_path / "set")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    monkeypatch.setattr(encoding, "load_pipeline", None)
    with pytest.raises(ValueError, match=r"has 0\.00 MB free and the cache needs about 0\.0\d MB: make room"):
        finish(prepared, output)


def during(monkeypatch: pytest.MonkeyPatch, second: Callable[[], None]) -> None:
    """Do something while the first step of a run is under way."""
    split = Preparation.split

    def with_second(run: Preparation) -> None:
        monkeypatch.setattr(Preparation, "split", split)
        second()
        split(run)

    monkeypatch.setattr(Preparation, "split", with_second)


def test_workers_that_share_the_work_otherwise_are_refused(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = partial(config, prepared, f"output={tmp_path / 'set'}", "steps=[split]")
    refused = r"another prepare_data works on .*set \(workers=2 worker=0\): to share the work"

    def others() -> None:
        for workers, worker in ((3, 1), (1, 0), (2, 0)):
            with pytest.raises(ValueError, match=refused):
                prepare(shares(f"workers={workers}", f"worker={worker}"))
        prepare(shares("workers=2", "worker=1"))

    during(monkeypatch, others)
    prepare(shares("workers=2", "worker=0"))


def test_another_number_of_workers_resumes(prepared: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    """Of a clip that two workers made, the one that was made of what is there now counts, whatever its file's name."""
    videos = Path(shutil.copytree(prepared / "videos", tmp_path / "videos"))
    before = (videos / "clip3.mp4").read_bytes(), (videos / "clip3.mp4").stat()
    video(videos / "clip3.mp4", scene(9, 12))
    output = copy_of(prepared / "grouped", tmp_path / "set")
    prepare(config(tmp_path, "steps=[split,check,embed,group]"))
    for worker in range(2):
        prepare(config(tmp_path, EACH_ALONE, "steps=[cache]", "workers=2", f"worker={worker}"))
    (videos / "clip3.mp4").write_bytes(before[0])
    os.utime(videos / "clip3.mp4", ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    assert same(contents(finish(tmp_path, output)), expected)


def test_a_video_that_was_replaced_is_noticed_though_size_and_time_are_the_same(
    prepared: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    videos = Path(shutil.copytree(prepared / "videos", tmp_path / "videos"))
    output = copy_of(prepared / "set", tmp_path / "set")
    status = (videos / "clip3.mp4").stat()
    content = video(tmp_path / "other.mp4", scene(9, 12)).read_bytes()
    size = max(len(content), status.st_size)
    for path, bytes_ in ((videos / "clip3.mp4", (videos / "clip3.mp4").read_bytes()), (tmp_path / "new.mp4", content)):
        path.write_bytes(bytes_.ljust(size, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    first = contents(finish(tmp_path, output))
    assert same(first, expected)
    shutil.copy2(tmp_path / "new.mp4", videos / "clip3.mp4")
    second = contents(finish(tmp_path, output))
    assert {id for id in first if not same(first[id], second[id])} == {"clip3.mp4@0.000"}


def test_a_video_that_changes_while_it_is_prepared_is_rejected(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared / "videos", tmp_path / "videos")
    check = Preparation.check

    def replaced(run: Preparation) -> None:
        video(tmp_path / "videos" / "clip3.mp4", scene(9, 12))
        check(run)

    monkeypatch.setattr(Preparation, "check", replaced)
    prepare(config(tmp_path, "steps=[split,check]"))
    assert rejected(tmp_path) == {"clip3.mp4@0.000": rejected(tmp_path)["clip3.mp4@0.000"]}
    assert rejected(tmp_path)["clip3.mp4@0.000"].startswith("changed: ")
    monkeypatch.setattr(Preparation, "check", check)
    prepare(config(tmp_path, "steps=[split,check]"))  # as the message says
    assert rejected(tmp_path) == {}
