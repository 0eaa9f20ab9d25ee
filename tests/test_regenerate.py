"""Regenerating shots: what fails changes nothing, and what the user did to a film's memory stays."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem.film.folder import Film
from storymem.film.manifest import FilmError
from storymem.film.matching import stale
from storymem.film.memory_command import listed
from storymem.film.storyteller import Storyteller
from storymem.io import FileError, NotFiniteError
from storymem.media.images import read_image
from storymem.media.video import read_video
from storymem.memory import MemoryBank, SinkAndRecent
from storymem.memory.bank import read_entries
from storymem.scorers.scorer import NoQuality
from storymem.stopping import Stopped
from storymem.story import Story
from storymem.wan.shots import OnStep, ShotRequest
from tests.stories import CountingGenerator, content, files, plain_image, story, storyteller

TEXT = """\
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


def write_story(folder: Path, text: str = TEXT) -> Story:
    folder.mkdir(exist_ok=True)
    for name, colour in {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items():
        plain_image(folder / f"{name}.png", colour)
    return story(folder, text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film."""
    folder = tmp_path_factory.mktemp("finished")
    return storyteller().tell(write_story(folder), folder / "film").folder


@pytest.fixture
def made(film: Path) -> Path:
    """A folder with a copy of the film, and its story."""
    write_story(film.parent)
    return film.parent


def regenerate(
    folder: Path, *, resume: str = "from_shot:2", text: str = TEXT, teller: Storyteller | None = None
) -> Film:
    return (teller or storyteller(seed=7)).tell(write_story(folder, text), folder / "film", resume=resume)


def edit_memory(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / "film" / "memory.json"
    manifest = json.loads(path.read_text())
    change(manifest["keyframes"])
    path.write_text(json.dumps(manifest))


def ids_in_memory(folder: Path) -> list[str]:
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
def test_a_failure_leaves_the_film_as_it_was(made: Path, where: str) -> None:
    before = files(made / "film")
    edit_memory(made, lambda entries: entries.append({"image": "keyframes/ref_dog_1.png", "id": "mine"}))
    edited = files(made / "film")
    with pytest.raises(RuntimeError, match="out of memory"):
        regenerate(made, teller=failing(where))
    assert files(made / "film") == edited
    assert {name for name in edited if edited[name] != before[name]} == {"memory.json"}
    film = storyteller().tell(write_story(made), made / "film")
    assert (len(film.shots), film.video) == (3, made / "film" / "film.mp4")


@pytest.mark.parametrize("file", ["film.json", "4.png", "ref_mine_1.png", "ref_mine_1.safetensors", "memory.json.next"])
def test_a_full_disk_leaves_the_film_as_it_was(made: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_image(made / "film" / "mine.jpg", (9, 9, 9))
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
            regenerate(made)
    after = files(made / "film")
    assert after.keys() == before.keys(), "and nothing takes up room"
    # A keyframe may have got its latent, which makes no difference to the old film.
    assert {name for name in after if after[name] != before[name] and "safetensors" not in name} <= {"film.json"}
    film = storyteller().tell(write_story(made), made / "film")
    film.check()
    assert len(film.shots) == 3
    regenerate(made)


class Broken:
    """An encoder or scorer that returns one value."""

    def __init__(self, inner: Any, value: float) -> None:
        self.inner, self.value, self.threshold = inner, value, 0.0

    def embed_images(self, frames: Tensor) -> Tensor:
        return self.inner.embed_images(frames) * self.value

    def score(self, frames: Tensor) -> Tensor:
        return torch.full((len(frames),), self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["embedder", "quality"])
def test_scorers_that_are_not_finite_end_the_run_and_the_shot_is_named(made: Path, part: str, value: float) -> None:
    teller = storyteller(seed=7)
    before = files(made / "film")
    with pytest.raises(NotFiniteError, match=r"shot 2 \(scene 1, shot 2\) was not finished: .*(embedding|quality)"):
        regenerate(made, teller=replace(teller, **{part: Broken(teller.embedder, value)}))
    assert files(made / "film") == before


def test_latents_that_are_not_finite_end_the_run_and_the_shot_is_named(made: Path) -> None:
    edit_memory(made, lambda entries: [entry.pop("sha256") for entry in entries])
    before = files(made / "film")
    with pytest.raises(NotFiniteError, match=r"shot 2 .* was not finished: the latent of keyframe ref_dog_1"):
        regenerate(made, teller=failing("latents"))
    assert files(made / "film") == before


def test_an_interrupted_regeneration_is_resumed_and_earlier_takes_stay(made: Path) -> None:
    before = files(made / "film")
    with pytest.raises(RuntimeError, match="out of memory"):
        regenerate(made, teller=failing("generate", after=1))
    assert [shot.seed for shot in Film.open(made / "film").shots] == [0, 8, 2], "the second shot is new"
    now = files(made / "film")
    changed = {name for name in before if now.get(name) != before[name]}
    assert changed == {"film.json", "memory.json", "film.mp4", "storyboard.html"}
    film = regenerate(made, resume="auto")
    assert [shot.seed for shot in film.shots] == [0, 8, 9]
    assert before.keys() <= files(made / "film").keys()
    afresh = made.parent / "afresh"
    shutil.copytree(made, afresh, ignore=shutil.ignore_patterns("film"))
    storyteller().tell(write_story(afresh), afresh / "film")
    regenerate(afresh)
    assert content(made / "film") == content(afresh / "film")


@pytest.mark.parametrize(
    ("resume", "after", "note"),
    [
        ("auto", 0, "the same command resumes"),
        ("from_shot:2", 0, "the film is as it was; the same command regenerates from shot 2"),
        ("from_shot:2", 1, "the same command without resume=from_shot:2 resumes"),
    ],
)
def test_an_interrupt_names_the_command_that_resumes(made: Path, resume: str, after: int, note: str) -> None:
    if resume == "auto":
        (made / "film").rename(made / "another")
    with pytest.raises(Stopped) as stop:
        regenerate(made, resume=resume, teller=failing("generate", after=after, error=Stopped(15)))
    assert (stop.value.status, stop.value.__notes__) == (143, [note])
    film = regenerate(made, resume="auto" if after else resume)
    assert [shot.seed for shot in film.shots[1:]] == [8, 9]


# The story


def test_regrouped_scenes_keep_the_files_of_the_shots_that_are_kept(tmp_path: Path) -> None:
    head = "title: Four\noverview: O.\nscenes:\n"
    scenes = "  - shots: [{prompt: A.}, {prompt: B.}]\n  - shots: [{prompt: C.}, {prompt: D.}]\n"
    others = "  - shots: [{prompt: A.}, {prompt: B.}, {prompt: C.}]\n  - shots: [{prompt: D.}]\n"
    film = storyteller().tell(story(tmp_path, head + scenes), tmp_path / "film")
    before = [read_video(film.folder / shot.file) for shot in film.shots]
    film = storyteller(seed=7).tell(story(tmp_path, head + others), tmp_path / "film", resume="from_shot:4")
    assert [(shot.prompt, shot.scene, shot.number) for shot in film.shots] == [
        *[("A.", 1, 1), ("B.", 1, 2), ("C.", 1, 3)],
        ("D.", 2, 1),
    ]
    after = [read_video(film.folder / shot.file) for shot in film.shots]
    assert [(one == two).all() for one, two in zip(before, after, strict=True)] == [True, True, True, False]
    np.testing.assert_array_equal(read_video(film.video), np.concatenate(after))
    assert Film.open(tmp_path / "film").shots == film.shots


def test_seeds_of_the_story_stay_with_a_warning(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    film = regenerate(made, text=TEXT.replace('on a wall."}', 'on a wall.", seed: 99}'))
    assert [shot.seed for shot in film.shots] == [0, 8, 99]
    assert "seed=7 does not change shot 3 (scene 2, shot 1): the story gives their seeds" in caplog.text


def test_references_follow_the_story_and_nothing_else_changes(made: Path) -> None:
    edit_memory(made, lambda entries: entries.reverse())
    other = TEXT.replace("[red.png, green.png]", "[green.png, blue.png]")
    film = regenerate(made, text=other, resume="from_shot:3")
    bank = MemoryBank.load(film.folder)
    assert [keyframe.source for keyframe in bank if keyframe.shot is None] == ["green.png", "blue.png"]
    (blue,) = [keyframe for keyframe in bank if keyframe.source == "blue.png"]
    assert (blue.image == (0, 0, 255)).all()
    assert blue.id in film.shots[2].memory
    assert [k.shot for k in bank if k.source is None] == [2, 2, 1, 1, 3, 3], "the order is the user's"
    page = (film.folder / "storyboard.html").read_text()
    assert all((film.folder / name).is_file() for name in re.findall(r'src="([^"]*)"', page))


def test_a_changed_reference_image_is_read_again(made: Path) -> None:
    loaded = write_story(made)
    Image.new("RGB", (96, 64), (7, 7, 7)).save(made / "red.png")
    film = storyteller().tell(loaded, made / "film", resume="from_shot:2")
    bank = MemoryBank.load(film.folder)
    assert (bank[film.shots[1].memory[0]].image == 7).all()
    assert film.shots[0].memory[0] != film.shots[1].memory[0]
    assert [k.source for k in bank if k.shot is None] == ["red.png", "green.png"]


def test_other_networks_embed_and_encode_the_memory_again(made: Path) -> None:
    teller = storyteller(seed=7)
    config = {**teller.config, "model": {**teller.config["model"], "weights": "others"}}
    regenerate(made, teller=replace(teller, config=config))
    assert teller.generator.encoded_keyframes >= 4, "references and the first shot's keyframes too"
    same = storyteller(seed=7)
    regenerate(made, teller=replace(same, config=config), resume="from_shot:3")
    assert same.generator.encoded_keyframes < teller.generator.encoded_keyframes


def test_default_settings_of_scorers_are_no_change_whether_listed_or_not(tmp_path: Path) -> None:
    clip = {"_target_": "storymem.scorers.clip.ClipScorer.from_folder", "folder": "clip"}
    quality = {"_target_": "storymem.scorers.aesthetic.AestheticScorer.from_folder", "folder": "clip", "threshold": 3.0}
    listed = {  # as films of earlier versions record them
        "clip": clip | {"preprocessing": "published_selector", "dtype": "float32", "device": "auto", "batch_size": 32},
        "quality": quality | {"version": "v1", "dtype": "float32", "batch_size": 16},
        "none": {"_target_": "storymem.scorers.quality.NoQuality"},
    }
    now = {"clip": clip, "quality": quality, "none": {"_target_": "storymem.scorers.scorer.NoQuality"}}

    def generated(scorer: dict[str, Any], resume: str = "auto") -> Film:
        teller = storyteller()
        teller = replace(teller, config={**teller.config, "scorer": scorer})
        return teller.tell(write_story(tmp_path), tmp_path / "film", resume=resume)

    recorded = generated(listed).config
    made = content(tmp_path / "film")
    for resume in ("auto", "from_shot:3"):
        assert generated(now, resume).config == recorded
        assert content(tmp_path / "film") == made, "keyframes are not encoded again"
    other = now | {"clip": clip | {"preprocessing": "published_aesthetic"}}
    with pytest.raises(FilmError, match=r"clip\.preprocessing: 'published_selector' before, 'published_aesthetic'"):
        generated(other)
    generated(other, "from_shot:3")
    assert content(tmp_path / "film") != made


def test_without_a_filter_nothing_is_scored(made: Path) -> None:
    film = regenerate(made, teller=storyteller(seed=7, quality=NoQuality()))
    assert {keyframe.quality for shot in film.shots for keyframe in shot.keyframes} == {None}


# A memory that the user edited


@pytest.mark.parametrize("resume", ["from_shot:1", "from_shot:2", "from_shot:3"])
def test_a_deleted_reference_stays_away(made: Path, resume: str, caplog: pytest.LogCaptureFixture) -> None:
    edit_memory(made, lambda entries: entries.pop(0))
    film = regenerate(made, resume=resume)
    assert "memory.json was changed since it was written; it is used as it is" in caplog.text
    assert ids_in_memory(made)[0] == "ref_dog_2"
    assert all("ref_dog_1" not in shot.memory for shot in film.shots[int(resume[-1]) - 1 :])


@pytest.mark.parametrize(("resume", "size"), [("from_shot:1", (48, 32)), ("from_shot:2", (30, 90))])
def test_a_replaced_reference_stays(
    made: Path, resume: str, size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    path = made / "film" / "keyframes" / "ref_dog_1.png"
    plain_image(path, (9, 9, 9), size=size)
    painted = path.read_bytes()
    film = regenerate(made, resume=resume)
    assert "keyframes/ref_dog_1.png is not the image that memory.json was written with" in caplog.text
    first = MemoryBank.load(film.folder)[film.shots[2].memory[0]]
    assert first.image.shape == (32, 48, 3)
    assert (first.image[16, 24] == 9).all()
    assert first.character == "Dog"
    assert path.read_bytes() == painted, "a fitted image has a file of its own"
    assert read_image(film.folder / "keyframes" / f"{first.id}.png").shape == (32, 48, 3)
    caplog.clear()
    assert regenerate(made, resume="from_shot:3").shots[2].memory[0] == first.id
    assert "memory.json" not in caplog.text


def test_added_images_are_fitted_and_recalled(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, size in {"tall.jpg": (30, 90), "large.png": (960, 640), "dot.png": (1, 1)}.items():
        plain_image(made / "film" / name, (9, 9, 9), size=size)
    added = [{"image": "tall.jpg"}, {"image": "large.png", "shot": 3}, {"image": "dot.png", "character": "Dog"}]
    edit_memory(made, lambda entries: entries.extend(added))
    film = regenerate(made)
    assert "tall.jpg was added to memory.json, fitted from 30x90 to 48x32; it becomes keyframe ref_tall" in caplog.text
    mine = ["ref_tall_1", "ref_large_1", "ref_dot_1"]
    assert set(mine) & set(film.shots[1].memory) == {"ref_tall_1", "ref_dot_1"}, "the other waits for its shot"
    assert set(mine) <= set(film.shots[2].memory)
    assert all((made / "film" / name["image"]).is_file() for name in added)
    regenerate(made, resume="from_shot:2")
    assert set(mine) <= set(ids_in_memory(made)), "they stay, whatever is regenerated"


def test_an_added_image_that_is_not_recalled_is_reported(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain_image(made / "film" / "mine.png", (9, 9, 9))
    edit_memory(made, lambda entries: entries.insert(2, {"image": "mine.png"}))
    regenerate(made, resume="from_shot:3", teller=storyteller(seed=7, recall=SinkAndRecent(capacity=2, sink=1)))
    assert "ref_mine_1, added or replaced by the user, not recalled for shot 3 (scene 2, shot 1)" in caplog.text
    assert "SinkAndRecent(capacity=2, sink=1) recalls 2 of " in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        *({"image": name} for name in ("nowhere.png", "notes.txt", "../red.png", "/etc/hostname", "linked.png")),
        *({"image": name} for name in ("shots", "fifo.png", "a\0b.png")),
        *({"id": "x" * 300}, {"id": "mine", "shot": -1}, {"id": "mine", "shot": 10**30}, {"id": "mine", "image": 7}),
        *({"image": "notes.txt", "quality": "good"}, [], None),
    ],
)
def test_an_entry_that_cannot_be_used_is_reported_and_changes_nothing(made: Path, damage: Any) -> None:
    film = made / "film"
    (film / "notes.txt").write_text("no image")
    (film / "linked.png").symlink_to(made / "red.png")
    os.mkfifo(film / "fifo.png")
    edit_memory(made, lambda entries: entries.append(damage))
    before = files(film)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(film))):
        regenerate(made)
    assert files(film) == before


def test_the_advice_for_a_damaged_memory_works(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = made / "film" / "memory.json"
    before = [(k.id, k.shot, k.frame, k.sha256, k.character) for k in MemoryBank.load(made / "film")]
    for damage in ("{", "[]"):
        path.write_text(damage)
        damaged = files(made / "film")
        with pytest.raises(ValueError, match=r"or delete it: storymem generate writes it from the takes, without your"):
            regenerate(made)
        assert files(made / "film") == damaged
    path.unlink()
    film = Film.open(made / "film")
    assert "memory.json is missing" in listed(film)
    assert stale(film, read_entries(film.folder)) == {}
    regenerate(made, resume="auto", teller=storyteller())
    assert "memory.json is missing: it is written again from the takes" in caplog.text
    assert [(k.id, k.shot, k.frame, k.sha256, k.character) for k in MemoryBank.load(made / "film")] == before
    film = Film.open(made / "film")
    assert stale(film, read_entries(film.folder)) == {}, "takes recalled what is in the memory again"


def test_tensors_in_memory_that_are_not_finite_are_reported(made: Path) -> None:
    path = made / "film" / "keyframes" / "ref_dog_1.safetensors"
    tensors = load_file(path)
    for name in ("embedding", "latent"):
        save_file(tensors | {name: tensors[name] * float("nan")}, path)
        before = files(made / "film")
        with pytest.raises(NotFiniteError, match=rf"the {name} in .*ref_dog_1\.safetensors: NaN"):
            regenerate(made)
        assert files(made / "film") == before
    edit_memory(made, lambda entries: entries[0].pop("sha256"))  # as the message advises
    regenerate(made)
