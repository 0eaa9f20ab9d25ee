"""Making shots again: what fails changes nothing, and what a person did to a film's memory stays."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from storymem.film.folder import Film, FilmError
from storymem.film.progress import Progress
from storymem.film.storyteller import Storyteller
from storymem.io import FileError, NotFiniteError
from storymem.media.images import read_image
from storymem.media.video import read_video
from storymem.memory import MemoryBank, SinkAndRecent
from storymem.scorers.scorer import NoQuality
from storymem.stopping import Stopped
from storymem.story import Story
from storymem.wan.shots import OnStep, ShotRequest
from tests.stories import CountingGenerator, content, picture, story, storyteller

TOLD = """\
title: Three
overview: A short walk.
characters:
  - {name: Dog, references: [red.png, green.png]}
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
  - shots:
      - {prompt: "A cat sits on a wall."}
"""


def write_story(folder: Path, text: str = TOLD) -> Story:
    folder.mkdir(exist_ok=True)
    for name, colour in {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items():
        picture(folder / f"{name}.png", colour)
    return story(folder, text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a story and its film."""
    folder = tmp_path_factory.mktemp("finished")
    storyteller().tell(write_story(folder), folder / "film")
    return folder


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "made")
    return tmp_path / "made"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a film; a lock is none."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


def tell_again(
    folder: Path, *, resume: str = "from_shot:2", text: str = TOLD, teller: Storyteller | None = None
) -> tuple[Film, str]:
    """The film made again from a shot, and what was said."""
    said = StringIO()
    told = write_story(folder, text)
    film = (teller or storyteller(seed=7)).tell(told, folder / "film", resume=resume, progress=Progress(stream=said))
    return film, said.getvalue()


def edit_memory(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / "film" / "memory.json"
    manifest = json.loads(path.read_text())
    change(manifest["keyframes"])
    path.write_text(json.dumps(manifest))


def remembered(folder: Path) -> list[str]:
    return [keyframe.id for keyframe in MemoryBank.load(folder / "film")]


# What fails changes nothing


class Failing(CountingGenerator):
    """The real generator, which fails in one of its methods."""

    error: BaseException = RuntimeError("CUDA out of memory")
    where = "generate"
    after = 0  # so many shots

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        self._fail("prepare")
        super().prepare(prompts, negative_prompts)

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        self._fail("generate")
        return super().generate(request, on_step)

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]:
        self._fail("encode_keyframes")
        latents = super().encode_keyframes(frames)
        return [latent * float("nan") for latent in latents] if self.where == "latents" else latents

    def _fail(self, where: str) -> None:
        if where == self.where and len(self.requests) >= self.after:
            raise self.error


def failing(where: str, **changes: Any) -> Storyteller:
    teller = storyteller(seed=7)
    generator = Failing(**{n: getattr(teller.generator, n) for n in ("model", "sampler", "runtime", "continuity")})
    vars(generator).update(changes, where=where)
    return replace(teller, generator=generator)


@pytest.mark.parametrize("where", ["prepare", "generate", "encode_keyframes"])
def test_a_failure_while_shots_are_made_again_leaves_the_film_as_it_was(made: Path, where: str) -> None:
    before = files(made / "film")
    edit_memory(made, lambda entries: entries.append({"image": "keyframes/ref_dog_1.png", "id": "mine"}))
    edited = files(made / "film")
    with pytest.raises(RuntimeError, match="out of memory"):
        tell_again(made, teller=failing(where))
    assert files(made / "film") == edited
    assert {name for name in edited if edited[name] != before[name]} == {"memory.json"}
    film = storyteller().tell(write_story(made), made / "film")
    assert (len(film.shots), film.video) == (3, made / "film" / "film.mp4")


