"""The committed toy stories are those that the generator writes, and keep the rules of their datasheet."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from storymem.story import Story, load_story
from toyworld import WEIGHTS
from toyworld.attributes import BODY_COLOURS, EYES, HATS, PROP_COLOURS, SHAPES
from toyworld.stories import benchmark, write_stories
from toyworld.text import TEXT_TOKENS, load_tokenizer
from toyworld.words import read_prompt
from toyworld.world import ToyStory

FOLDER = Path(__file__).parents[2] / "st_bench" / "toy"


@cache
def drawn() -> dict[str, ToyStory]:
    return benchmark()


@cache
def written() -> list[Story]:
    return [load_story(FOLDER / name) for name in drawn()]


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table under ``heading`` in the datasheet, without its head."""
    section = (FOLDER / "README.md").read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_files_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    write_stories(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    assert len(made) == 30


def test_the_files_have_prompts_cuts_and_casts_of_the_world() -> None:
    for file, one in zip(written(), drawn().values(), strict=True):
        assert [len(scene.shots) for scene in file.scenes] == [len(scene) for scene in one.scenes]
        for shot, true in zip(file.shots, one.shots, strict=True):
            assert (shot.prompt, shot.cut) == (true.prompt, true.cut)
            assert shot.characters == tuple(character.name for character in true.cast)
        assert file.source is not None
        assert file.source.stem[3:] == file.slug


def test_names_and_places_appear_and_looks_do_not() -> None:
    looks = {*SHAPES, *BODY_COLOURS, *HATS, *EYES, *PROP_COLOURS}
    for file in written():
        for text in (file.overview, *(shot.prompt for shot in file.shots)):
            assert not {look for look in looks if re.search(rf"\b{look}\b", text)}, text
        for shot in file.shots:
            assert all(name in shot.prompt for name in shot.characters)
            assert read_prompt(shot.prompt).place.split()[0] in shot.prompt
        assert all(character.name in file.overview for character in file.characters)


def test_described_stories_give_each_look_once_in_the_first_shot_that_shows_it(tmp_path: Path) -> None:
    write_stories(tmp_path, described=True)
    tokenizer = load_tokenizer(WEIGHTS / "tokenizer")
    for (name, one), plain in zip(drawn().items(), written(), strict=True):
        made, shown = load_story(tmp_path / name), set[str]()
        for shot, before, true in zip(made.shots, plain.shots, one.shots, strict=True):
            added = shot.prompt.removeprefix(before.prompt)
            described = set(re.findall(r"(\w+) is a", added))
            assert described == {c.name for c in true.cast} - shown
            assert all(f"{c.look.shape} {c.look.colour}" in added for c in true.cast if c.name in described)
            assert (f"{true.scenery.flag} flag" in added) == (true.place not in shown)
            assert read_prompt(shot.prompt) == read_prompt(before.prompt)
            assert len(tokenizer(shot.prompt)["input_ids"]) <= TEXT_TOKENS
            shown |= {true.place, *described}


def test_every_character_returns_after_a_cut() -> None:
    for file in written():
        seen = Counter(name for shot in file.shots if shot.cut for name in shot.characters)
        assert set(seen) == {character.name for character in file.characters}
        assert min(seen.values()) >= 2
    assert Counter(len(file.characters) for file in written()) == {1: 10, 2: 10, 3: 10}
    assert len({file.title for file in written()}) == 30


def test_the_text_encoder_reads_all_of_every_text() -> None:
    tokenizer = load_tokenizer(WEIGHTS / "tokenizer")
    texts = [text for file in written() for text in (file.overview, *(shot.prompt for shot in file.shots))]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert max(lengths) <= TEXT_TOKENS == 80


def test_the_datasheet_counts_what_is_there() -> None:
    shots = [shot for file in written() for shot in file.shots]
    back = sum(len({scene[0].place for scene in one.scenes}) < len(one.scenes) for one in drawn().values())
    assert rows("Counts") == [
        ["stories", str(len(written()))],
        ["scenes", str(sum(len(file.scenes) for file in written()))],
        ["shots", str(len(shots))],
        ["shots that continue the one before (`cut: false`)", str(sum(not shot.cut for shot in shots))],
        ["shots with two characters", str(sum(len(shot.characters) == 2 for shot in shots))],
        ["stories that come back to a place in a later scene", str(back)],
    ]
    assert rows("Stories") == [
        [
            f"[{file.title}]({name})",
            str(one.seed),
            str(len(file.scenes)),
            str(sum(not shot.cut for shot in file.shots)),
            ", ".join(dict.fromkeys(shot.place for shot in one.shots)),
        ]
        for file, (name, one) in zip(written(), drawn().items(), strict=True)
    ]


def test_the_datasheet_gives_the_lengths_of_texts_for_clip_and_viclip() -> None:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    found = []
    for name, texts in (
        ("prompts", [shot.prompt for file in written() for shot in file.shots]),
        ("overviews", [file.overview for file in written()]),
    ):
        lengths = [len(tokenizer.encode(text)) + 2 for text in texts]  # with the start and end token
        found.append([name, *(f"{figure:g}" for figure in (len(lengths), min(lengths), median(lengths), max(lengths)))])
    assert rows("Prompt lengths") == found
    assert max(int(row[-1]) for row in found) <= 32, "ViCLIP reads 32"


@pytest.mark.parametrize("mode", ["independent", "nameless"])
def test_the_ceilings_of_the_datasheet_are_what_a_simulation_gives(mode: str) -> None:
    from tests.toyworld.film_makers import share_of_characters

    groups = [list(drawn().values())[start : start + 10] for start in (0, 10, 20)]
    found = [sum(share_of_characters(one, mode, tries=150) for one in group) / 10 for group in groups]
    (row,) = [row for row in rows("What can be reached") if row[0].startswith(mode)]
    assert [float(cell.rstrip(" %")) / 100 for cell in row[1:4]] == pytest.approx(found, abs=0.025)
