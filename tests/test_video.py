"""Frames go to disk and come back: exactly where that is promised, closely where H.264 is between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from storymem.media.video import iter_frames, join_videos, probe, read_video, write_video


def moving(frames: int, height: int = 46, width: int = 70, seed: int = 0) -> np.ndarray:
    """A smooth image that drifts, with saturated patches; H.264 changes it little."""
    rng = np.random.default_rng(seed)
    y, x, t = np.mgrid[0:height, 0:width, 0:frames].transpose(0, 3, 1, 2)
    waves = [np.sin((x * a + y * b) / 40 + t / 5 + c) for a, b, c in rng.uniform(1, 4, (3, 3))]
    video = (127 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)
    video[:, 4:16, 4:16] = (255, 0, 0)
    video[:, 4:16, 20:32] = (0, 0, 255)
    return video


def decoded_by_ffmpeg(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, moving(23), 16)
    return path


def test_what_is_written_is_read_back(clip: Path) -> None:
    back = read_video(clip)
    assert back.shape == (23, 46, 70, 3)
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - moving(23)).mean() < 4
    # Colours survive in the middle of the patches: the YUV matrix of writer and reader is one and the same.
    assert np.abs(back[5, 10, 10].astype(int) - (255, 0, 0)).max() < 12
    assert np.abs(back[5, 10, 26].astype(int) - (0, 0, 255)).max() < 12
    np.testing.assert_array_equal(back, decoded_by_ffmpeg(clip))


def test_a_file_is_described_by_what_it_holds(clip: Path) -> None:
    info = probe(clip)
    assert (info.frames, info.fps, info.height, info.width) == (23, 16.0, 46, 70)


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    frames = moving(8, 240, 416)
    contents = set()
    for number in range(8):
        write_video(tmp_path / f"{number}.mp4", iter(frames), 16)
        contents.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(contents) == 1


def test_single_frames_are_read_in_the_order_asked_for(clip: Path) -> None:
    np.testing.assert_array_equal(read_video(clip, [20, 3, 3, 0]), decoded_by_ffmpeg(clip)[[20, 3, 3, 0]])


def test_frames_can_be_read_one_by_one(clip: Path) -> None:
    frames = iter_frames(clip)
    assert isinstance(frames, Iterator)
    np.testing.assert_array_equal(np.stack(list(frames)), decoded_by_ffmpeg(clip))


def test_a_frame_that_does_not_exist_is_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match=r"has 23 frames: there is no frame 23"):
        read_video(clip, [0, 23])
    with pytest.raises(ValueError, match="no frame -1"):
        read_video(clip, [-1])


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4"):
        read_video(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be read as a video"):
        probe(tmp_path / "text.mp4")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 45, 70, 3), np.uint8), "even width and height"),
        (np.zeros((2, 46, 71, 3), np.uint8), "even width and height"),
        (np.zeros((0, 46, 70, 3), np.uint8), "no frames"),
        (np.zeros((2, 46, 70, 3), np.float32), "must all be uint8"),
        ([np.zeros((46, 70, 3), np.uint8), np.zeros((48, 70, 3), np.uint8)], "must all be uint8"),
    ],
)
def test_frames_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, frames: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "bad.mp4", frames, 16)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_that_was_there(clip: Path) -> None:
    before = clip.read_bytes()

    def breaks_off() -> Iterator[np.ndarray]:
        yield from moving(5)
        raise RuntimeError("the generator died")

    with pytest.raises(RuntimeError):
        write_video(clip, breaks_off(), 16)
    assert clip.read_bytes() == before
    assert list(clip.parent.iterdir()) == [clip]


@pytest.mark.parametrize("fps", [16, 24000 / 1001])
def test_a_joined_film_is_exactly_its_parts(tmp_path: Path, fps: float) -> None:
    parts = []
    for number, length in enumerate([23, 1, 2, 40]):
        parts.append(tmp_path / f"{number}.mp4")
        write_video(parts[-1], moving(length, seed=number), fps)
    film = tmp_path / "film.mp4"
    join_videos(parts, film)
    expected = np.concatenate([decoded_by_ffmpeg(part) for part in parts])
    np.testing.assert_array_equal(read_video(film), expected)
    np.testing.assert_array_equal(decoded_by_ffmpeg(film), expected)
    assert probe(film).frames == 66
    assert probe(film).fps == pytest.approx(fps)
    with av.open(str(film)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-3)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, clip: Path) -> None:
    larger, faster = tmp_path / "larger.mp4", tmp_path / "faster.mp4"
    write_video(larger, moving(5, height=48), 16)
    write_video(faster, moving(5), 24)
    for part in (larger, faster, moving(5, height=48)):
        with pytest.raises(ValueError, match=r"cannot be joined to .*size or rate differs"):
            join_videos([clip, part], tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="frames have no rate of their own: give fps"):
        join_videos([moving(5)], tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="no videos to join"):
        join_videos([], tmp_path / "film.mp4")
    assert not list(tmp_path.glob("*film*"))
