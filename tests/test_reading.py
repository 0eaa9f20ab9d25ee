"""Videos are read as a player shows them, by whatever camera, phone or encoder they were written."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from storymem.data.prepare import prepare
from storymem.media.video import frames_at, iter_frames, join_videos, probe, read_video, write_video
from tests.data.drawn_clips import counted, number_of, scene
from tests.data.preparing import config
from tests.encoding import (
    COLOURS,
    HEIGHT,
    WIDTH,
    chart,
    corner_names,
    corners,
    encode,
    hlg_from_sdr,
    patches,
    pq_from_sdr,
    turned,
    yuv_frame,
)

BT601 = {"colorspace": 6, "color_range": 1, "color_primaries": 6, "color_trc": 6}
BT709 = {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1}
FULL = {**BT709, "color_range": 2}
BT2020 = {"colorspace": 9, "color_range": 1}
PQ = {**BT2020, "color_primaries": 9, "color_trc": 16}
HLG = {**PQ, "color_trc": 18}


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "matrix", "tags"),
    [
        ("untagged.mp4", "libx264", "yuv420p", "bt601", {}),
        ("bt601.mp4", "libx264", "yuv420p", "bt601", BT601),
        ("bt709.mp4", "libx264", "yuv420p", "bt709", BT709),
        ("full.mp4", "libx264", "yuv420p", "bt709", FULL),
        ("yuvj.mp4", "libx264", "yuvj420p", "bt601", {"colorspace": 5, "color_range": 2}),
        ("bt2020.mp4", "libx264", "yuv420p", "bt2020", BT2020),
        ("444.mp4", "libx264", "yuv444p", "bt709", BT709),
        ("10 bits.mp4", "libx264", "yuv420p10le", "bt709", BT709),
        ("10 bits full.mp4", "libx264", "yuv420p10le", "bt709", FULL),
        ("hevc.mp4", "libx265", "yuv420p", "bt709", BT709),
        ("vp9.webm", "libvpx-vp9", "yuv420p", "bt709", BT709),
    ],
)
def test_colours_are_those_of_the_original(
    tmp_path: Path, name: str, codec: str, pixels: str, matrix: str, tags: dict
) -> None:
    full = tags.get("color_range") == 2
    options = {"crf": "1", "b:v": "0"} if codec == "libvpx-vp9" else None
    frames = (yuv_frame(chart(), pixels, matrix, full=full) for _ in range(3))
    path = encode(tmp_path / name, frames, codec=codec, pixels=pixels, tags=tags, options=options)
    assert np.abs(patches(read_video(path)[1]) - COLOURS).max() <= 3
    assert any(note.startswith("untagged") for note in probe(path).notes) == (name == "untagged.mp4")


@pytest.mark.parametrize(("matrix", "tags"), [("bt601", {}), ("bt601", BT601), ("bt709", BT709), ("bt709", FULL)])
def test_pixels_are_those_of_decord(tmp_path: Path, matrix: str, tags: dict) -> None:
    decord = pytest.importorskip("decord")
    full = tags.get("color_range") == 2
    moving = [yuv_frame(np.roll(chart(), 7 * n, axis=1), "yuv420p", matrix, full=full) for n in range(9)]
    path = encode(tmp_path / "a.mp4", moving, tags=tags)
    theirs = decord.VideoReader(str(path)).get_batch(range(9)).asnumpy()
    assert np.abs(read_video(path).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(("of_sdr", "tags"), [(pq_from_sdr, PQ), (hlg_from_sdr, HLG)])
def test_hdr_is_tone_mapped_to_what_sdr_shows(
    tmp_path: Path, of_sdr: Callable[[np.ndarray], np.ndarray], tags: dict
) -> None:
    ramp = np.linspace(0, 255, WIDTH)[None, :, None] * np.array((1.0, 0.9, 0.7))
    sdr = np.concatenate([chart()[: HEIGHT // 2], ramp.repeat(HEIGHT // 2, axis=0)])
    frames = (yuv_frame(of_sdr(sdr), "yuv420p10le", "bt2020") for _ in range(3))
    path = encode(tmp_path / "hdr.mp4", frames, pixels="yuv420p10le", tags=tags)
    shown = read_video(path)[1].astype(float)
    assert shown.std() == pytest.approx(sdr.std(), rel=0.15)  # without tone mapping it is less than half
    dark = shown[-8, : WIDTH // 2] - sdr[-8, : WIDTH // 2]  # below the knee nothing is changed
    assert np.abs(dark).max() < 6
    assert np.abs(np.diff(shown[-8].mean(axis=-1))).max() < 12, "the ramp is smooth"
    assert any(note.startswith("HDR: ") for note in probe(path).notes)


def test_wide_gamut_is_converted_to_srgb(tmp_path: Path) -> None:
    p3_red = np.full((HEIGHT, WIDTH, 3), (234, 51, 35), float)  # (255, 0, 0) of sRGB, nearly: the gamma is another
    frames = (yuv_frame(p3_red, "yuv420p", "bt709") for _ in range(2))
    path = encode(tmp_path / "p3.mp4", frames, tags={**BT709, "color_primaries": 12})
    assert np.abs(read_video(path)[0, 9, 9].astype(int) - (255, 0, 0)).max() < 16


@pytest.mark.parametrize(
    ("matrix", "shown", "upright"),
    [
        ((1, 0, 0, 1), "rg-b", False),
        ((0, 1, -1, 0), "brg-", True),
        ((-1, 0, 0, -1), "-brg", False),
        ((0, -1, 1, 0), "g-br", True),
        ((-1, 0, 0, 1), "grb-", False),
        ((1, 0, 0, -1), "b-gr", False),
        ((0, 1, 1, 0), "rb-g", True),
        ((0, -1, -1, 0), "-grb", True),
    ],
)
def test_the_display_matrix_is_applied(tmp_path: Path, matrix: tuple, shown: str, upright: bool) -> None:
    path = turned(encode(tmp_path / "a.mp4", [corners().astype(np.uint8)] * 3), *matrix)
    info, frames = probe(path), read_video(path)
    assert corner_names(frames[1]) == shown
    assert frames.shape[1:3] == (info.height, info.width) == ((WIDTH, HEIGHT) if upright else (HEIGHT, WIDTH))
    assert sum(note.startswith(("rotated", "mirrored")) for note in info.notes) == (matrix != (1, 0, 0, 1))
    assert corner_names(next(iter_frames(path))) == shown


@pytest.mark.parametrize(("aspect", "size"), [("4/3", (64, 128)), ("1/2", (128, 96)), ("1/1", (64, 96))])
def test_pixels_are_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    frames = (yuv_frame(chart(), "yuv420p", "bt709") for _ in range(3))
    path = encode(tmp_path / "a.mp4", frames, tags=BT709, aspect=Fraction(aspect))
    assert read_video(path).shape[1:3] == size
    assert np.abs(patches(read_video(path)[0]) - COLOURS).max() <= 3
    assert (probe(path).height, probe(path).width) == size


def test_a_turned_clip_of_oblong_pixels_is_scaled_before_it_is_turned(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [corners().astype(np.uint8)] * 3, aspect=Fraction(4, 3))
    assert read_video(turned(path, 0, 1, -1, 0)).shape[1:3] == (128, 64)


def test_transparent_parts_are_white_as_in_images(tmp_path: Path) -> None:
    image = np.full((HEIGHT, WIDTH, 4), (255, 0, 0, 255), np.uint8)
    image[:, WIDTH // 2 :, 3] = 0
    for name, codec, pixels in (
        ("a.mov", "qtrle", "argb"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("b.mov", "prores_ks", "yuva444p10le"),
    ):
        frames = [av.VideoFrame.from_ndarray(image, format="rgba").reformat(format=pixels) for _ in range(3)]
        shown = read_video(encode(tmp_path / name, frames, codec=codec, pixels=pixels))[1]
        assert np.abs(shown[30, 10].astype(int) - (255, 0, 0)).max() < 6, name
        assert shown[30, -10].min() > 250, name


def test_fields_become_whole_frames(tmp_path: Path) -> None:
    """A bar that moves between the two fields of a frame has no comb of lines."""
    frames = []
    for number in range(8):
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for field in (0, 1):
            start = 4 + 8 * (2 * number + field) % 80
            frame[field::2, start : start + 8] = 255
        frames.append(frame)
    options = {"crf": "1", "x264-params": "interlaced=1:tff=1"}
    path = encode(tmp_path / "a.mp4", frames, options=options)
    info, shown = probe(path), read_video(path)[3].astype(int)
    assert info.frames == len(read_video(path)) == 8
    assert any(note.startswith("interlaced") for note in info.notes)
    comb = np.abs(np.diff(shown[20:40].mean(axis=-1), axis=0)).mean()
    assert comb < np.abs(np.diff(frames[3][20:40].astype(int).mean(axis=-1), axis=0)).mean() / 3


def late_recording(path: Path, frames: np.ndarray, keyframe: int, lost: int) -> Path:
    """A transport stream of which the first ``lost`` frames are cut off, between two keyframes."""
    whole = encode(
        path.with_stem("whole"), frames, options={"crf": "1", "g": str(keyframe), "bf": "0", "sc_threshold": "0"}
    )
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(whole.read_bytes()[places[lost] :])
    return path


def test_a_recording_begins_with_its_first_frame_that_can_be_decoded(tmp_path: Path) -> None:
    path = late_recording(tmp_path / "late.ts", counted(40), keyframe=10, lost=3)
    info = probe(path)
    assert [number_of(frame) for frame in read_video(path)] == list(range(10, 40))
    assert info.frames == 30
    np.testing.assert_allclose(info.times, np.arange(30) / 8, atol=1e-6)
    assert [note for note in info.notes if note.startswith("late start: ")]
    shown = frames_at(path, [0, 1.0, 3.5])
    assert [number_of(frame) for frame in read_video(path, shown)] == [10, 18, 38]


def test_clips_of_a_late_recording_lie_where_its_cuts_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The public door: two scenes, of which the second begins 3 s after the first frame that can be decoded."""
    pytest.importorskip("scenedetect")
    frames = np.concatenate([scene(1, 34, height=96, width=160), scene(5, 30, height=96, width=160)])
    (tmp_path / "videos").mkdir()
    path = late_recording(tmp_path / "videos" / "late.ts", frames, keyframe=10, lost=4)
    path.with_stem("whole").unlink()
    path.with_suffix(".txt").write_text("Two scenes.")
    manifest = tmp_path / "set" / "manifest"
    prepare(config(tmp_path, "steps=[split,check]", "split.splitter=scenedetect"))
    (record,) = [line for file in manifest.glob("split*") for line in file.read_text().splitlines()]
    assert '"shots": [[0.0, 3.0], [3.0, 6.75]]' in record
    assert "1 late start" in capsys.readouterr().err


