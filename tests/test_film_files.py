"""A film's folder in the hands of people, other programs and full disks: nothing is lost, nothing wrong in silence."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storymem.commands.cli import run_script
from storymem.film.folder import Film, FilmError
from storymem.film.generate import generate
from storymem.film.progress import Progress
from storymem.film.storyboard import write_storyboard
from storymem.film.storyteller import finish_film
from storymem.media.video import probe, read_video, write_video
from tests.composing import SMALL, composed
from tests.stories import content, single_thread, story, storyteller

TWO_SHOTS = """\
title: Two
overview: A short walk.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a story and its film."""
    folder = tmp_path_factory.mktemp("finished")
    storyteller().tell(story(folder, TWO_SHOTS), folder / "film")
    return folder


@pytest.fixture
def film(finished: Path, tmp_path: Path) -> Path:
    """A copy of that film."""
    shutil.copytree(finished / "film", tmp_path / "film")
    return tmp_path / "film"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; a lock is none."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if Path(name).name != ".lock"}


def tell(folder: Path, **options: Any) -> str:
    """Tell the film of two shots, and return what was said of it."""
    said = StringIO()
    told = story(folder.parent, TWO_SHOTS)
    made = storyteller(seed=options.pop("seed", 0)).tell(told, folder, progress=Progress(stream=said), **options)
    assert made.video is not None
    assert made.video.is_file()
    return said.getvalue()


# Output that is not ours


def command(folder: Path, *overrides: str) -> list[Film]:
    """``generate`` of the smallest film."""
    story(folder, TWO_SHOTS)
    return generate(composed(f"story='{folder}/story.yaml'", *SMALL, *overrides))


def test_a_folder_of_somebodys_own_is_refused_and_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("shots/a.mp4", "shots/b_end/1.png", "film.mp4", "keyframes/x.png", "notes.txt"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    before = files(mine)
    for dry in ("dry_run=true", "dry_run=false"):
        with pytest.raises(
            FilmError, match=r"mine is not empty and holds no film .*\(film\.mp4, keyframes, notes\.txt"
        ):
            command(tmp_path, f"output={mine}", dry)
    assert files(mine) == before
    assert sorted(path.name for path in mine.iterdir()) == ["film.mp4", "keyframes", "notes.txt", "shots"]


@pytest.mark.parametrize("inside", ["shots", "shots/new", "keyframes/a/b", "film.mp4", "storyboard.html"])
def test_a_folder_among_a_films_own_files_is_refused(film: Path, inside: str) -> None:
    before = files(film)
    if inside.endswith((".mp4", ".html")):
        (film / inside).unlink()  # as while the film is being made
        del before[inside]
    with pytest.raises(FilmError, match=r"would lie in .* of the film in .*film: choose another output"):
        command(film.parent, f"output={film / inside}")
    assert files(film) == before


@pytest.mark.parametrize("name", ["film.mp4", "storyboard.html", "memory.json", "film.json"])
def test_a_folder_with_the_name_of_a_file_is_told_before_anything_is_made(film: Path, name: str) -> None:
    (film / name).unlink()
    (film / name).mkdir()
    (film / name / "mine").write_text("mine")
    before = files(film)
    with pytest.raises(ValueError, match=f"{name} is a folder"):
        tell(film, resume="from_shot:2")
    assert files(film) == before


@pytest.mark.parametrize("name", ["shots", "keyframes"])
def test_links_in_the_place_of_a_films_folders_are_not_followed(film: Path, tmp_path: Path, name: str) -> None:
    (film / name).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    (film / name).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(FilmError, match=f"{name} must be a folder, not a link or a file"):
        tell(film, resume="from_shot:1")
    assert files(tmp_path / "elsewhere") == before


def test_a_person_s_files_in_a_film_stay_whatever_is_made_again(film: Path) -> None:
    mine = {
        "shots/01_02 copy.mp4",
        "shots/notes/a.png",
        "shots/01_02_end/6.png",
        "keyframes/x.png",
        "cut.mp4",
        ".hidden",
    }
    for name in mine:
        (film / name).parent.mkdir(exist_ok=True)
        (film / name).write_text("mine")
    (film / "shots" / "02_01.mp4").symlink_to(film.parent / "story.yaml")
    tell(film, resume="from_shot:1", seed=5)
    tell(film, resume="from_shot:2", seed=6)
    assert {name for name, written in files(film).items() if written == b"mine"} == mine
    assert (film.parent / "story.yaml").is_file()


@pytest.mark.parametrize("name", ["a:b", "file:x", "été", "a b,c", "a%20#?&'\"", "-x", "concat:a|b"])
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = story(tmp_path, TWO_SHOTS)
    made = storyteller().tell(told, name)
    assert made.video == Path(name) / "film.mp4"
    assert len(read_video(made.video)) == 17
    page = (made.folder / "storyboard.html").read_text(encoding="utf-8")
    assert "src='shots/01_01.mp4'" in page


@pytest.mark.parametrize("told_before", [False, True])
def test_what_a_person_edited_stays_on_disk_when_its_shot_is_made_again(film: Path, told_before: bool) -> None:
    shot = film / "shots" / "01_02.mp4"
    write_video(shot, read_video(shot)[:5], 8)
    edited = shot.read_bytes()
    painted = film / "keyframes" / f"{Film.open(film).shots[1].keyframes[0].id}.png"
    Image.new("RGB", (48, 32), (9, 9, 9)).save(painted)
    picture = painted.read_bytes()
    if told_before:  # so that the film knows them
        tell(film)
        tell(film, resume="from_shot:2", seed=4)
    tell(film, resume="from_shot:2", seed=5)
    assert Film.open(film).shots[1].file != "shots/01_02.mp4"
    assert shot.read_bytes() == edited
    assert painted.read_bytes() == picture


# A finished film whose files are missing, damaged or changed


def test_a_film_or_page_that_is_missing_is_made_again(film: Path) -> None:
    before = files(film)
    for name in ("film.mp4", "storyboard.html"):
        (film / name).unlink()
        assert "changed" not in tell(film)
        assert files(film) == before
    assert tell(film) == "2 of 2 shots are finished already\n"
    assert files(film) == before


@pytest.mark.parametrize("content", [b"", b"half", None])
@pytest.mark.parametrize("name", ["film.mp4", "storyboard.html"])
def test_a_film_or_page_that_was_changed_is_kept_aside_and_made_again(
    film: Path, name: str, content: bytes | None
) -> None:
    before = files(film)
    changed = before["shots/01_01.mp4"] if content is None else content
    (film / name).write_bytes(changed)
    aside = name.replace(".", "_1.")
    assert f"{name} was changed since it was made: it is now {aside}, and {name} is made again" in tell(film)
    assert files(film) == before | {aside: changed}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "no video", "a folder"])
def test_a_shot_that_cannot_be_read_is_named_and_the_advice_works(film: Path, damage: str) -> None:
    shot = film / "shots" / "01_02.mp4"
    whole = shot.read_bytes()
    shot.unlink()
    if damage == "a folder":
        shot.mkdir()
    elif damage != "missing":
        shot.write_bytes({"empty": b"", "cut off": whole[: len(whole) * 2 // 3], "no video": b"text"}[damage])
    for name in ("film.mp4", "storyboard.html"):
        (film / name).unlink()
    before = files(film)
    with pytest.raises(ValueError, match=r"shots/01_02\.mp4.*: put it back, or make .* again with resume=from_shot:2"):
        tell(film)
    assert files(film) == before
    tell(film, resume="from_shot:2")


def test_damage_within_a_shot_is_found_out(film: Path) -> None:
    shot = film / "shots" / "01_01.mp4"
    content = bytearray(shot.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 4
    content[middle : middle + 40] = bytes(40)
    shot.write_bytes(bytes(content))
    try:
        said = tell(film)
    except ValueError as error:
        said = str(error)
    assert str(shot) in said


def test_shots_that_were_swapped_or_shortened_are_named(film: Path) -> None:
    one, two = (film / "shots" / f"01_0{number}.mp4" for number in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    said = tell(film)
    assert f"{one} is not the video that was made as shot 1 (scene 1, shot 1), but that of shot 2" in said
    assert f"{two} is not the video that was made as shot 2 (scene 1, shot 2), but that of shot 1" in said
    assert [shot.frames for shot in Film.open(film).shots] == [8, 9]
    np.testing.assert_array_equal(read_video(film / "film.mp4"), np.concatenate([read_video(one), read_video(two)]))
    assert tell(film) == "2 of 2 shots are finished already\n", "it is said once"

    write_video(two, read_video(two)[:5], 8)
    assert f"{two} is not the video that was made" in tell(film)
    assert probe(film / "film.mp4").frames == 13


@pytest.mark.parametrize(("height", "width", "fps"), [(32, 48, 8), (64, 96, 8), (32, 48, 16), (90, 60, 25)])
def test_a_shot_by_hand_is_fitted_to_the_film(film: Path, height: int, width: int, fps: int) -> None:
    shot = film / "shots" / "01_01.mp4"
    frames = np.full((2 * fps, height, width, 3), 200, np.uint8)
    frames[fps:] = 20
    write_video(shot, frames, fps, crf=30)
    mine = shot.read_bytes()
    said = tell(film)
    assert f"{shot} is not the video that was made as shot 1" in said
    assert shot.read_bytes() == mine
    joined = read_video(film / "film.mp4")
    assert joined.shape == (16 + 8, 32, 48, 3), "two seconds, and the other shot"
    middle = joined[:, 16, 24].astype(int)
    assert np.abs(middle[:8] - 200).max() < 8
    assert np.abs(middle[8:16] - 20).max() < 8

    again = tell(film, resume="from_shot:2", seed=4)
    assert "is not the video" not in again
    made = Film.open(film)
    assert made.shots[1].mode == "mi2v"
    np.testing.assert_array_equal(made.last_frames(0, 1)[0], read_video(shot, [2 * fps - 1])[0])


@pytest.mark.parametrize("damage", [None, b"", b"text"])
def test_last_frames_that_cannot_be_read_are_told_before_anything_is_made(film: Path, damage: bytes | None) -> None:
    end = film / "shots" / "01_01_end" / "5.png"
    end.unlink()
    if damage is not None:
        end.write_bytes(damage)
    before = files(film)
    with pytest.raises(FilmError, match=r"cannot go on from shot 1 .*5\.png.*with resume=from_shot:1"):
        tell(film, resume="from_shot:2")
    assert files(film) == before
    tell(film, resume="from_shot:1")


# Manifests


def changed_manifest(film: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((film / "film.json").read_text(encoding="utf-8"))
    change(manifest)
    (film / "film.json").write_text(json.dumps(manifest), encoding="utf-8")


DAMAGE: list[tuple[str, Any]] = [
    *[("shots", value) for value in (None, "x", {}, 7, [[]], [None])],
    *[("story", value) for value in (None, [], {}, "x", {"title": 7, "scenes": []}, {"title": "x", "scenes": [{}]})],
    *[("config", value) for value in (None, [], 7)],
    *[("video", value) for value in (7, "../film.mp4", "/etc/passwd", "a\0b", [])],
    *[("writing", value) for value in (["../mine.txt"], ["/tmp/x"], 7, [7], ["a\0b"])],
    *[("replaced", value) for value in ({"../mine.txt": ""}, [1], {"a": 1})],
    *[("schema", value) for value in (None, "1", 2, [], 10**30)],
]
KEYFRAME = {"id": "a", "frame": 1, "quality": None, "similarity": 0.5}
SHOT_DAMAGE: list[tuple[str, Any]] = [
    *[("frames", value) for value in ("<script>alert(1)</script>", None, -1, 1.5, [9], 10**30)],
    *[("scene", value) for value in ("<script>", "1", None, True)],
    *[("mode", value) for value in ("x", None, 1)],
    *[("file", value) for value in ("../x.mp4", "/etc/passwd", "", "a\0b", 7, "x" * 300, "shots/01_02.mp4")],
    *[("memory", value) for value in ("x", [7], ["x" * 300], ["<script>"], ["../x"], None)],
    *[
        ("keyframes", value)
        for value in ([7], [{"id": 7}], {}, [{"id": "a", "frame": "1", "quality": 1, "similarity": 1}])
    ],
    *[("seconds", value) for value in ({"a": "b"}, [], {"a": None})],
    *[("index", value) for value in (1, "0", None)],
    ("prompt", 7),
    ("colour", "red"),
]


@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_a_manifest_of_other_types_is_told(film: Path, key: str, value: Any) -> None:
    (film.parent / "mine.txt").write_text("mine")
    changed_manifest(film, lambda manifest: manifest.update({key: value}))
    before = files(film)
    with pytest.raises(FilmError, match=r"film\.json"):
        tell(film)
    assert files(film) == before
    assert (film.parent / "mine.txt").is_file()


@pytest.mark.parametrize(("key", "value"), SHOT_DAMAGE)
def test_a_shot_of_other_types_is_told(film: Path, key: str, value: Any) -> None:
    changed_manifest(film, lambda manifest: manifest["shots"][0].update({key: value}))
    with pytest.raises(
        FilmError, match=r"film\.json is damaged \(.*\): put it back from a copy, or choose another output"
    ):
        Film.open(film)


def test_files_that_a_manifest_calls_ours_are_deleted_only_if_they_are(film: Path) -> None:
    (film / "mine.txt").write_text("mine")
    outside = film.parent / "outside"
    outside.mkdir()
    (outside / "x.png").write_text("mine")
    (film / "shots" / "z_end").symlink_to(outside)

    def claim(manifest: dict[str, Any]) -> None:
        manifest["replaced"] = {
            "mine.txt": "0" * 64,
            "shots/01_01.mp4": manifest["shots"][0]["sha256"]["shots/01_01.mp4"],
        }
        manifest["writing"] = ["shots/z_end/x.png", "shots/01_02.mp4", "film.mp4", "mine.txt"]

    changed_manifest(film, claim)
    tell(film)
    assert (film / "mine.txt").is_file()
    assert (film / "shots" / "01_01.mp4").is_file()
    assert (outside / "x.png").is_file()


def test_the_page_shows_text_as_text(film: Path) -> None:
    def write(manifest: dict[str, Any]) -> None:
        manifest["story"]["overview"] = manifest["story"]["title"] = "</title><script>1</script>"
        manifest["shots"][0]["prompt"] = "'><script>1</script>"

    changed_manifest(film, write)
    page = write_storyboard(Film.open(film)).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4


def as_before_hashes(film: Path) -> None:
    """The manifest as versions wrote it that kept no hashes."""

    def strip(manifest: dict[str, Any]) -> None:
        for key in ("made", "memory_sha256", "writing", "replaced"):
            del manifest[key]
        for shot in manifest["shots"]:
            del shot["sha256"]

    changed_manifest(film, strip)


def test_films_without_hashes_are_opened_and_gone_on_with(film: Path) -> None:
    before, whole = files(film), content(film)
    as_before_hashes(film)
    assert tell(film) == "2 of 2 shots are finished already\n"
    unknown = {"memory_sha256": None}
    assert json.loads((film / "film.json").read_text()) == json.loads(before["film.json"]) | unknown
    assert content(film) == whole
    as_before_hashes(film)
    tell(film, resume="from_shot:2", seed=3)
    assert sorted(name for name in files(film) if name.endswith(".mp4")) == [
        *("film.mp4", "shots/01_01.mp4", "shots/01_02_take2.mp4"),
    ]


def test_damage_of_films_without_hashes_is_found_by_length(film: Path) -> None:
    as_before_hashes(film)
    shot = film / "shots" / "01_01.mp4"
    write_video(shot, read_video(shot)[:6], 8)
    assert f"{shot} is not the video that was made as shot 1" in tell(film)
    assert probe(film / "film.mp4").frames == 6 + 8


# Disks and signals


def in_a_child(work: Callable[[], Any]) -> int:
    """A forked child's exit status, as a shell's caller sees it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def script(*arguments: str) -> None:
    """``scripts/generate.py`` with these arguments."""
    from omegaconf import OmegaConf

    sys.argv = ["generate.py", *arguments]
    run_script(
        lambda config: generate(OmegaConf.to_container(config, resolve=True)),  # type: ignore[arg-type]
        config_name="generate",
        positional="story",
    )