@pytest.mark.parametrize("file", ["film.json", "4.png", "ref_mine_1.png", "ref_mine_1.safetensors", "memory.json.next"])
def test_a_full_disk_while_shots_are_made_again_leaves_the_film_as_it_was(
    made: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(made / "film" / "mine.jpg", (9, 9, 9))
    edit_memory(made, lambda entries: entries.append({"image": "mine.jpg"}))
    before, write = files(made / "film"), Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if file in path.name:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(FileError, match=r"could not be written: the disk is full; make room and run the same"):
            tell_again(made)
    after = files(made / "film")
    assert after.keys() == before.keys(), "and nothing takes up room"
    # A keyframe's latent may have been made, which the old film does not mind.
    assert {name for name in after if after[name] != before[name] and "safetensors" not in name} <= {"film.json"}
    film = storyteller().tell(write_story(made), made / "film")
    film.check(pytest.fail)
    assert (len(film.shots), film.is_joined) == (3, True)
    tell_again(made)


class Broken:
    """An encoder of pictures, or a scorer, whose weights are not numbers."""

    def __init__(self, inner: Any, value: float) -> None:
        self.inner, self.value, self.threshold = inner, value, 0.0

    def embed_images(self, frames: Tensor) -> Tensor:
        return self.inner.embed_images(frames) * self.value

    def score(self, frames: Tensor) -> Tensor:
        return torch.full((len(frames),), self.value)

    def to(self, device: Any = None) -> Broken:
        return self


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["embedder", "quality"])
def test_values_of_scorers_that_are_no_numbers_end_the_run_and_name_the_shot(
    made: Path, part: str, value: float
) -> None:
    teller = storyteller(seed=7)
    before = files(made / "film")
    with pytest.raises(NotFiniteError, match=r"shot 2 \(scene 1, shot 2\) was not finished: .*(embedding|quality)"):
        tell_again(made, teller=replace(teller, **{part: Broken(teller.embedder, value)}))
    assert files(made / "film") == before


