"""The toy stories of ST-Bench as story files: ten stories each with one, two and three characters.

python -m toyworld.stories                       # writes st_bench/toy/*.yaml
python -m toyworld.stories FOLDER --described    # the same, each look described once, in the first shot that shows it
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from toyworld.words import PLACE_WORDS, describe_character, describe_scenery
from toyworld.world import HELD_OUT, ToyShot, ToyStory, story

FOLDER = Path("st_bench/toy")
START = HELD_OUT + 1000  # the figures on the models are taken on stories before these
EACH = 10


def benchmark() -> dict[str, ToyStory]:
    """File name -> story: the first held-out stories in which every character returns after a cut.

    The stories know what is true of their shots: `ToyStory.seed`, `ToyShot.seen`, `ToyShot.frames`.
    """
    chosen: dict[int, list[ToyStory]] = {1: [], 2: [], 3: []}
    titles: set[str] = set()
    for seed in itertools.count(START):
        one = story(seed)
        group = chosen[len(one.cast)]
        if len(group) < EACH and _all_come_back(one) and title(one) not in titles:
            group.append(one)
            titles.add(title(one))
        if all(len(group) == EACH for group in chosen.values()):
            break
    stories = [one for group in chosen.values() for one in group]
    return {f"{number:02d}_{_slug(title(one))}.yaml": one for number, one in enumerate(stories, start=1)}


def _all_come_back(one: ToyStory) -> bool:
    """Whether every character is in two or more shots that do not continue another."""
    return all(sum(shot.cut and character in shot.cast for shot in one.shots) >= 2 for character in one.cast)


def title(one: ToyStory) -> str:
    """Who, and where the story begins: "Ada and Bo on the Moon"."""
    where = PLACE_WORDS[one.shots[0].place][0]
    words = [word if word in ("in", "on", "the") else word.capitalize() for word in where.split()]
    return " ".join([_listed([character.name for character in one.cast]), *words])


def overview(shots: Sequence[ToyShot]) -> str:
    """Who is in shots, and where: "Ada and Bo on the moon and in the snow."."""
    cast = sorted({character.name for shot in shots for character in shot.cast})
    places = dict.fromkeys(PLACE_WORDS[shot.place][0] for shot in shots)
    return f"{_listed(cast)} {_listed(list(places))}."


def described_once(one: ToyStory) -> list[str]:
    """The prompts, and after each the looks of the characters and of the place that no shot before it shows."""
    prompts, shown = [], set[str]()
    for shot in one.shots:
        looks = [describe_character(character) for character in shot.cast if character.name not in shown]
        looks += [describe_scenery(shot.place, shot.scenery)] if shot.place not in shown else []
        shown |= {shot.place, *(character.name for character in shot.cast)}
        prompts.append(" ".join([shot.prompt, *looks]))
    return prompts


def story_text(one: ToyStory, *, described: bool = False) -> str:
    """The story as a file: prompts, cuts and who is in each shot.

    Args:
        described: whether prompts are those of `described_once`; without, none describes a look.
    """
    prompts = iter(described_once(one) if described else [shot.prompt for shot in one.shots])
    content = {
        "title": title(one),
        "overview": overview(one.shots),
        "characters": [{"name": character.name} for character in one.cast],
        "scenes": [{"shots": [_entry(shot, next(prompts)) for shot in scene]} for scene in one.scenes],
    }
    written = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return f"# Its shots as they truly are: toyworld.world.story({one.seed})\n{written}"


def _entry(shot: ToyShot, prompt: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"prompt": prompt, "characters": [character.name for character in shot.cast]}
    return entry if shot.cut else {**entry, "cut": False}


def _listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _slug(text: str) -> str:
    return "_".join(re.findall(r"\w+", text.lower()))


def write_stories(folder: Path, *, described: bool = False) -> None:
    """Write all files; see :func:`story_text`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in benchmark().items():
        (folder / name).write_text(story_text(one, described=described), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--described", action="store_true", help="describe each look once, where it is first shown")
    args = parser.parse_args()
    write_stories(args.folder, described=args.described)