def test_no_clip_holds_one_frame_over_a_lost_piece(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    stamps = [*range(14), *range(30, 44)]  # two seconds are missing
    encode(tmp_path / "videos" / "a.mkv", scene(3, 28), stamps=stamps)
    (tmp_path / "videos" / "a.txt").write_text("A lost piece.")
    prepare(config(tmp_path, "steps=[split,check]"))
    (manifest,) = (tmp_path / "set" / "manifest").glob("split*")
    assert '"shots": [[0.0, 1.75], [3.75, 5.5]]' in manifest.read_text()


def test_recordings_put_one_after_the_other_are_read_whole(tmp_path: Path) -> None:
    one = encode(tmp_path / "a.ts", counted(12)).read_bytes()
    (tmp_path / "both.ts").write_bytes(one + one)
    assert [number_of(frame) for frame in read_video(tmp_path / "both.ts")] == [*range(12)] * 2
    assert (np.diff(probe(tmp_path / "both.ts").times) > 0).all()


def test_clips_from_a_phone_are_upright_in_a_training_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "videos").mkdir()
    moving = [np.roll(corners(48, 96), 3 * number, axis=1).astype(np.uint8) for number in range(12)]
    turned(encode(tmp_path / "videos" / "phone.mp4", moving), 0, 1, -1, 0)
    (tmp_path / "videos" / "phone.txt").write_text("A phone.")
    prepare(config(tmp_path, "steps=[split,check]"))
    (record,) = (tmp_path / "set" / "manifest").glob("split*")
    assert '"height": 96, "width": 48' in record.read_text()
    assert "1 rotated" in capsys.readouterr().err


