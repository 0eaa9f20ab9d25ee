"""``storymem film``: what it prints, joins, exports and deletes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storymem.commands.cli import main
from storymem.film.folder import Film
from storymem.film.manifest import film_folder
from storymem.media.video import probe, read_video, write_video
from tests.stories import FOUR_SHOTS, content, files, plain_image, story, storyteller

Command = Callable[..., int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of four shots, with three takes of the second."""
    folder = tmp_path_factory.mktemp("finished")
    loaded = story(folder, FOUR_SHOTS)
    storyteller().tell(loaded, folder / "film")
    storyteller().tell(loaded, folder / "film", shot="2", takes=2)
    return folder / "film"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """``storymem film`` with arguments; returns the exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["storymem", "film", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_takes_seeds_memory_and_what_is_stale_are_printed(
    film: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(film)
    assert command(film) == 0
    title, shots, takes, keyframes = capsys.readouterr().out.split("\n\n")
    assert title == "Four: 4 shots, 0 without a take"
    assert shots.splitlines()[3].split()[:5] == ["2", "1.2", "2", "3", "mi2v"]
    assert "recalled shot02_frame" in shots.splitlines()[4]
    rows = [line.split() for line in takes.splitlines()]
    assert [row[:4] for row in rows if row[0] == "2"] == [
        *(["2", "1", "1", rows[3][3]], ["2", "2", "yes", "10001"], ["2", "3", "20001", rows[5][3]]),
    ]
    assert "shot02_frame001_2" in keyframes
    assert files(film) == before


def test_a_video_of_the_user_is_listed(film: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    generated, shown = (film / "shots" / "02_01" / "take_001.mp4").read_bytes(), content(film)
    for name in ("01_02/take_003.mp4", "02_01/take_001.mp4"):
        write_video(film / "shots" / name, np.full((9, 32, 48, 3), 90, np.uint8), 8)
    before = files(film)
    assert command(film) == 0
    _, shots, takes, *_ = capsys.readouterr().out.split("\n\n")
    assert [line.count("replaced by the user, not yet in film.mp4") for line in shots.splitlines()[2:]] == [0, 0, 1, 0]
    assert takes.count("replaced by the user") == 2
    assert files(film) == before
    assert command(film, "join") == 0
    assert (film / "storyboard.html").read_text().count("video replaced by the user") == 1
    capsys.readouterr()
    assert command(film) == 0
    _, shots, takes, *_ = capsys.readouterr().out.split("\n\n")
    assert "not yet in film.mp4" not in shots
    assert "continues another video" in shots.splitlines()[5]
    assert takes.count("not yet in film.mp4") == 1, "take 3 is not shown"
    (film / "shots" / "02_01" / "take_001.mp4").write_bytes(generated)
    assert command(film, "join") == 0
    assert content(film) == shown, "the generated video is back"


def test_what_is_not_known_is_named(film: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(film, "cut") == 2
    assert "cut: write one folder, and join, export or clean" in capsys.readouterr().err


def test_a_film_is_joined_again(film: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(film)
    for name in ("film.mp4", "storyboard.html"):
        (film / name).unlink()
    assert command(film, "join") == 0
    assert capsys.readouterr().out.strip() == str(film / "film.mp4")
    assert files(film) == before


def test_clips_and_timelines_are_exported(film: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(film, "export") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(film / "export")
    clips = sorted((film / "export" / "clips").iterdir())
    assert [path.name for path in clips] == [f"shot_00{n}_take_00{2 if n == 2 else 1}.mp4" for n in (1, 2, 3, 4)]
    assert clips[1].read_bytes() == (film / "shots" / "01_02" / "take_002.mp4").read_bytes()
    if not (film / "export" / "timeline.otio").exists():
        assert "pip install 'storymem[export]'" in printed.err
        return
    timeline = json.loads((film / "export" / "timeline.otio").read_text())
    (track,) = timeline["tracks"]["children"]
    lengths = [clip["source_range"]["duration"] for clip in track["children"]]
    assert [length["value"] for length in lengths] == [9, 8, 9, 8]
    assert "EDL has no timecode at 8 frames per second" in printed.err
    assert command(film, "export") == 0, "an earlier export is replaced"


def test_an_export_to_another_folder_only_reads_the_film(film: Path, command: Command, tmp_path: Path) -> None:
    (film / "film.mp4").unlink()
    before = files(film)
    with film_folder(film):  # no lock is to be had, as in a folder that cannot be written
        assert command(film, "export", f"output={tmp_path / 'out'}") == 0
    assert files(film) == before
    assert len(list((tmp_path / "out" / "clips").iterdir())) == 4


def test_prores_shows_the_same(film: Path, command: Command, tmp_path: Path) -> None:
    colours = np.array([[200, 40, 40], [40, 180, 60], [30, 60, 220]], np.uint8).repeat(16, axis=0)
    write_video(film / "shots" / "02_01" / "take_001.mp4", np.broadcast_to(colours, (9, 32, 48, 3)), 8)
    assert command(film, "export", "codec=prores", f"output={tmp_path / 'out'}") == 0
    clip = tmp_path / "out" / "clips" / "shot_003_take_001.mov"
    assert probe(clip).fps == 8
    frames = read_video(clip).astype(int)
    assert frames.shape == (9, 32, 48, 3)
    assert np.abs(frames - colours)[:, :, 4::8].max() < 5


def test_an_export_deletes_nothing(film: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for output in (film, film / "shots"):
        before = files(film)
        assert command(film, "export", f"output={output}") == 2
        assert "is not empty and no earlier export" in capsys.readouterr().err
        assert files(film) == before


@pytest.mark.parametrize("codec", ["h264", "prores"])
def test_an_exported_clip_that_the_user_changed_gets_another_name(
    film: Path, command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    output = tmp_path / "out"
    assert command(film, "export", f"codec={codec}", f"output={output}") == 0
    clip, *others = sorted((output / "clips").iterdir())
    exported = clip.read_bytes()
    clip.write_text("graded")
    (output / "mine.txt").write_text("mine")
    for _ in range(2):
        assert command(film, "export", f"codec={codec}", f"output={output}") == 0
    aside = clip.with_stem(f"{clip.stem}_1")
    assert caplog.text.count("was changed since it was written") == 1
    assert f"it is now {aside.name}" in caplog.text
    assert (aside.read_text(), clip.read_bytes(), (output / "mine.txt").read_text()) == ("graded", exported, "mine")
    assert sorted((output / "clips").iterdir()) == sorted([clip, aside, *others])


def test_footage_is_not_taken_for_an_earlier_export(film: Path, command: Command, tmp_path: Path) -> None:
    footage = tmp_path / "edit" / "clips" / "shot_001_take_001.mp4"
    footage.parent.mkdir(parents=True)
    footage.write_text("footage")
    assert command(film, "export", f"output={tmp_path / 'edit'}") == 2
    assert footage.read_text() == "footage"


def test_takes_that_are_not_shown_are_deleted_after_asking(
    film: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, before = content(film), files(film)
    assert command(film, "clean") == 2
    assert "add yes=true" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert command(film, "clean") == 0
    assert "nothing was deleted" in capsys.readouterr().out
    assert files(film) == before

    (film / "shots" / "01_02" / "mine.txt").write_text("mine")
    edited = Film.open(film).takes_of(1)[2].keyframes[0].id
    plain_image(film / "keyframes" / f"{edited}.png", (9, 9, 9))
    assert command(film, "clean", "yes=true") == 0
    assert "deleted 2 takes" in capsys.readouterr().out
    assert content(film) == shown
    left = {path.name for path in (film / "shots" / "01_02").iterdir()}
    assert left == {"take_002.mp4", "take_002_end", "mine.txt"}
    assert (film / "keyframes" / f"{edited}.png").is_file(), "the user's"
    recalled = {id for take in Film.open(film).shots for id in take.memory}
    assert all((film / "keyframes" / f"{id}.png").is_file() for id in recalled), "the page shows them"
    assert command(film, "clean", "yes=true") == 0
    assert "no takes but those" in capsys.readouterr().out
    again = storyteller().tell(story(film.parent, FOUR_SHOTS), film, shot="2")
    assert [take.take for take in again.takes_of(1)] == [2, 3]
    assert [take.seed for take in again.takes_of(1)] == [10_001, 30_001], "not that of a take that was rejected"


def test_what_holds_no_film_is_refused(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("show", "join", "clean"):
        assert command(tmp_path, action) == 2
        assert "holds no film: there is no film.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
