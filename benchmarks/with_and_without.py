"""The same story with and without memory, as one picture: the contact sheet of the README.

    python -m benchmarks.with_and_without [STORY] [key=value ...]

Makes both films on the embedded model (or on what the overrides say) with the same seeds and noise, and writes
docs/with_and_without.png: above with memory, below without, the middle frame of every shot.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.compose import composed
from storymem.film import Film
from storymem.generate import generate
from storymem.video import probe, read_video

STORY = "examples/ada_and_the_tent.yaml"
PICTURE = Path("docs/with_and_without.png")
HEIGHT, GAP = 128, 4


def main() -> None:
    """Two films, one picture."""
    overrides = sys.argv[1:]
    story = overrides.pop(0) if overrides and "=" not in overrides[0] else STORY
    rows = []
    for memory in ("toy", "none"):
        name = f"films/with_and_without/{Path(story).stem}_{memory}"
        shutil.rmtree(name, ignore_errors=True)  # an older film may be of other weights
        (film,) = generate(composed("generate", [f"story={story}", f"output={name}", f"memory={memory}", *overrides]))
        rows.append(strip(film))
    Image.fromarray(np.concatenate([rows[0], np.full_like(rows[0][: 2 * GAP], 255), rows[1]])).save(PICTURE)
    print(PICTURE)


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