def test_latents_that_are_no_numbers_end_the_run_and_name_the_shot(made: Path) -> None:
    def forget_latents(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            del entry["sha256"]

    edit_memory(made, forget_latents)
    before = files(made / "film")
    with pytest.raises(NotFiniteError, match=r"shot 2 .* was not finished: the latent of keyframe ref_dog_1"):
        tell_again(made, teller=failing("latents"))
    assert files(made / "film") == before


def test_old_takes_stay_until_the_film_is_whole_again(made: Path) -> None:
    before = files(made / "film")
    with pytest.raises(RuntimeError, match="out of memory"):
        tell_again(made, teller=failing("generate", after=1))
    film = Film.open(made / "film")
    assert [shot.seed for shot in film.shots] == [0, 8], "the second shot was made again"
    kept = files(made / "film")
    changed = {name for name in before if kept.get(name) != before[name]}
    assert changed == {"film.json", "memory.json"}, "the old shots and the old film.mp4 are there"

    film, _ = tell_again(made, resume="auto")
    assert [shot.seed for shot in film.shots] == [0, 8, 9]
    assert len([name for name in files(made / "film") if name.endswith(".mp4")]) == 4
    afresh = made.parent / "afresh"
    shutil.copytree(made, afresh, ignore=shutil.ignore_patterns("film"))
    storyteller().tell(write_story(afresh), afresh / "film")
    tell_again(afresh)
    assert content(made / "film") == content(afresh / "film")


@pytest.mark.parametrize(
    ("resume", "after", "note"),
    [
        ("auto", 0, "the same command goes on from here"),
        ("from_shot:2", 0, "the film is as it was, and the same command begins with shot 2 again"),
        ("from_shot:2", 1, "the same command without resume=from_shot:2 goes on from here"),
    ],
)
def test_who_stops_it_is_told_what_goes_on(made: Path, resume: str, after: int, note: str) -> None:
    if resume == "auto":
        (made / "film").rename(made / "another")
    with pytest.raises(Stopped) as stop:
        tell_again(made, resume=resume, teller=failing("generate", after=after, error=Stopped(15)))
    assert (stop.value.status, stop.value.__notes__) == (143, [note])
    film, _ = tell_again(made, resume="auto" if after else resume)
    assert [shot.seed for shot in film.shots[1:]] == [8, 9]


# The story


def test_regrouped_scenes_keep_the_files_of_the_shots_that_are_kept(tmp_path: Path) -> None:
    four = """\
title: Four
overview: O.
scenes:
  - shots: [{prompt: A.}, {prompt: B.}]
  - shots: [{prompt: C.}, {prompt: D.}]
"""
    other = four.replace("{prompt: B.}]", "{prompt: B.}, {prompt: C.}]").replace("[{prompt: C.}, {p", "[{p")
    film = storyteller().tell(story(tmp_path, four), tmp_path / "film")
    before = [read_video(film.folder / shot.file) for shot in film.shots]
    again = storyteller(seed=7).tell(story(tmp_path, other), tmp_path / "film", resume="from_shot:4")
    assert [(shot.prompt, shot.scene, shot.number) for shot in again.shots] == [
        *[("A.", 1, 1), ("B.", 1, 2), ("C.", 1, 3)],
        ("D.", 2, 1),
    ]
    after = [read_video(again.folder / shot.file) for shot in again.shots]
    assert [(one == two).all() for one, two in zip(before, after, strict=True)] == [True, True, True, False]
    np.testing.assert_array_equal(read_video(again.video), np.concatenate(after))
    assert Film.open(tmp_path / "film").shots == again.shots


def test_the_command_that_goes_on_is_told(made: Path) -> None:
    tell_again(made)
    with pytest.raises(FilmError, match=r"seed: 0 before|seed: 7 before, 0 now(?s:.)*add seed=7$"):
        tell_again(made, resume="auto", teller=storyteller())
    film, _ = tell_again(made, resume="auto", teller=storyteller(seed=7))
    assert [shot.seed for shot in film.shots] == [0, 8, 9]


def test_seeds_of_the_story_are_not_changed_and_that_is_said(made: Path) -> None:
    text = TOLD.replace('on a wall."}', 'on a wall.", seed: 99}')
    film, said = tell_again(made, text=text, resume="from_shot:2")
    assert [shot.seed for shot in film.shots] == [0, 8, 99]
    assert "seed=7 does not change shot 3 (scene 2, shot 1): the story gives them seeds of their own" in said


# Memory by hand


@pytest.mark.parametrize("resume", ["from_shot:1", "from_shot:2", "from_shot:3"])
def test_a_reference_that_a_person_deleted_stays_away(made: Path, resume: str) -> None:
    edit_memory(made, lambda entries: entries.pop(0))
    film, said = tell_again(made, resume=resume)
    assert "memory.json was changed since the last shot; it is used as it is now" in said
    assert remembered(made)[0] == "ref_dog_2"
    assert all("ref_dog_1" not in shot.memory for shot in film.shots[int(resume[-1]) - 1 :])


@pytest.mark.parametrize("size", [(48, 32), (30, 90)])
@pytest.mark.parametrize("resume", ["from_shot:1", "from_shot:2"])
def test_a_reference_that_a_person_replaced_stays(made: Path, resume: str, size: tuple[int, int]) -> None:
    path = made / "film" / "keyframes" / "ref_dog_1.png"
    picture(path, (9, 9, 9), size=size)
    painted = path.read_bytes()
    film, said = tell_again(made, resume=resume)
    assert "keyframes/ref_dog_1.png is not the picture that memory.json was written with" in said
    first = MemoryBank.load(film.folder)[film.shots[2].memory[0]]
    assert first.image.shape == (32, 48, 3)
    assert (first.image[16, 24] == 9).all()
    assert first.character == "Dog"
    assert path.read_bytes() == painted, "a fitted picture lies beside it"
    assert read_image(film.folder / "keyframes" / f"{first.id}.png").shape == (32, 48, 3)
    again, said = tell_again(made, resume="from_shot:3")
    assert again.shots[2].memory[0] == first.id
    assert "memory.json" not in said


def test_pictures_added_by_hand_are_fitted_and_recalled(made: Path) -> None:
    for name, size in {"tall.jpg": (30, 90), "large.png": (960, 640), "dot.png": (1, 1)}.items():
        picture(made / "film" / name, (9, 9, 9), size=size)
    added = [{"image": "tall.jpg"}, {"image": "large.png", "shot": 2}, {"image": "dot.png", "character": "Dog"}]
    edit_memory(made, lambda entries: entries.extend(added))
    film, said = tell_again(made)
    assert "tall.jpg was added to memory.json, fitted from 30x90 to 48x32; it is remembered as ref_tall_1" in said
    mine = ["ref_tall_1", "ref_large_1", "ref_dot_1"]
    assert set(mine) & set(film.shots[1].memory) == {"ref_tall_1", "ref_dot_1"}, "the other waits for its shot"
    assert set(mine) <= set(film.shots[2].memory)
    assert all((made / "film" / name["image"]).is_file() for name in added)

    tell_again(made, resume="from_shot:2")
    assert set(mine) <= set(remembered(made)), "they stay, whatever is made again"


def test_a_picture_by_hand_that_is_not_recalled_is_told_with_the_reason(made: Path) -> None:
    picture(made / "film" / "mine.png", (9, 9, 9))
    edit_memory(made, lambda entries: entries.insert(2, {"image": "mine.png"}))
    teller = storyteller(seed=7, recall=SinkAndRecent(capacity=2, sink=1))
    _, said = tell_again(made, resume="from_shot:3", teller=teller)
    assert "ref_mine_1, changed by hand, not recalled for shot 3 (scene 2, shot 1)" in said
    assert "SinkAndRecent(capacity=2, sink=1) gives it 2 of " in said


@pytest.mark.parametrize(
    "damage",
    [
        {"image": "nowhere.png"},
        {"image": "notes.txt"},
        {"image": "../red.png"},
        {"image": "/etc/hostname"},
        {"image": "linked.png"},
        {"image": "shots"},
        {"image": "fifo.png"},
        {"image": "a\0b.png"},
        {"id": "x" * 300},
        {"id": "mine", "shot": -1},
        {"id": "mine", "shot": 10**30},
        {"id": "mine", "image": 7},
        {"image": "notes.txt", "quality": "good"},
        [],
        None,
    ],
)
def test_an_entry_that_cannot_be_used_is_told_and_costs_nothing(made: Path, damage: Any) -> None:
    film = made / "film"
    (film / "notes.txt").write_text("no picture")
    (film / "linked.png").symlink_to(made / "red.png")
    os.mkfifo(film / "fifo.png")
    edit_memory(made, lambda entries: entries.append(damage))
    before = files(film)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(film))):
        tell_again(made)
    assert files(film) == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[]",
        "7",
        '{"schema": 1}',
        '{"schema": [1], "keyframes": []}',
        "[" * 5000,
        '{"schema": 1e999}',
        "\udcff",
    ],
)
def test_a_damaged_memory_is_told_and_costs_nothing(made: Path, content: str) -> None:
    (made / "film" / "memory.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    before = files(made / "film")
    with pytest.raises(ValueError, match=r"memory\.json.*(: put it back|; put it back|must hold|has schema)"):
        tell_again(made)
    assert files(made / "film") == before


def test_the_advice_for_a_damaged_memory_works(made: Path) -> None:
    path = made / "film" / "memory.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"or delete it and make all shots again with resume=from_shot:1"):
        tell_again(made)
    path.unlink()
    with pytest.raises(FilmError, match=r"memory\.json is missing: .*resume=from_shot:1"):
        tell_again(made)
    film, _ = tell_again(made, resume="from_shot:1")
    assert film.video is not None
    assert remembered(made)[:2] == ["ref_dog_3", "ref_dog_4"]


def test_values_in_memory_that_are_no_numbers_are_told(made: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = made / "film" / "keyframes" / "ref_dog_1.safetensors"
    tensors = load_file(path)
    for name in ("embedding", "latent"):
        save_file(tensors | {name: tensors[name] * float("nan")}, path)
        before = files(made / "film")
        with pytest.raises(NotFiniteError, match=rf"the {name} in .*ref_dog_1\.safetensors: NaN"):
            tell_again(made)
        assert files(made / "film") == before
    edit_memory(made, lambda entries: entries[0].pop("sha256"))  # as the message says
    tell_again(made)


def test_references_follow_the_story_and_nothing_else_changes(made: Path) -> None:
    edit_memory(made, lambda entries: entries.reverse())
    other = TOLD.replace("[red.png, green.png]", "[green.png, blue.png]")
    film, _ = tell_again(made, text=other, resume="from_shot:3")
    bank = MemoryBank.load(film.folder)
    assert [keyframe.source for keyframe in bank if keyframe.shot is None] == ["green.png", "blue.png"]
    (blue,) = [keyframe for keyframe in bank if keyframe.source == "blue.png"]
    assert (blue.image == (0, 0, 255)).all()
    assert blue.id in film.shots[2].memory
    assert [k.shot for k in bank if k.source is None] == [1, 1, 0, 0, 2, 2], "the order is a person's"
    page = (film.folder / "storyboard.html").read_text()
    assert all((film.folder / name).is_file() for name in re.findall(r"src='([^']*)'", page))


def test_a_repainted_reference_is_read_anew(made: Path) -> None:
    said = StringIO()
    told = write_story(made)
    Image.new("RGB", (96, 64), (7, 7, 7)).save(made / "red.png")
    film = storyteller().tell(told, made / "film", resume="from_shot:2", progress=Progress(stream=said))
    bank = MemoryBank.load(film.folder)
    assert (bank[film.shots[1].memory[0]].image == 7).all()
    assert film.shots[0].memory[0] != film.shots[1].memory[0]
    assert [k.source for k in bank if k.shot is None] == ["red.png", "green.png"]


def test_other_networks_embed_and_encode_the_memory_anew(made: Path) -> None:
    teller = storyteller(seed=7)
    config = {**teller.config, "model": {**teller.config["model"], "weights": "others"}}
    generator = teller.generator
    tell_again(made, teller=replace(teller, config=config))
    assert generator.encoded_keyframes >= 4, "references and the first shot's keyframes too"
    same = storyteller(seed=7)
    tell_again(made, teller=replace(same, config=config), resume="from_shot:3")
    assert same.generator.encoded_keyframes < generator.encoded_keyframes


def test_without_a_filter_nothing_is_scored(made: Path) -> None:
    film, _ = tell_again(made, teller=storyteller(seed=7, quality=NoQuality()))
    assert {keyframe.quality for shot in film.shots for keyframe in shot.keyframes} == {None}