def test_an_edit_list_is_applied(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", counted(30), options={"crf": "1", "bf": "2"})
    path = tmp_path / "edited.mp4"
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(whole)) as given, av.open(str(path), "w", options=options) as container:
        source = given.streams.video[0]
        stream = container.add_stream_from_template(source)
        assert source.time_base is not None
        for packet in given.demux(source):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= round(10 / 8 / source.time_base)
                packet.dts -= round(10 / 8 / source.time_base)
                packet.stream = stream
                container.mux(packet)
    assert probe(path).frames == 20
    assert [number_of(frame) for frame in read_video(path)] == list(range(10, 30))


def test_frames_that_follow_each_other_unevenly_are_found_by_time(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", counted(6), stamps=[0, 1, 2, 10, 11, 12])
    assert frames_at(path, [0, 0.3, 1.2, 1.5]) == [0, 2, 2, 5]
    assert probe(path).fps == pytest.approx(8)


@pytest.mark.parametrize("name", ["a.avi", "a.h264"])
def test_files_that_state_no_times_are_counted(tmp_path: Path, name: str) -> None:
    """H.264 with B-frames in AVI may have wrong presentation times, a raw stream has none at all."""
    path = encode(tmp_path / name, counted(20), options={"crf": "1", "bf": "2"}, fps=25)
    info = probe(path)
    assert [number_of(frame) for frame in read_video(path)] == list(range(20))
    np.testing.assert_allclose(info.times, np.arange(20) / 25, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_file_that_is_cut_off_is_not_read_as_a_short_one(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = encode(tmp_path / name, noise)
    if name == "a.mp4":
        fast = tmp_path / "fast.mp4"
        with av.open(str(path)) as given, av.open(str(fast), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
        path = fast
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert probe(path).frames < 24
    assert len(read_video(path, [0, 1])) == 2
    with pytest.raises(ValueError, match=rf"{path.name} is (cut off|damaged)"):
        read_video(path)
    with pytest.raises(ValueError, match=rf"{path.name} is (cut off|damaged)"):
        for _ in iter_frames(path):
            pass


def test_a_recording_with_a_lost_piece_is_not_read_as_a_whole_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.ts", noise)
    content, packet = path.read_bytes(), 188
    path.write_bytes(content[: 200 * packet] + content[230 * packet :])
    with pytest.raises(ValueError, match=r"a\.ts (is damaged|is cut off or has lost pieces)"):
        read_video(path)


def test_damaged_pixels_are_reported(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = encode(
        tmp_path / "a.mp4", noise, options={"crf": "18", "x264-params": "mbtree=0:threads=1"}
    )  # the same bytes
    whole, content = read_video(path), bytearray(path.read_bytes())
    place = content.index(b"mdat") + len(content) // 2
    content[place : place + 400] = bytes(400)
    path.write_bytes(content)
    for _ in range(10):
        with pytest.raises(ValueError, match=r"a\.mp4 is damaged"):
            read_video(path)
    np.testing.assert_array_equal(read_video(path, [0]), whole[:1])


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_what_holds_no_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sound\.mp4 holds no video stream"):
        probe(sound(tmp_path / "sound.mp4"))
    whole = encode(tmp_path / "a.mp4", counted(3))
    empty = tmp_path / "empty.mp4"
    with av.open(str(whole)) as given, av.open(str(empty), "w", options={"movflags": "empty_moov"}) as container:
        container.add_stream_from_template(given.streams.video[0])
        container.start_encoding()
    with pytest.raises(ValueError, match=r"empty\.mp4 (holds|cannot be read)"):
        probe(empty)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"folder\.mp4 is a folder"):
        probe(tmp_path / "folder.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(ValueError, match=r"fifo\.mp4 is not a regular file"):
        read_video(tmp_path / "fifo.mp4")


def test_a_playlist_opens_nothing_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    with pytest.raises(ValueError, match=r"list\.mp4"):
        probe(tmp_path / "list.mp4")


def test_a_size_that_changes_is_reported(tmp_path: Path) -> None:
    first = encode(tmp_path / "a.ts", counted(8))
    second = encode(tmp_path / "b.ts", counted(8, height=64, width=96))
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match=r"both\.ts .*from 48x32 to 96x64"):
        read_video(both)


@pytest.mark.parametrize("tags", [{"colorspace": 14}, {"colorspace": 8}, {**BT709, "color_trc": 8 + 1}])
def test_colours_that_are_not_known_are_refused(tmp_path: Path, tags: dict) -> None:
    path = encode(tmp_path / "a.mp4", [yuv_frame(chart(), "yuv420p", "bt709") for _ in range(2)], tags=tags)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read: its (colour matrix|transfer)"):
        probe(path)


@pytest.mark.parametrize("name", ["a:b.mp4", "100%d.mp4", "a?b#c.mp4", "-i.mp4", "été 電車.mp4"])
def test_any_name_can_be_written_read_and_joined(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, counted(3), 8)
    join_videos([name, name], f"joined {name}")
    assert [number_of(frame) for frame in read_video(f"joined {name}")] == [0, 1, 2] * 2


def test_frames_far_inside_are_those_of_the_whole(tmp_path: Path) -> None:
    """Seeking, in containers with and without an index and with leading B-frames."""
    for name in ("a.mp4", "a.mkv", "a.ts"):
        path = encode(tmp_path / name, counted(120), options={"crf": "1", "g": "25", "x264-params": "open-gop=1"})
        assert [number_of(frame) for frame in read_video(path, [119, 70, 70, 25, 24])] == [39, 30, 30, 25, 24], name


def parts(folder: Path) -> list[Path]:
    """Three shots of a film, the second as it comes from an editor."""
    found = [folder / f"{number}.mp4" for number in range(3)]
    for number, path in enumerate(found):
        write_video(path, scene(number, 9, height=64, width=96), 8)
    return found


@pytest.mark.parametrize(
    "edited",
    [
        {"options": {"crf": "18", "preset": "veryfast"}},
        {"options": {"bf": "0"}},
        {"codec": "libx265"},
        {"codec": "mpeg4", "format": "avi"},
        {"pixels": "yuv444p"},
        {"format": "matroska"},
        {"tags": BT709},
    ],
)
def test_a_part_of_another_encoder_is_encoded_again(tmp_path: Path, edited: dict) -> None:
    files = parts(tmp_path)
    encode(files[1], scene(7, 9, height=64, width=96), **edited)
    before = [read_video(path) for path in files]
    notes = join_videos(files, tmp_path / "film.mp4")
    assert notes == [f"{files[1]} comes from another encoder and is encoded again for film.mp4"]
    frames = read_video(tmp_path / "film.mp4")
    np.testing.assert_array_equal(frames[:9], before[0])
    np.testing.assert_array_equal(frames[18:], before[2])
    assert np.abs(frames[9:18].astype(int) - before[1]).mean() < 6
    np.testing.assert_allclose(np.diff(probe(tmp_path / "film.mp4").times), 1 / 8, rtol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mp4", "1.mp4", "2.mp4", "film.mp4"]


def test_a_turned_part_is_joined_upright(tmp_path: Path) -> None:
    files = parts(tmp_path)
    write_video(files[1], np.rot90(scene(7, 9, height=64, width=96), axes=(1, 2)), 8)
    before = read_video(turned(files[1], 0, 1, -1, 0))
    assert len(join_videos(files, tmp_path / "film.mp4")) == 1
    assert np.abs(read_video(tmp_path / "film.mp4")[9:18].astype(int) - before).mean() < 4
