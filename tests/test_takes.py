"""Takes: other ones of a shot, which one is shown, what a story that was edited keeps, cards for missing shots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storymem.film.folder import Film
from storymem.film.generate import generate_films
from storymem.film.manifest import FilmError
from storymem.film.matching import stale
from storymem.film.progress import Progress
from storymem.film.settings import parse_shots, parse_work
from storymem.media.video import probe, read_video
from storymem.memory import MemoryBank
from storymem.memory.bank import read_entries
from tests.composing import composed
from tests.stories import FOUR_SHOTS, content, files, plain_image, story, storyteller

HEAD = "title: Walk\noverview: A short walk.\nscenes:\n  - shots:\n"


def shots(*prompts: str) -> str:
    """A story of one scene, whose shots are cuts."""
    return HEAD + "".join(f"      - {{prompt: {prompt}.}}\n" for prompt in prompts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of four shots."""
    folder = tmp_path_factory.mktemp("finished")
    return storyteller().tell(story(folder, FOUR_SHOTS), folder / "film").folder


@pytest.fixture
def made(film: Path) -> Path:
    """A folder with a copy of the film, and its story."""
    story(film.parent, FOUR_SHOTS)
    return film.parent


def tell(folder: Path, text: str = FOUR_SHOTS, **how: Any) -> tuple[Film, list[str]]:
    """The film after a run, and the prompts of the shots that were made."""
    teller = storyteller()
    film = teller.tell(story(folder, text), folder / "film", **how)
    return film, [request.prompt for request in teller.generator.requests]


def choose(folder: Path, shot: int | str, take: int, *more: str, output: str = "film") -> Film:
    """``storymem generate story.yaml shot=... take=...``; the film as it is then."""
    words = (f"story={folder / 'story.yaml'}", f"output={folder / output}", f"shot={shot}", f"take={take}")
    generate_films(composed(*words, *more))
    return Film.open(folder / output)


def why_stale(film: Film) -> dict[int, str]:
    return stale(film, read_entries(film.folder))


def chosen(film: Film) -> list[int | None]:
    return [slot.take for slot in film.slots]


def test_another_take_keeps_the_first_and_the_later_shots_and_can_be_undone(made: Path) -> None:
    first, before = content(made / "film"), files(made / "film")
    film, prompts = tell(made, shot="2")
    assert prompts == ["The dog looks at a tree."]
    assert chosen(film) == [1, 2, 1, 1]
    assert [take.seed for take in film.takes_of(1)] == [1, 10_001], "noise that no take of the shot has"
    again = {"film.json", "film.mp4", "storyboard.html", "memory.json"}
    now = files(made / "film")
    assert {name for name in before if now[name] != before[name] and "safetensors" not in name} <= again
    assert {3, 4} == why_stale(film).keys()
    assert "Not what would be made now: recalled shot02_frame" in (made / "film" / "storyboard.html").read_text()
    second = content(made / "film")
    assert second["shots"][1] != first["shots"][1]
    assert [shot for _, shot, _, _ in second["memory"]] == sorted(shot for _, shot, _, _ in second["memory"])

    film = choose(made, 2, 1)
    assert why_stale(film) == {}
    assert content(made / "film") == first
    choose(made, 2, 2)
    assert content(made / "film") == second
    assert tell(made)[1] == [], "nothing is missing"


def test_following_shots_are_made_with_the_new_memory(made: Path) -> None:
    film, prompts = tell(made, shot="2", following=True)
    assert len(prompts) == 3
    assert [take.seed for take in film.shots] == [0, 10_001, 99, 3]
    assert why_stale(film) == {}
    afresh = made / "afresh"
    text = FOUR_SHOTS.replace("cut: false}\n  - shots", "cut: false, seed: 10001}\n  - shots")
    assert text != FOUR_SHOTS
    storyteller().tell(story(afresh, text), afresh / "film")
    assert content(made / "film") == content(afresh / "film")


