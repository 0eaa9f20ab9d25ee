"""A film's folder: what may be one, what ``film.json`` may hold, edited and damaged files, room on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storymem.film.command import described
from storymem.film.folder import Film
from storymem.film.generate import generate_films
from storymem.film.manifest import FilmError, film_folder, library_versions
from storymem.film.settings import estimated_bytes
from storymem.film.storyboard import storyboard
from storymem.io import FileError
from storymem.media.video import probe, read_video, write_video
from tests.composing import SMALL, composed
from tests.stories import TWO_SHOTS, content, files, story, storyteller


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of two shots."""
    folder = tmp_path_factory.mktemp("finished")
    return storyteller().tell(story(folder, TWO_SHOTS), folder / "film").folder


def resume(folder: Path, from_shot: int | None = None, *, seed: int = 0) -> Film:
    """The film of two shots, resumed."""
    how = "auto" if from_shot is None else f"from_shot:{from_shot}"
    film = storyteller(seed=seed).tell(story(folder.parent, TWO_SHOTS), folder, resume=how)
    assert film.video is not None
    assert film.video.is_file()
    return film


def command(folder: Path, *overrides: str) -> list[Film]:
    """``storymem generate`` of the smallest film."""
    story(folder, TWO_SHOTS)
    return generate_films(composed(f"story='{folder}/story.yaml'", *SMALL, *overrides))


# Folders