@pytest.mark.parametrize("limit", [1500, 4000])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
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
    said = capfd.readouterr().err
    assert "could not be written: the file is larger than this process may write; make room and run" in said
    assert "Traceback" not in said
    assert {path.name for path in (tmp_path / "film").rglob("*.*")} <= {".lock", "film.json"}, "nothing takes up room"
    if Film.exists(tmp_path / "film"):
        Film.open(tmp_path / "film").check(pytest.fail)
    assert in_a_child(lambda: script(*arguments)) == 0


def test_a_disk_without_room_is_told_before_anything_is_made(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(film)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = files(film)
    with pytest.raises(ValueError, match=r"has 0\.00 MB free and the film needs about 0\.\d+ MB"):
        tell(film, resume="from_shot:2")
    assert files(film) == before
    tell(film)  # needs no room


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_within_seconds_and_says_how_to_go_on(
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
    said = capfd.readouterr().err
    assert f"stopped by {number.name}; the same command goes on from here" in said
    assert "Traceback" not in said
    storyteller()  # the lock is free
    command(tmp_path, f"output={tmp_path / 'film'}")


def test_a_memory_that_is_gone_is_told_by_the_same_command(tmp_path: Path) -> None:
    told, folder = story(tmp_path, TWO_SHOTS), tmp_path / "film"
    storyteller().tell(told, folder)
    (folder / "memory.json").unlink()
    said: list[str] = []
    finish_film(Film.open(folder), said.append)
    assert any("memory.json is missing: the film is whole" in line for line in said)