def test_other_settings_for_the_following_shots_are_printed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, teller = story(made, FOUR_SHOTS), storyteller(seed=7)
    teller.tell(loaded, made / "film", shot="4", following=True, progress=Progress())
    assert "other settings than those of the film:\n  seed: 0 before, 7 now\n" in capsys.readouterr().err


def test_several_takes_of_several_shots(made: Path) -> None:
    film, prompts = tell(made, shot="2,4", takes=2)
    assert len(prompts) == 4
    assert chosen(film) == [1, 2, 1, 2]
    assert [take.seed for take in film.takes_of(3)] == [3, 10_003, 20_003]
    assert (made / "film" / "shots" / "02_02" / "take_003.mp4").is_file()
    third = choose(made, 4, 3)
    assert third.shots[3].seed == 20_003
    kept = {k.id for k in MemoryBank.load(third.folder)}
    assert {k.id for k in third.shots[3].keyframes} <= kept
    assert not {k.id for k in third.takes_of(3)[1].keyframes} & kept


def test_a_single_shot_may_have_settings_of_its_own(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teller = storyteller(seed=7)
    film = teller.tell(story(made, FOUR_SHOTS), made / "film", shot="2", progress=Progress())
    assert "other settings than those of the film:\n  seed: 0 before, 7 now\n" in capsys.readouterr().err
    take = film.shots[1]
    assert take.seed == 8
    assert film.config_of(take) == teller.config != film.config
    assert tell(made)[1] == [], "the film's own settings are those of before"
    assert Film.open(made / "film").config_of(take) == teller.config


# The story


def test_shots_that_move_keep_their_takes_and_new_ones_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = tell(tmp_path, shots("A dog", "A cat", "A fox"))
    videos = {take.prompt: read_video(first.folder / take.file).tobytes() for take in first.shots}
    before = files(tmp_path / "film")
    film, prompts = tell(tmp_path, shots("A fox", "A bird", "A dog"), progress=Progress())
    assert prompts == ["A bird."]
    assert [take.prompt for take in film.shots] == ["A fox.", "A bird.", "A dog."]
    assert [(take.shot, take.number) for take in film.shots] == [(1, 1), (2, 2), (3, 3)]
    for take in (film.shots[0], film.shots[2]):
        assert read_video(film.folder / take.file).tobytes() == videos[take.prompt]
    assert {1, 3} == why_stale(film).keys(), "they were made with another memory"
    assert capsys.readouterr().err.splitlines()[:4] == [
        "shot 1 (scene 1, shot 1) was shot 3: it keeps 1 take, and shows take 1",
        "shot 2 (scene 1, shot 2) was edited; its takes from the former text stay: 1",
        "shot 3 (scene 1, shot 3) was shot 1: it keeps 1 take, and shows take 1",
        "2 of 3 shots are finished already",
    ]
    assert before.keys() <= files(tmp_path / "film").keys()
    assert [k.shot for k in MemoryBank.load(film.folder)] == [1, 1, 2, 2, 3, 3]

    film, prompts = tell(tmp_path, shots("A dog", "A cat", "A fox"), progress=Progress())
    assert prompts == [], "the story of before has its takes again"
    assert {take.prompt: read_video(film.folder / take.file).tobytes() for take in film.shots} == videos
    assert why_stale(film) == {}
    assert "shot 2 (scene 1, shot 2) is as in an earlier version of the story" in capsys.readouterr().err


def test_shots_are_removed_and_added(tmp_path: Path) -> None:
    tell(tmp_path, shots("A dog", "A cat", "A fox"))
    first = content(tmp_path / "film")
    film, prompts = tell(tmp_path, shots("A dog", "A fox"))
    assert (prompts, len(film.shots), len(film.takes)) == ([], 2, 3)
    assert probe(film.video).frames == 18
    film, prompts = tell(tmp_path, shots("A dog", "A cat", "A fox"))
    assert prompts == []
    assert content(tmp_path / "film") == first
    film, prompts = tell(tmp_path, shots("A dog", "A cat", "A cat", "A fox", "A cow"))
    assert prompts == ["A cat.", "A cow."]
    assert len({slot.folder for slot in film.slots}) == 5
    assert [take.shot for take in film.shots] == [1, 2, 3, 4, 5]


def test_an_edited_shot_can_show_the_take_of_before(made: Path) -> None:
    text = FOUR_SHOTS.replace("on a wall", "on a roof")
    film, prompts = tell(made, text)
    assert prompts == ["A cat sits on a roof."]
    assert chosen(film) == [1, 1, 2, 1]
    film = choose(made, 3, 1)
    assert why_stale(film)[3] == "made from another text"
    assert tell(made, text)[1] == []


def test_references_of_an_edited_story_join_the_memory(made: Path) -> None:
    plain_image(made / "red.png", (255, 0, 0))
    text = FOUR_SHOTS.replace("seed: 99}", "seed: 99}\n      - {prompt: A bird., references: [red.png]}")
    text = text.replace("scenes:", "characters:\n  - {name: Dog, references: [red.png]}\nscenes:", 1)
    film, prompts = tell(made, text)
    assert prompts == ["A bird."]
    bank = MemoryBank.load(film.folder)
    assert [(k.character, k.shot) for k in bank if k.source] == [("Dog", None), (None, 4)]
    assert {"ref_dog_1", "ref_red_1"} <= set(film.shots[3].memory)
    assert why_stale(film).keys() == {1, 2, 3, 5}, "they were made without the reference"


# The memory


def test_what_the_user_did_to_a_takes_keyframes_stays_when_it_is_chosen_again(made: Path) -> None:
    dropped, painted = (keyframe.id for keyframe in Film.open(made / "film").shots[1].keyframes)
    path = made / "film" / "memory.json"
    memory = json.loads(path.read_text())
    memory["keyframes"] = [entry for entry in memory["keyframes"] if entry["id"] != dropped]
    path.write_text(json.dumps(memory))
    plain_image(made / "film" / "keyframes" / f"{painted}.png", (9, 9, 9), size=(30, 90))
    tell(made, shot="4")
    first = [(k.id, k.sha256, k.shot) for k in MemoryBank.load(made / "film")]
    tell(made, shot="2")
    choose(made, 2, 1)
    assert [(k.id, k.sha256, k.shot) for k in MemoryBank.load(made / "film")] == first
    choose(made, 2, 2)
    choose(made, 2, 1)
    assert [(k.id, k.sha256, k.shot) for k in MemoryBank.load(made / "film")] == first


# Unfinished films


class Stop(Exception):
    """Ends a run."""


def interrupted(folder: Path, text: str, after: int, **how: Any) -> Film:
    """The film after a run that ends in the middle of a shot, ``after`` so many."""
    teller = storyteller()
    inner, made = teller.generator.generate, []

    def generate(request: Any, on_step: Any = None) -> Any:
        if len(made) == after:
            raise Stop
        made.append(request)
        return inner(request, on_step)

    teller.generator.generate = generate
    teller.generator.first = generate
    with pytest.raises(Stop):
        teller.tell(story(folder, text), folder / "film", **how)
    return Film.open(folder / "film")


def test_an_unfinished_film_can_be_played(tmp_path: Path) -> None:
    film = interrupted(tmp_path, FOUR_SHOTS, 2)
    assert chosen(film) == [1, 1, None, None]
    joined = read_video(film.video)
    assert len(joined) == 9 + 8 + 2 * 9, "cards of the length of the shots"
    cards = joined[17:]
    assert len({card.tobytes() for card in cards}) <= 4
    assert cards.max() > 100, "there is text on them"
    assert (joined[:9] == read_video(film.folder / film.shots[0].file)).all()
    assert (film.folder / "storyboard.html").read_text().count("not made yet") == 2


def test_shots_can_be_made_in_any_order(tmp_path: Path) -> None:
    film, prompts = tell(tmp_path, shots("A dog", "A cat", "A fox"), shot="3")
    assert (prompts, chosen(film)) == (["A fox."], [None, None, 1])
    assert film.shots[0].memory == ()
    film, prompts = tell(tmp_path, shots("A dog", "A cat", "A fox"))
    assert prompts == ["A dog.", "A cat."]
    assert why_stale(film).keys() == {3}
    with pytest.raises(FilmError, match=r"shot 2 continues shot 1, which has no take: make it first, shot=1"):
        tell(tmp_path / "four", shot="2")


def test_takes_that_were_made_before_an_interrupt_stay(made: Path) -> None:
    film = interrupted(made, FOUR_SHOTS, 1, shot="2-4")
    assert chosen(film) == [1, 2, 1, 1]
    assert len(film.takes) == 5
    assert tell(made)[1] == []


# What is asked for


def test_shots_are_named_by_numbers_and_ranges() -> None:
    assert parse_shots("3", 9) == (2,)
    assert parse_shots("7, 3,5-6,6", 9) == (2, 4, 5, 6)
    for wrong in ("", "0", "10", "3-", "5-3", "a", "1,,2", "-3", "9" * 5000, "1-9999999999"):
        with pytest.raises(ValueError, match=r"write numbers from 1 to 9, such as 3 or 3,5-7"):
            parse_shots(wrong, 9)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"following": True}, "following needs a shot"),
        ({"takes": 4}, "takes needs a shot"),
        ({"shot": "3", "resume": "from_shot:2"}, "shot=3 and resume=from_shot:2 exclude each other"),
        ({"shot": "3", "takes": 0}, "takes=0: write a number from 1 to"),
    ],
)
def test_what_is_asked_for_is_checked(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_work(4, **{"shot": None, "following": False, "takes": 1} | asked)


def test_a_choice_is_checked(made: Path) -> None:
    before = files(made / "film")
    with pytest.raises(FilmError, match=r"shot 2 has no take 5; it has 1"):
        choose(made, 2, 5)
    with pytest.raises(ValueError, match=r"take=2 is for one shot, not for shot=2-3"):
        choose(made, "2-3", 2)
    with pytest.raises(ValueError, match=r"take=2 chooses a take of one shot: write shot=3 take=2"):
        choose(made, "null", 2)
    with pytest.raises(FilmError, match="holds no film yet"):
        choose(made, 2, 2, output="no")
    with pytest.raises(ValueError, match=r"seed=5 cannot change: leave seed out .* \(shot=2 seed=5\)"):
        choose(made, 2, 1, "seed=5")
    assert files(made / "film") == before


def test_a_dry_run_chooses_no_take(made: Path) -> None:
    tell(made, shot="2")
    before = files(made / "film")
    assert chosen(choose(made, 2, 1, "dry_run=true")) == [1, 2, 1, 1]
    assert files(made / "film") == before


def test_a_choice_may_repeat_the_seed_of_a_take(made: Path) -> None:
    storyteller(seed=7).tell(story(made, FOUR_SHOTS), made / "film", shot="2")
    assert chosen(choose(made, 2, 1, "seed=7")) == [1, 1, 1, 1]


def test_shots_whose_videos_are_lost_get_other_takes(made: Path) -> None:
    (made / "film" / "shots" / "01_01" / "take_001.mp4").unlink()
    (made / "film" / "shots" / "02_01" / "take_001.mp4").write_bytes(b"no video")
    with pytest.raises(FilmError, match=r"is missing: put it back, or make another take of this shot with shot=1"):
        tell(made)
    film, _ = tell(made, shot="1,3")
    assert chosen(film) == [2, 1, 2, 1]
    assert probe(film.video).frames == 9 + 8 + 9 + 8
