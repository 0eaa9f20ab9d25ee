"""A film's folder: what it says, who may use it, and that its files are exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from storymem.film.folder import (
    END_FRAMES,
    Film,
    FilmError,
    ShotRecord,
    differences,
    estimated_bytes,
    library_versions,
)
from storymem.film.manifest import KeyframeRecord
from storymem.film.ownership import film_folder
from storymem.io import FileError
from storymem.media.video import probe, read_video, write_video
from storymem.story import Shot

ROOT = Path(__file__).parents[1]
STORY = {"title": "Two", "scenes": [{"shots": [{"prompt": "a"}, {"prompt": "b"}]}]}
CONFIG = {"seed": 0, "sampler": {"steps": 8, "shift": 4.0}}


def frames(count: int, seed: int) -> np.ndarray:
    """Smooth random frames, uint8 [count, 32, 48, 3]."""
    corners = np.random.default_rng(seed).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
    return corners.repeat(16, axis=1).repeat(16, axis=2)


def shot(index: int) -> Shot:
    return Shot(prompt=f"Shot {index}.", cut=index != 1, scene=1 + index // 2, number=1 + index % 2, index=index)


def record(index: int, file: str, count: int, repeated: int = 0) -> ShotRecord:
    keyframe = KeyframeRecord(id=f"s{index}_f0", frame=0, quality=5.5, similarity=None if index == 0 else 0.25)
    return ShotRecord(
        index=index,
        scene=1 + index // 2,
        number=1 + index % 2,
        prompt=f"Shot {index}.",
        mode="mi2v" if repeated else "m2v",
        seed=index,
        frames=count,
        repeated=repeated,
        file=file,
        memory=("ref_1",),
        keyframes=(keyframe,),
        config_hash="0" * 16,
        seconds={"generate": 1.5, "save": 0.25},
    )


def film_of(folder: Path, shots: int = 3) -> Film:
    """A film of ``shots`` shots of 9 frames; the second continues the first and cuts one frame."""
    film = Film(folder, story=STORY, config=CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    film.save()
    for index in range(shots):
        repeated = 1 if index == 1 else 0
        name = film.write_shot(shot(index), frames(9, index), repeated=repeated, fps=8)
        film.add(record(index, name, 9 - repeated, repeated))
    return film


# The manifest


def test_the_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    film = film_of(tmp_path)
    again = Film.open(tmp_path)
    assert again.shots == film.shots
    assert again.story == STORY
    assert again.config == CONFIG
    assert again.video is None
    again.join()
    assert Film.open(tmp_path).video == tmp_path / "film.mp4"


def test_the_manifest_says_how_the_film_was_made(tmp_path: Path) -> None:
    film = film_of(tmp_path)
    manifest = json.loads((tmp_path / "film.json").read_text())
    assert (manifest["schema"], manifest["title"], manifest["video"]) == (1, "Two", None)
    assert manifest["config_hash"] == film.config_hash
    assert manifest["versions"] == library_versions()
    assert manifest["versions"]["torch"] != "unknown"
    assert manifest["seconds"] == pytest.approx(3 * 1.75)
    assert manifest["shots"][1]["keyframes"] == [
        {"id": "s1_f0", "frame": 0, "quality": 5.5, "similarity": 0.25, "sha256": None}
    ]


def test_the_hash_is_of_the_settings_whatever_their_order(tmp_path: Path) -> None:
    one = Film(tmp_path, story=STORY, config={"a": 1, "b": {"c": 2, "d": "ü"}})
    same = Film(tmp_path, story={"title": "other"}, config={"b": {"d": "ü", "c": 2}, "a": 1})
    other = Film(tmp_path, story=STORY, config={"a": 1, "b": {"c": 3, "d": "ü"}})
    assert one.config_hash == same.config_hash != other.config_hash
    assert len(one.config_hash) == 16
    int(one.config_hash, 16)


def test_a_folder_without_a_film(tmp_path: Path) -> None:
    assert not Film.exists(tmp_path)
    with pytest.raises(FilmError, match=r"holds no film: there is no film\.json"):
        Film.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"schema": 1}',
        b'{"schema": 1, "shots": [7]}',
        b'{"schema": 1, "shots": [{}]}',
        b"\xff",
    ],
)
def test_a_damaged_manifest_is_told_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "film.json").write_bytes(content)
    with pytest.raises(FilmError, match=r"film\.json is damaged .*: put it back from a copy, or choose another output"):
        Film.open(tmp_path)
    assert (tmp_path / "film.json").read_bytes() == content


@pytest.mark.parametrize("shot", [{"colour": "red"}, {"keyframes": [{"id": "a"}]}, {"memory": 3}])
def test_a_shot_that_cannot_be_understood_is_damage(tmp_path: Path, shot: dict) -> None:
    film_of(tmp_path, shots=1)
    manifest = json.loads((tmp_path / "film.json").read_text())
    manifest["shots"][0] |= shot
    (tmp_path / "film.json").write_text(json.dumps(manifest))
    with pytest.raises(FilmError, match="damaged"):
        Film.open(tmp_path)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    film_of(tmp_path, shots=0)
    manifest = json.loads((tmp_path / "film.json").read_text()) | {"schema": 2}
    (tmp_path / "film.json").write_text(json.dumps(manifest))
    with pytest.raises(FilmError, match="schema 2 is not known; this version reads 1"):
        Film.open(tmp_path)


def test_differences_are_told_by_their_path() -> None:
    before = {"seed": 0, "sampler": {"steps": 8, "shift": 4.0}, "shots": [{"prompt": "a"}, {"prompt": "b"}]}
    after = {"seed": 0, "sampler": {"steps": 40, "shift": 4.0}, "shots": [{"prompt": "a"}, {"prompt": "c"}], "x": None}
    assert differences(before, after) == [
        "sampler.steps: 8 before, 40 now",
        "shots[2].prompt: 'b' before, 'c' now",
        "x: 'nothing' before, None now",
    ]
    assert differences(after, dict(reversed(after.items()))) == []


def test_differences_of_length_and_emptiness() -> None:
    assert differences({"a": [1, 2]}, {"a": [1]}) == ["a[2]: 2 before, 'nothing' now"]
    assert differences({"a": []}, {"a": [1]}) == ["a: [] before, 'nothing' now", "a[1]: 'nothing' before, 1 now"]
    assert differences({"a": ()}, {"a": []}) in ([], ["a: () before, [] now"])
    assert differences({}, {}) == []


# Shots


def test_a_shots_video_leaves_out_what_it_repeats(tmp_path: Path) -> None:
    film, made = Film(tmp_path, story=STORY, config=CONFIG), frames(9, 0)
    assert film.write_shot(shot(0), made, repeated=0, fps=8) == "shots/01_01.mp4"
    assert film.write_shot(shot(1), made, repeated=5, fps=8) == "shots/01_02.mp4"
    write_video(tmp_path / "expected.mp4", made[5:], 8)
    np.testing.assert_array_equal(read_video(tmp_path / "shots/01_02.mp4"), read_video(tmp_path / "expected.mp4"))
    assert probe(tmp_path / "shots/01_01.mp4").frames == 9
    assert probe(tmp_path / "shots/01_02.mp4").frames == 4


def test_last_frames_are_kept_without_loss(tmp_path: Path) -> None:
    film = film_of(tmp_path)
    for index in range(3):
        for count in range(1, END_FRAMES + 1):
            np.testing.assert_array_equal(film.last_frames(index, count), frames(9, index)[-count:])


def test_the_joined_film_is_its_shots_one_after_the_other(tmp_path: Path) -> None:
    film = film_of(tmp_path)
    assert film.join() == tmp_path / "film.mp4" == film.video
    parts = [read_video(tmp_path / made.file) for made in film.shots]
    np.testing.assert_array_equal(read_video(tmp_path / "film.mp4"), np.concatenate(parts))
    assert probe(tmp_path / "film.mp4").frames == 9 + 8 + 9


def test_shots_are_finished_in_order(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="in order"):
        film_of(tmp_path, shots=1).add(record(2, "shots/02_01.mp4", 9))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_forgetting_changes_nothing_on_disk_until_there_is_another_shot(tmp_path: Path) -> None:
    film = film_of(tmp_path)
    film.join()
    before = files(tmp_path)
    film.forget_from(1)
    assert (len(film.shots), film.video) == (1, None)
    assert files(tmp_path) == before
    np.testing.assert_array_equal(film.last_frames(0, 5), frames(9, 0)[-5:])

    name = film.write_shot(shot(1), frames(9, 7), repeated=1, fps=8)
    assert name == "shots/01_02_take2.mp4"
    whole = Film.open(tmp_path)
    assert (len(whole.shots), whole.video) == (3, tmp_path / "film.mp4"), "until add() the film is the old one"
    whole.check(pytest.fail)
    film.add(record(1, name, 8, 1))
    assert [made.file for made in Film.open(tmp_path).shots] == ["shots/01_01.mp4", name]
    assert before.items() - files(tmp_path).items() == {("film.json", before["film.json"])}

    film.join()
    film.remove_replaced()
    kept = {made.file for made in film.shots}
    assert {path for path in files(tmp_path) if path.endswith(".mp4")} == {*kept, "film.mp4"}
    assert not (tmp_path / "shots" / "01_02_end").exists()


def test_only_files_that_were_being_written_are_removed(tmp_path: Path) -> None:
    film = film_of(tmp_path, shots=2)
    whole = files(tmp_path)
    film.write_shot(shot(2), frames(9, 2), repeated=0, fps=8)
    (tmp_path / "shots" / ".02_02.mp4.partial").write_bytes(b"half")
    mine = {"notes.txt", "keyframes/a.png", "shots/01_02 copy.mp4", "shots/02_01_end/9.png", "film.mp4"}
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    again = Film.open(tmp_path)
    again.remove_unfinished()
    assert files(tmp_path).keys() == whole.keys() | mine
    assert {name for name, content in files(tmp_path).items() if content == b"mine"} == mine
    assert again.shots == Film.open(tmp_path).shots == film.shots


# The folder


def test_a_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    with film_folder(tmp_path / "films" / "two") as folder:
        assert folder == tmp_path / "films" / "two"
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert {path.name for path in folder.iterdir()} <= {".lock"}


@pytest.mark.parametrize("below", ["a_file", "a_file/films/two"])
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "a_file").write_bytes(b"x")
    with (
        pytest.raises(FilmError, match=r"cannot be written \(.+\): choose another output"),
        film_folder(tmp_path / below),
    ):
        pass
    assert (tmp_path / "a_file").read_bytes() == b"x"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a Linux file system")
def test_a_file_system_that_takes_no_files_is_told() -> None:
    with pytest.raises(FileError, match="/proc/films cannot be written"), film_folder("/proc/films"):
        pass
    with pytest.raises(FilmError, match="/proc is not empty and holds no film"), film_folder("/proc"):
        pass


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with film_folder(tmp_path):
        with (
            pytest.raises(FileError, match=r"another process is making the film in .*: wait for it"),
            film_folder(tmp_path),
        ):
            pass
        assert not FileLock(tmp_path / ".lock").is_locked
    with film_folder(tmp_path):
        pass


def test_a_failure_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), film_folder(tmp_path):
        raise KeyError
    with film_folder(tmp_path):
        pass


HOLD = """
import sys, time
from storymem.film.ownership import film_folder
with film_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(FileError, match="another process"), film_folder(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with film_folder(tmp_path):
        pass


def test_the_estimate_is_above_what_a_shot_takes(tmp_path: Path) -> None:
    film = film_of(tmp_path, shots=1)
    film.join()
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path.name != "film.json")
    assert taken < estimated_bytes(9, 32, 48) + 4096  # containers have headers
    assert estimated_bytes(81, 480, 832) > estimated_bytes(17, 480, 832)
