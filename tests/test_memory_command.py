"""``storymem memory``: the list of keyframes, edits of them, and why frames became keyframes or not."""

from __future__ import annotations

import contextlib
import errno
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest

from storymem.commands.cli import main
from storymem.film.folder import Film
from storymem.media.images import read_image
from storymem.memory import KeyframeSelector, SinkAndRecent
from storymem.memory.bank import read_entries
from tests.stories import FOUR_SHOTS, files, plain_image, story, storyteller

Command = Callable[..., str]

WITH_ADA = FOUR_SHOTS + "characters: [{name: Ada}]\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return storyteller().tell(story(folder, WITH_ADA), folder / "film").folder


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``storymem memory`` with arguments; returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["storymem", "memory", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            main()
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> Path:
    plain_image(path, colour, size)
    return path


def stale_shots(printed: str) -> list[str]:
    return [line.split()[1] for line in printed.splitlines() if line.startswith("shot ")]


def another_take(film: Path, shot: str) -> Film:
    return storyteller().tell(story(film.parent, WITH_ADA), film, shot=shot)


def test_keyframes_are_listed_with_their_origin_and_who_recalled_them(film: Path, memory: Command) -> None:
    before = files(film)
    title, table, fates = memory(film).split("\n\n")
    entries, takes = read_entries(film), Film.open(film).shots
    assert title == f"Four: {len(entries)} keyframes"
    for number, (entry, line) in enumerate(zip(entries, table.splitlines()[2:], strict=True), start=1):
        users = ", ".join(str(take.shot) for take in takes if entry.id in take.memory)
        assert line.split()[:2] == [str(number), entry.id]
        assert f"shot {entry.shot}, frame {entry.frame}" in line
        assert line.rstrip().endswith(users)
    assert len(fates.splitlines()) == 4
    assert files(film) == before
    shutil.copyfile(film / takes[1].file, film / takes[0].file)
    assert "shot 1: video replaced by the user, not yet in film.mp4: its keyframes are" in memory(film)


def test_an_added_picture_is_fitted_and_seen_by_the_next_take(film: Path, memory: Command, tmp_path: Path) -> None:
    picture = image(tmp_path / "a b.png", (200, 30, 30), size=(300, 100))
    printed = memory(film, "add", picture, "for=Ada")
    assert stale_shots(printed) == ["2", "3", "4"]
    assert read_image(film / "keyframes" / "ref_ada_1.png").shape == (32, 48, 3)
    assert "ref_ada_1" in (film / "storyboard.html").read_text()
    take = another_take(film, "4").take_of(3)
    assert take is not None
    assert "ref_ada_1" in take.memory
    entry = next(entry for entry in read_entries(film) if entry.id == "ref_ada_1")
    assert (entry.character, entry.shot, entry.sha256 is None) == ("Ada", None, False)


def test_an_added_image_is_reported_once_a_shot_may_recall_it_and_does_not(
    film: Path, memory: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teller = storyteller(recall=SinkAndRecent(capacity=2, sink=2))
    loaded = story(film.parent, WITH_ADA)
    memory(film, "add", image(tmp_path / "new.png", (9, 9, 9)), "shot=4")
    teller.tell(loaded, film, shot="3")
    assert caplog.messages == [], "it is for shot 4"
    teller.tell(loaded, film, shot="4")
    (printed,) = caplog.messages
    assert "ref_new_1, added or replaced by the user, not recalled for shot 4 (scene 2, shot 2): Sink" in printed
    command = printed.partition("to have it recalled: storymem memory ")[2]
    memory(*shlex.split(command))
    take = teller.tell(loaded, film, shot="4").take_of(3)
    assert take is not None
    assert "ref_new_1" in take.memory
    assert len(caplog.messages) == 1


def test_a_dropped_keyframe_is_not_recalled_and_its_files_stay(film: Path, memory: Command) -> None:
    first, before = read_entries(film)[0], files(film)
    printed = memory(film, "drop", 1)
    assert printed.splitlines()[0] == f"storymem memory {film} drop {first.id}"
    assert stale_shots(printed) == ["2", "3", "4"]
    assert f"recalled {first.id}, now gone" in (film / "storyboard.html").read_text()
    assert {name for name in before if name.startswith("keyframes")} <= files(film).keys()
    take = another_take(film, "3").take_of(2)
    assert take is not None
    assert first.id not in take.memory
    memory(film, "add", film / "keyframes" / f"{first.id}.png", "shot=2")
    back = read_entries(film)[-1]
    assert read_image(film / back.image).tobytes() == read_image(film / first.image).tobytes()


def test_a_pinned_keyframe_is_always_recalled_and_first(film: Path, memory: Command) -> None:
    recall = storyteller().recall
    small = type(recall)(capacity=1, sink=0)
    third = read_entries(film)[2]
    assert memory(film, "unpin", 3) == "nothing changed: keyframe 3 is not pinned\n"
    assert "shot 4 is not what would be made now" in memory(film, "pin", 3)
    assert memory(film, "pin", 3) == "nothing changed: keyframe 3 is pinned\n"
    assert Film.open(film).edits == [f"pin {third.id}"]
    assert memory(film).splitlines()[6].endswith("pinned")
    made = storyteller(recall=small).tell(story(film.parent, WITH_ADA), film, shot="4").take_of(3)
    assert made is not None
    assert made.memory == (third.id,)
    memory(film, "unpin", third.id)
    assert not any(entry.pinned for entry in read_entries(film))


def test_a_replaced_keyframe_has_an_id_of_its_own_and_its_place(film: Path, memory: Command, tmp_path: Path) -> None:
    entries, picture = read_entries(film), image(tmp_path / "new.jpg", (1, 2, 3), size=(20, 20))
    old = (film / entries[1].image).read_bytes()
    memory(film, "replace", 2, picture)
    now = read_entries(film)[1]
    assert (now.id, now.shot, now.frame) == (f"{entries[1].id}_2", entries[1].shot, entries[1].frame)
    assert (film / entries[1].image).read_bytes() == old
    take = another_take(film, "4").take_of(3)
    assert take is not None
    assert now.id in take.memory


def test_edits_are_recorded_as_commands_that_repeat_them(
    film: Path, finished: Path, memory: Command, tmp_path: Path
) -> None:
    edits = (("add", image(tmp_path / "été.png", (9, 9, 9)), "shot=3"), ("drop", 2), ("pin", 1))
    printed = [memory(film, *edit).splitlines()[0] for edit in edits]
    commands = [line.strip() for line in memory(film).partition("edits:\n")[2].splitlines()]
    assert commands == printed
    assert [line.split()[3] for line in commands] == ["add", "drop", "pin"]
    shutil.copytree(finished, tmp_path / "again")
    for line in commands:
        _, _, _, *arguments = shlex.split(line)
        memory(tmp_path / "again", *arguments)
    assert (tmp_path / "again" / "memory.json").read_bytes() == (film / "memory.json").read_bytes()


def test_an_edit_before_the_disk_is_full_is_not_to_be_made_again(
    film: Path, memory: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, full = [entry.id for entry in read_entries(film)], OSError(errno.ENOSPC, "No space left on device", "film.mp4")
    with monkeypatch.context() as patch:
        patch.setattr("storymem.film.folder.storyboard", Mock(side_effect=full))
        printed = memory(film, "drop", 1)
    assert f"the change is made, and storymem film {film} join does what is left" in printed
    join(film, monkeypatch)
    assert [entry.id for entry in read_entries(film)] == ids[1:]


def test_what_an_interrupted_edit_says_is_true_after_every_rename(
    film: Path, memory: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, said, rename = [entry.id for entry in read_entries(film)], [], Path.replace
    for moment in count():
        folder, renames = shutil.copytree(film, film.with_name(f"stopped_{moment}")), count()

        def replace(source: Path, target: Path, renames: Iterator[int] = renames, last: int = moment) -> None:
            rename(source, target)
            if next(renames) == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            printed = memory(folder, "drop", 1)
        if "stopped; " not in printed:
            break
        said.append("the same command resumes" in printed)
        if said[-1]:
            memory(folder, "drop", 1)
        else:
            assert f"the change is made, and storymem film {folder} join does what is left" in printed
            join(folder, monkeypatch)
        assert [entry.id for entry in read_entries(folder)] == ids[1:]
    assert said == sorted(said, reverse=True)
    assert {*said} == {True, False}


def join(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["storymem", "film", str(film), "join"])
    main()


def test_each_examined_frame_has_a_verdict(tmp_path: Path, memory: Command) -> None:
    loaded = story(tmp_path, FOUR_SHOTS)
    strict = KeyframeSelector(similarity_threshold=1.0, max_keyframes=1, bank_similarity_threshold=-1.0)
    film = storyteller(selector=strict).tell(loaded, tmp_path / "film")
    first, second = film.shots[:2]
    assert first.candidates is not None
    assert second.candidates is not None
    assert first.candidates[0].verdict == "kept"
    assert {one.verdict for one in first.candidates[1:]} == {"like the last"}
    assert "in the memory" in {one.verdict for one in second.candidates}
    assert "kept: the memory was empty" in memory(film.folder, "shot=1")
    printed = memory(film.folder, "shot=2")
    assert printed.startswith("shot 2, take 1: none kept; ")
    assert "in the memory already: similarity" in printed
    assert "none kept; " in (film.folder / "storyboard.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drop", "99"], "there is no keyframe 99: the memory has 1 to"),
        (["drop", "shot01_frame01"], "there is no keyframe shot01_frame01"),
        (["drop"], "write: storymem memory"),
        (["delete", "3"], "delete: write add, drop, pin, unpin or replace"),
        (["add", "missing.png"], "missing.png"),
        (["add", "x.png", "for=Bo"], "for=Bo: not a character of the film; its characters are Ada"),
        (["add", "x.png", "shot=5"], "shot=5: the film has shots 1 to 4"),
        (["shot=0"], "shot=0: the film has shots 1 to 4"),
        (["pin", "1", "for=Ada"], "for=Ada is for add"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    film: Path, memory: Command, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_image(tmp_path / "x.png", (0, 0, 0))
    monkeypatch.chdir(tmp_path)
    before = files(film)
    assert message in memory(film, *arguments)
    assert files(film) == before
