"""The contact sheet of the README: stories as they truly are, generated with memory, and generated without.

    python -m benchmarks.with_and_without [STORY ...] [key=value ...]

Generates both films of each story of st_bench/toy on the embedded model (or on what the overrides name) from the same
seeds and noise, and writes docs/with_and_without.png: the middle frame of every shot. The memory begins with two true
frames, one of each framing, as reference images of the story's first character.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image, ImageDraw, ImageFont

from storymem.composition import composed
from storymem.film.folder import Film
from storymem.film.generate import generate_films as generate
from storymem.media.video import probe, read_video
from toyworld.world import story as true_story

STORIES = ("st_bench/toy/01_cleo_on_the_beach.yaml", "st_bench/toy/06_ada_on_the_moon.yaml")  # of one character each
SHEET = Path("docs/with_and_without.png")
FILMS = Path("films/with_and_without")
HEIGHT, GAP, LABEL, COLOURS = 96, 4, 150, 256

Frame = npt.NDArray[np.uint8]


def main() -> None:
    """Two films a story, one image."""
    stories = [argument for argument in sys.argv[1:] if "=" not in argument] or list(STORIES)
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    rows = []
    for story in stories:
        (seed,) = re.findall(r"toyworld\.world\.story\((\d+)\)", Path(story).read_text(encoding="utf-8"))
        shots = true_story(int(seed)).shots
        drawn = [shot.frames[len(shot.frames) // 2] for shot in shots]
        rows.append(strip("true drawing", drawn))
        other = next(i for i, shot in enumerate(shots) if shot.framing != shots[0].framing)
        source = with_references(Path(story), [drawn[0], drawn[other]])
        rows.append(strip("with memory", middles(made(source, "toy", overrides))))
        rows.append(strip("without memory", middles(made(source, "none", overrides))))
        rows.append(np.full_like(rows[-1][: 2 * GAP], 255))
    Image.fromarray(np.concatenate(rows[:-1])).quantize(COLOURS).save(SHEET, optimize=True)
    print(SHEET)


def with_references(story: Path, frames: list[Frame]) -> Path:
    """A copy of a story whose first character has frames as its reference images."""
    copy = FILMS / story.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{copy.stem}_{number}.png" for number in range(1, len(frames) + 1)]
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(copy.with_name(name))
    content = yaml.safe_load(story.read_text(encoding="utf-8"))
    content["characters"][0]["references"] = names
    copy.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return copy


def made(story: Path, memory: str, overrides: list[str]) -> Film:
    """The film of a story with one of ``configs/memory/recall``."""
    folder = FILMS / f"{story.stem}_{memory}"
    shutil.rmtree(folder, ignore_errors=True)  # an older film of other weights would be refused
    arguments = [f"story={story}", f"output={folder}", f"memory/recall={memory}", *overrides]
    (film,) = generate(composed("generate", arguments))
    return film


def middles(film: Film) -> list[Frame]:
    """The middle frame of every shot."""
    paths = [film.folder / shot.file for shot in film.shots]
    return [read_video(path, [probe(path).frames // 2])[0] for path in paths]


def strip(label: str, frames: list[Frame]) -> Frame:
    """A label and frames side by side, uint8 [100, W, 3]."""
    title = Image.new("RGB", (LABEL, HEIGHT), "white")
    ImageDraw.Draw(title).text((4, HEIGHT // 2 - 8), label, fill="black", font=ImageFont.load_default(18))
    cells = [np.asarray(title)]
    for frame in map(Image.fromarray, frames):
        resized = frame.resize((round(frame.width * HEIGHT / frame.height), HEIGHT), Image.Resampling.LANCZOS)
        cells += [np.asarray(resized), np.full((HEIGHT, GAP, 3), 255, np.uint8)]
    row = np.concatenate(cells, axis=1)
    return np.concatenate([row, np.full_like(row[:GAP], 255)])


if __name__ == "__main__":
    main()
