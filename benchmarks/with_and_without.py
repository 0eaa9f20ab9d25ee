"""The same story with and without memory, as one picture: the contact sheet of the README.

    python -m benchmarks.with_and_without [STORY ...] [key=value ...]

Makes both films of each story on the embedded model (or on what the overrides say) with the same seeds and noise, and
writes docs/with_and_without.png: above with memory, below without, the middle frame of every shot.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from storymem.commands.configuration import composed
from storymem.film.folder import Film
from storymem.film.generate import generate
from storymem.media.video import probe, read_video

#: One with reference pictures, one without.
STORIES = ("examples/ada_and_the_tent.yaml", "st_bench/toy/01_lou_on_the_beach.yaml")
PICTURE = Path("docs/with_and_without.png")
HEIGHT, GAP = 128, 4


def main() -> None:
    """Two films a story, one picture."""
    stories = [argument for argument in sys.argv[1:] if "=" not in argument] or list(STORIES)
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    rows: list[npt.NDArray[np.uint8]] = []
    for story in stories:
        above, below = (strip(made(story, memory, overrides)) for memory in ("toy", "none"))
        between = np.full_like(above[: 2 * GAP], 255)
        rows += [above, between[:GAP], below, between]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows[:-1]]
    Image.fromarray(np.concatenate(padded)).save(PICTURE)
    print(PICTURE)


def made(story: str, memory: str, overrides: list[str]) -> Film:
    """The film of a story with one of ``configs/memory``."""
    name = f"films/with_and_without/{Path(story).stem}_{memory}"
    shutil.rmtree(name, ignore_errors=True)  # an older film of other weights would be refused
    (film,) = generate(composed("generate", [f"story={story}", f"output={name}", f"memory={memory}", *overrides]))
    return film


def strip(film: Film) -> npt.NDArray[np.uint8]:
    """The middle frames of a film's shots side by side, uint8 [128, W, 3]."""
    pictures = []
    for shot in film.shots:
        path = film.folder / shot.file
        frame = Image.fromarray(read_video(path, [probe(path).frames // 2])[0])
        resized = frame.resize((round(frame.width * HEIGHT / frame.height), HEIGHT), Image.Resampling.LANCZOS)
        pictures += [np.asarray(resized), np.full((HEIGHT, GAP, 3), 255, np.uint8)]
    return np.concatenate(pictures[:-1], axis=1)


if __name__ == "__main__":
    main()
