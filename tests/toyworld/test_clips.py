"""Clips for training: real files that `prepare_data` reads, with the pixels of the world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.toy import agreement
from storymem.data.videos import find_masks, read_captions, scan_videos
from storymem.media.video import probe, read_video
from toyworld.attributes import FPS, FRAMES, HEIGHT, UNKNOWN, WIDTH
from toyworld.clips import write_clips
from toyworld.reader import read_attributes
from toyworld.world import HELD_OUT, people_mask, render_layers, story


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    assert write_clips(folder, range(3)) == 24
    return folder


def test_prepare_data_finds_every_clip_with_its_prompt(folder: Path) -> None:
    found = scan_videos(folder)
    videos = found.videos
    captions = read_captions(found, None)
    assert len(videos) == 24
    for video in videos:
        seed, number = int(video[:6]), int(video.split("/")[1][:2])
        assert captions.of(video, 0, FRAMES / FPS).text == story(seed).shots[number - 1].prompt


def test_a_folder_holds_the_shots_of_the_same_people(folder: Path) -> None:
    for below in folder.iterdir():
        seed, *names = below.name.split("_")
        shots = [story(int(seed)).shots[int(path.stem) - 1] for path in below.glob("*.mp4")]
        assert {tuple(sorted(one.name.lower() for one in shot.cast)) for shot in shots} == {tuple(names)}
    casts = {tuple(one.name for one in shot.cast) for seed in range(3) for shot in story(seed).shots}
    assert len(casts) > 3, "a story has more folders than one"
    assert {len(below.name.split("_")) for below in folder.iterdir()} >= {2, 3}


def clip(folder: Path, seed: int, number: int) -> Path:
    """The file of a shot, counted from 1."""
    (path,) = folder.glob(f"{seed:06d}_*/{number:02d}.mp4")
    return path


def test_a_clip_has_the_frames_of_its_shot(folder: Path) -> None:
    info = probe(clip(folder, 1, 3))
    assert (info.frames, info.fps, info.height, info.width) == (FRAMES, FPS, HEIGHT, WIDTH)
    drawn = story(1).shots[2].frames.astype(np.float64)
    error = np.square(read_video(clip(folder, 1, 3)) - drawn).mean()
    assert 10 * np.log10(255**2 / error) > 28  # colours have half the resolution in H.264


def test_attributes_are_read_from_files_as_from_drawings(folder: Path) -> None:
    answers = {"drawn": [], "decoded": []}
    for number, shot in enumerate(story(0).shots, start=1):
        decoded = read_video(clip(folder, 0, number), [8])[0]
        for name, frame in (("drawn", shot.frames[8]), ("decoded", decoded)):
            answers[name] += [right for _, right in agreement(shot.seen(8), read_attributes(frame))]
    assert np.mean(answers["decoded"]) >= np.mean(answers["drawn"]) - 0.03
    assert UNKNOWN not in vars(read_attributes(read_video(clip(folder, 0, 1), [8])[0])).values()


def test_what_is_there_is_left_alone_and_what_is_missing_is_written(folder: Path) -> None:
    kept, lost = clip(folder, 0, 1), clip(folder, 2, 8)
    before, bytes_of_lost = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert write_clips(folder, range(3)) == 1
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == bytes_of_lost
    assert not list(folder.rglob(".*"))


def test_stories_for_measuring_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clips are for training"):
        write_clips(tmp_path, range(HELD_OUT - 1, HELD_OUT + 1))
    assert not list(tmp_path.iterdir())


def test_masks_are_those_of_the_people_and_are_found(tmp_path: Path) -> None:
    assert write_clips(tmp_path / "clips", range(1), masks=tmp_path / "masks") == 8
    clips = scan_videos(tmp_path / "clips")
    assert find_masks(tmp_path / "masks", clips).keys() == set(clips.videos)
    shown = read_video(clip(tmp_path / "masks", 0, 2)).mean(axis=-1) > 128
    drawn = people_mask(*render_layers(story(0).shots[1], slice(None)))
    assert (shown == drawn).mean() > 0.995


def test_masks_can_be_added_to_clips_that_are_there(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", range(1))
    assert write_clips(tmp_path / "clips", range(1), masks=tmp_path / "masks") == 0
    assert len(scan_videos(tmp_path / "masks").videos) == 8
