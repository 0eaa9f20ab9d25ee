"""The benchmark's stories keep the rules of their datasheet, and every figure in the datasheet is theirs."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from storymem.story import Story, load_story

FOLDER = Path(__file__).parent.parent / "st_bench"
FILES = sorted((FOLDER / "stories").glob("*.yaml"))
GENRES = ("realistic", "historical", "fairy-tale", "science-fiction", "animated", "documentary", "cinematic")
VICLIP_CONTEXT, CLIP_CONTEXT = 32, 77

# What a viewer of a film without sound cannot check.
UNSEEN = (
    r"\b(sounds?|noise|hears?|listens?|smells?|scent|taste|thinks?|thought|remembers?|feels?|silent|silence|"
    r"quiet(ly)?|loud(ly)?|whispers?|hums?|sings?|songs?|music|barks?|echo(es)?|hopes?|wants?|dreams?|knows?)\b"
)


@cache
def stories() -> tuple[Story, ...]:
    return tuple(load_story(path) for path in FILES)


def continued(story: Story) -> int:
    return sum(not shot.cut for shot in story.shots)


def recurring(story: Story) -> int:
    """How many characters of ``story`` are listed in two or more of its shots."""
    listed = Counter(name for shot in story.shots for name in shot.characters)
    return sum(count >= 2 for count in listed.values())


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under ``heading`` in the datasheet, without its head."""
    section = (FOLDER / "README.md").read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# The stories


def test_thirty_stories_hold_three_hundred_shots_of_which_a_third_to_a_half_continue() -> None:
    assert len(stories()) == 30
    assert sum(len(story.shots) for story in stories()) == 300
    assert 100 <= sum(continued(story) for story in stories()) <= 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_story_keeps_the_rules(path: Path) -> None:
    story = load_story(path)
    assert 8 <= len(story.shots) <= 12
    assert 2 <= len(story.scenes) <= 5
    assert len(story.shots) <= 3 * continued(story) <= 1.5 * len(story.shots)
    assert story.genre in GENRES
    assert path.stem[3:] == story.slug
    assert 1 <= len(sentences(story.overview)) <= 3
    for shot in story.shots:
        assert 1 <= len(sentences(shot.prompt)) <= 4, shot.label
        assert not re.search(UNSEEN, shot.prompt, re.IGNORECASE), shot.label


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?](?=\s|$)", text.replace("Dr. ", "Dr "))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shot_lists_exactly_the_characters_its_prompt_names(path: Path) -> None:
    story = load_story(path)
    for shot in story.shots:
        named = {one.name for one in story.characters if re.search(rf"\b{re.escape(one.name)}\b", shot.prompt)}
        assert named == set(shot.characters), shot.label
    listed = Counter(name for shot in story.shots for name in shot.characters)
    assert all(listed[character.name] >= 2 for character in story.characters)


def test_a_continued_shot_shares_someone_with_the_shot_it_continues() -> None:
    for story in stories():
        for before, shot in zip(story.shots, story.shots[1:], strict=False):
            if not shot.cut:
                assert before.scene == shot.scene, (story.title, shot.label)
                assert set(before.characters) & set(shot.characters), (story.title, shot.label)


def test_the_style_of_animation_or_documentary_is_named_first_in_every_prompt() -> None:
    for story in stories():
        if story.genre in ("animated", "documentary"):
            ways = {re.split("[,:]", shot.prompt)[0] for shot in story.shots}
            assert len(ways) == 1, (story.title, ways)


def test_texts_are_unique() -> None:
    prompts = [shot.prompt for story in stories() for shot in story.shots]
    titles = [story.title for story in stories()]
    names = [character.name for story in stories() for character in story.characters]
    for texts in (prompts, titles, names):
        assert [text for text, count in Counter(texts).items() if count > 1] == []


# The datasheet


def test_the_counts_are_those_of_the_files() -> None:
    everything = [shot for story in stories() for shot in story.shots]
    assert table("Counts") == [
        ["stories", str(len(stories()))],
        ["scenes", str(sum(len(story.scenes) for story in stories()))],
        ["shots", str(len(everything))],
        ["shots that continue the one before (`cut: false`)", str(sum(not shot.cut for shot in everything))],
        ["shots without a listed character", str(sum(not shot.characters for shot in everything))],
        [
            "shots with two or more listed characters",
            str(sum(len(shot.characters) > 1 for shot in everything)),
        ],
        ["characters", str(sum(len(story.characters) for story in stories()))],
        [
            "stories with two or more recurring characters",
            str(sum(recurring(story) > 1 for story in stories())),
        ],
    ]


def test_the_counts_per_genre_are_those_of_the_files() -> None:
    rows = []
    for genre in GENRES:
        chosen = [story for story in stories() if story.genre == genre]
        shots, cuts = sum(len(story.shots) for story in chosen), sum(continued(story) for story in chosen)
        rows.append([genre, str(len(chosen)), str(shots), str(cuts)])
    assert table("Genres") == rows


def test_the_list_of_stories_is_that_of_the_files() -> None:
    assert table("Stories") == [
        [
            f"[{story.title}](stories/{path.name})",
            str(story.genre),
            str(len(story.scenes)),
            str(len(story.shots)),
            str(continued(story)),
            ", ".join(character.name for character in story.characters),
        ]
        for path, story in zip(FILES, stories(), strict=True)
    ]


def test_the_prompt_lengths_are_those_of_the_tokenizer() -> None:
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    rows = []
    for name, texts in (
        ("prompts", [shot.prompt for story in stories() for shot in story.shots]),
        ("overviews", [story.overview for story in stories()]),
    ):
        # The start and the end token take two places of the context.
        lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
        longer = [sum(length > context for length in lengths) for context in (VICLIP_CONTEXT, CLIP_CONTEXT)]
        figures = [len(lengths), min(lengths), median(lengths), max(lengths), *longer]
        rows.append([name, *(f"{figure:g}" for figure in figures)])
    assert table("Prompt lengths") == rows


def test_titles_named_in_the_datasheet_exist() -> None:
    text = " ".join((FOLDER / "README.md").read_text().split())
    named = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)
    assert len(named) >= 5
    assert set(named) <= {story.title for story in stories()}