def test_a_folder_that_holds_no_film_is_refused_and_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("shots/a.mp4", "shots/b_end/1.png", "film.mp4", "keyframes/x.png", "notes.txt"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    before = files(mine)
    for dry in ("dry_run=true", "dry_run=false"):
        with pytest.raises(FilmError, match=r"mine is not empty and holds no film .*\(film\.mp4, keyframes, notes\.tx"):
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
def test_a_folder_with_the_name_of_a_file_is_refused_before_anything_is_made(film: Path, name: str) -> None:
    (film / name).unlink()
    (film / name).mkdir()
    (film / name / "mine").write_text("mine")
    before = files(film)
    with pytest.raises(ValueError, match=f"{name} is a folder"):
        resume(film, 2)
    assert files(film) == before


@pytest.mark.parametrize("kept", [None, 0, 0.5])
@pytest.mark.parametrize("pattern", ["keyframes/*.png", "keyframes/*.safetensors", "shots/01_01/take_001_end/*.png"])
def test_what_is_missing_or_damaged_of_a_finished_film_is_reported(
    film: Path, pattern: str, kept: float | None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(film)
    assert "missing" not in caplog.text + described(Film.open(film))
    gone = sorted(film.glob(pattern))
    for path in gone:
        content = path.read_bytes()
        path.unlink()
        if kept is not None:
            path.write_bytes(content[: int(kept * len(content))])
    resume(film)
    command(film, f"output={film}", "shot=1", "dry_run=true")
    for text in (caplog.text, described(Film.open(film)), capsys.readouterr().out):
        assert "; put them back: shots that need them cannot be made" in text
        assert str(gone[0].relative_to(film)) in text


@pytest.mark.parametrize("name", ["shots", "keyframes"])
def test_links_in_the_place_of_a_films_folders_are_not_followed(film: Path, tmp_path: Path, name: str) -> None:
    (film / name).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    (film / name).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(FilmError, match=f"{name} must be a folder, not a link or a file"):
        resume(film, 1)
    assert files(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("a_file", r"cannot be written \(.+\): choose another output"),
        ("a_file/films/two", r"cannot be written \(.+\): choose another output"),
        ("/proc/films", r"/proc/films cannot be written \(.+\): choose another folder, or ask its owner"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, below: str, message: str) -> None:
    (tmp_path / "a_file").write_bytes(b"x")
    with pytest.raises(FileError, match=message), film_folder(tmp_path / below):
        pass
    assert (tmp_path / "a_file").read_bytes() == b"x"


def test_the_users_files_in_a_film_stay_whatever_is_regenerated(film: Path) -> None:
    mine = {"shots/01_02 copy.mp4", "shots/notes/a.png", "shots/01_02_end/6.png", "keyframes/x.png", "cut.mp4"}
    for name in mine:
        (film / name).parent.mkdir(exist_ok=True)
        (film / name).write_text("mine")
    (film / "shots" / "02_01.mp4").symlink_to(film.parent / "story.yaml")
    resume(film, 1, seed=5)
    resume(film, 2, seed=6)
    assert {name for name, written in files(film).items() if written == b"mine"} == mine
    assert (film.parent / "story.yaml").is_file()


@pytest.mark.parametrize("name", ["file:x", "été", "a b,c", "a%20#?&'\"", "-x", "concat:a|b"])
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    film = storyteller().tell(story(tmp_path, TWO_SHOTS), name)
    assert film.video == Path(name) / "film.mp4"
    assert len(read_video(film.video)) == 17


# Files that are missing, damaged or edited


@pytest.mark.parametrize("known", [False, True])
def test_what_the_user_edited_stays_on_disk_when_its_shot_is_regenerated(film: Path, known: bool) -> None:
    shot = film / "shots" / "01_02" / "take_001.mp4"
    write_video(shot, read_video(shot)[:5], 8)
    edited = shot.read_bytes()
    painted = film / "keyframes" / f"{Film.open(film).shots[1].keyframes[0].id}.png"
    Image.new("RGB", (48, 32), (9, 9, 9)).save(painted)
    image = painted.read_bytes()
    if known:
        resume(film)
        resume(film, 2, seed=4)
    resume(film, 2, seed=5)
    assert Film.open(film).shots[1].file != "shots/01_02/take_001.mp4"
    assert shot.read_bytes() == edited
    assert painted.read_bytes() == image


def test_a_film_or_page_that_is_missing_is_written_again(film: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = files(film)
    for name in ("film.mp4", "storyboard.html"):
        (film / name).unlink()
        resume(film)
        assert files(film) == before
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"", b"half", None])
@pytest.mark.parametrize("name", ["film.mp4", "storyboard.html"])
def test_a_film_or_page_that_was_changed_gets_another_name(
    film: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = files(film)
    changed = before["shots/01_01/take_001.mp4"] if content is None else content
    (film / name).write_bytes(changed)
    aside = name.replace(".", "_1.")
    resume(film)
    assert f"{name} was changed since it was written: it is now {aside}, and {name} is written again" in caplog.text
    assert files(film) == before | {aside: changed}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "no video", "a folder"])
def test_a_shot_that_cannot_be_read_is_named_and_the_advice_works(film: Path, damage: str) -> None:
    shot = film / "shots" / "01_02" / "take_001.mp4"
    whole = shot.read_bytes()
    shot.unlink()
    if damage == "a folder":
        shot.mkdir()
    elif damage != "missing":
        shot.write_bytes({"empty": b"", "cut off": whole[: len(whole) * 2 // 3], "no video": b"text"}[damage])
    for name in ("film.mp4", "storyboard.html"):
        (film / name).unlink()
    before = files(film)
    with pytest.raises(ValueError, match=r"01_02/take_001\.mp4.*: put it back, or make another take .* with shot=2"):
        resume(film)
    assert files(film) == before
    resume(film, 2)


@pytest.mark.parametrize("part", [0.25, 0.6, 0.9])
def test_damage_within_a_shot_is_detected(film: Path, caplog: pytest.LogCaptureFixture, part: float) -> None:
    shot = film / "shots" / "01_01" / "take_001.mp4"
    content = bytearray(shot.read_bytes())
    place = content.index(b"mdat") + int((len(content) - content.index(b"mdat")) * part)
    content[place : place + 12] = bytes(12)
    shot.write_bytes(bytes(content))
    try:
        resume(film)
        message = caplog.text
        frames = sum(shot.frames for shot in Film.open(film).shots)
        assert len(read_video(film / "film.mp4")) == frames, "it is encoded again, so that all can be decoded"
    except ValueError as error:
        message = str(error)
    assert str(shot) in message


def test_shots_that_were_swapped_or_shortened_are_named(film: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (film / "shots" / f"01_0{number}" / "take_001.mp4" for number in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    resume(film)
    for path, number, other in ((one, 1, 2), (two, 2, 1)):
        label = f"shot {number} (scene 1, shot {number}), but that of shot {other}"
        assert f"{path} is not the video that was generated for {label}" in caplog.text
    assert [shot.frames for shot in Film.open(film).shots] == [8, 9]
    joined, parts = read_video(film / "film.mp4"), np.concatenate([read_video(one), read_video(two)])
    assert np.abs(joined.astype(int) - parts).mean() < 3, "encoded again"
    caplog.clear()
    resume(film)
    assert caplog.text == "", "it is reported once"

    write_video(two, read_video(two)[:5], 8)
    resume(film)
    assert f"{two} is not the video that was generated" in caplog.text
    assert probe(film / "film.mp4").frames == 13


@pytest.mark.parametrize(("height", "width", "fps"), [(32, 48, 8), (32, 48, 16), (90, 60, 25)])
def test_a_video_of_the_user_is_fitted_to_the_film(
    film: Path, height: int, width: int, fps: int, caplog: pytest.LogCaptureFixture
) -> None:
    shot = film / "shots" / "01_01" / "take_001.mp4"
    frames = np.full((2 * fps, height, width, 3), 200, np.uint8)
    frames[fps:] = 20
    write_video(shot, frames, fps, crf=30)
    mine = shot.read_bytes()
    resume(film)
    assert f"{shot} is not the video that was generated for shot 1" in caplog.text
    assert shot.read_bytes() == mine
    joined = read_video(film / "film.mp4")
    assert joined.shape == (16 + 8, 32, 48, 3), "two seconds, and the other shot"
    middle = joined[:, 16, 24].astype(int)
    assert np.abs(middle[:8] - 200).max() < 8
    assert np.abs(middle[8:16] - 20).max() < 8

    made = resume(film, 2, seed=4)
    assert made.shots[1].mode == "mi2v"
    np.testing.assert_array_equal(made.last_frames(0, 1)[0], read_video(shot, [2 * fps - 1])[0])


@pytest.mark.parametrize("damage", [None, b"", b"text"])
def test_last_frames_that_cannot_be_read_are_reported_before_anything_is_made(film: Path, damage: bytes | None) -> None:
    end = film / "shots" / "01_01" / "take_001_end" / "5.png"
    end.unlink()
    if damage is not None:
        end.write_bytes(damage)
    before = files(film)
    with pytest.raises(FilmError, match=r"cannot continue from shot 1 .*5\.png.*with shot=1"):
        resume(film, 2)
    assert files(film) == before
    resume(film, 1)


def test_only_files_that_were_being_written_are_removed(film: Path) -> None:
    whole, made = files(film), Film.open(film)
    made.write_take(1, np.zeros((9, 32, 48, 3), np.uint8), mode="mi2v", seed=0, fps=8)
    (film / "shots" / "01_02" / ".take_002.mp4.partial").write_bytes(b"half")
    mine = {"notes.txt", "keyframes/a.png", "shots/01_02 copy.mp4", "shots/02_01_end/9.png"}
    for name in mine:
        (film / name).parent.mkdir(exist_ok=True)
        (film / name).write_bytes(b"mine")
    resume(film)
    assert files(film) == whole | dict.fromkeys(mine, b"mine")


# film.json


def changed_manifest(film: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((film / "film.json").read_text(encoding="utf-8"))
    change(manifest)
    (film / "film.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_the_manifest_records_how_the_film_was_made(film: Path) -> None:
    manifest = json.loads((film / "film.json").read_text())
    assert (manifest["schema"], manifest["title"], manifest["video"]) == (3, "Two", "film.mp4")
    assert manifest["versions"] == library_versions()
    assert [take["shot"] for take in manifest["takes"]] == [1, 2]
    assert manifest["takes"][0]["config_hash"] == manifest["config_hash"] == Film.open(film).config_hash


def downgrade(film: Path, schema: int) -> None:
    """The film of two shots as earlier versions wrote it: with one take a shot; schema 1 counts from 0."""
    manifest = json.loads((film / "film.json").read_text())
    memory = json.loads((film / "memory.json").read_text())
    for take in manifest["takes"]:
        name = take["folder"]
        (film / "shots" / name / "take_001_end").rename(film / "shots" / f"{name}_end")
        (film / "shots" / name / "take_001.mp4").rename(film / "shots" / f"{name}.mp4")
        (film / "shots" / name).rmdir()
        take["prompt"] = take.pop("script")["prompt"]
        take["file"] = f"shots/{name}.mp4"
        take["sha256"] = {name.replace("/take_001", ""): digest for name, digest in take["sha256"].items()}
        take["keyframes"] = [{n: v for n, v in k.items() if n != "character"} for k in take["keyframes"]]
        for key in ("folder", "take", "bank", "follows"):
            del take[key]
        if schema == 1:
            take["index"] = take.pop("shot") - 1
            take["keyframes"] = [keyframe | {"frame": keyframe["frame"] - 1} for keyframe in take["keyframes"]]
    if schema == 1:
        for entry in memory["keyframes"]:
            entry |= {"shot": entry["shot"] - 1, "frame": entry["frame"] - 1}
    for key in ("configs", "made_before"):
        del manifest[key]
    manifest |= {"schema": schema, "shots": manifest.pop("takes"), "replaced": {}}
    (film / "film.json").write_text(json.dumps(manifest))
    (film / "memory.json").write_text(json.dumps({"schema": schema, "keyframes": memory["keyframes"]}))


@pytest.mark.parametrize("schema", [1, 2])
def test_films_of_earlier_versions_are_opened_resumed_and_converted(film: Path, schema: int) -> None:
    made, before = content(film), Film.open(film)
    page = (film / "storyboard.html").read_bytes()
    downgrade(film, schema)
    old = files(film)
    assert [replace(take, file="x", sha256={}, bank=None) for take in Film.open(film).shots] == [
        replace(take, file="x", sha256={}, bank=None) for take in before.shots
    ]
    assert files(film) == old, "it is converted when it is written"
    resume(film)
    assert content(film) == made
    assert json.loads((film / "film.json").read_text())["schema"] == 3
    resume(film, 2)
    assert content(film) == made
    assert [take.file for take in Film.open(film).takes_of(1)] == ["shots/01_02.mp4", "shots/01_02/take_002.mp4"]
    assert old.keys() - {"storyboard.html"} <= files(film).keys()
    assert page != (film / "storyboard.html").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 2}', b"\xff"])
def test_a_damaged_manifest_is_reported_and_left_alone(film: Path, content: bytes) -> None:
    (film / "film.json").write_bytes(content)
    with pytest.raises(FilmError, match=r"film\.json is damaged .*: put it back from a copy, or choose another output"):
        resume(film)
    assert (film / "film.json").read_bytes() == content


DAMAGE: list[tuple[str, Any]] = [
    *[("shots", value) for value in (None, "x", {}, 7, [[]], [None])],
    *[("story", value) for value in (None, [], {}, "x", {"title": 7, "scenes": []}, {"title": "x", "scenes": [{}]})],
    *[("config", value) for value in (None, [], 7)],
    *[("video", value) for value in (7, "../film.mp4", "/etc/passwd", "a\0b", [])],
    *[("writing", value) for value in (["../mine.txt"], ["/tmp/x"], 7, [7], ["a\0b"])],
    *[("takes", value) for value in (None, {}, [7], [{}])],
    *[("shots", [{"folder": "01_01"}, {"folder": value}]) for value in ("../x", "01_01", 7, None)],
    *[("shots", [{"folder": "01_01"}, {"folder": "01_02", "take": value}]) for value in (0, 7, "1")],
    *[("schema", value) for value in (None, "1", 4, [], 10**30)],
]
KEYFRAME = {"id": "a", "frame": 1, "quality": None, "similarity": 0.5}
SHOT_DAMAGE: list[tuple[str, Any]] = [
    *[("frames", value) for value in ("<script>alert(1)</script>", None, -1, 1.5, [9], 10**30)],
    *[("scene", value) for value in ("<script>", "1", None, True)],
    *[("mode", value) for value in ("x", None, 1)],
    *[("file", value) for value in ("../x.mp4", "/etc/passwd", "", "a\0b", 7, "x" * 300, "shots/01_02/take_001.mp4")],
    *[("memory", value) for value in ("x", [7], ["x" * 300], ["<script>"], ["../x"], None)],
    *[("keyframes", value) for value in ([7], [{"id": 7}], {}, [KEYFRAME | {"frame": "1"}])],
    *[("seconds", value) for value in ({"a": "b"}, [], {"a": None})],
    *[("shot", value) for value in (0, "1", None)],
    *[("take", value) for value in (0, "1", 2)],
    *[("script", value) for value in ({}, {"prompt": 7}, None)],
    *[("index", 0), ("folder", "a/b"), ("colour", "red")],
]


@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_a_manifest_of_other_types_is_reported(film: Path, key: str, value: Any) -> None:
    (film.parent / "mine.txt").write_text("mine")
    changed_manifest(film, lambda manifest: manifest.update({key: value}))
    before = files(film)
    with pytest.raises(FilmError, match=r"film\.json"):
        resume(film)
    assert files(film) == before
    assert (film.parent / "mine.txt").is_file()


@pytest.mark.parametrize(("key", "value"), SHOT_DAMAGE)
def test_a_shot_of_other_types_is_reported(film: Path, key: str, value: Any) -> None:
    changed_manifest(film, lambda manifest: manifest["takes"][0].update({key: value}))
    with pytest.raises(FilmError, match=r"film\.json is damaged \(.*\): put it back from a copy, or choose another ou"):
        Film.open(film)


def test_files_that_a_manifest_names_are_deleted_only_if_the_film_wrote_them(film: Path) -> None:
    (film / "mine.txt").write_text("mine")
    outside = film.parent / "outside"
    outside.mkdir()
    (outside / "x.png").write_text("mine")
    (film / "shots" / "z_end").symlink_to(outside)

    names = ["shots/z_end/x.png", "shots/01_02/take_001.mp4", "film.mp4", "mine.txt"]
    changed_manifest(film, lambda manifest: manifest.update(writing=names))
    resume(film)
    assert all(
        path.is_file() for path in (film / "mine.txt", film / "shots" / "01_01" / "take_001.mp4", outside / "x.png")
    )


def test_the_page_shows_text_as_text(film: Path) -> None:
    def write(manifest: dict[str, Any]) -> None:
        manifest["story"]["overview"] = manifest["story"]["title"] = "</title><script>1</script>"
        manifest["takes"][0]["script"]["prompt"] = "'><script>1</script>"

    changed_manifest(film, write)
    page = storyboard(Film.open(film), film)
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_a_disk_without_room_is_reported_before_anything_is_made(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = sum((film / "shots" / name).stat().st_size for name in ("01_01/take_001.mp4", "01_01/take_001_end/1.png"))
    assert taken < estimated_bytes(9, 32, 48)
    usage = shutil.disk_usage(film)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = files(film)
    with pytest.raises(ValueError, match=r"has 0\.00 MB free and the film needs about 0\.\d+ MB"):
        resume(film, 2)
    assert files(film) == before
    resume(film)  # needs no room
