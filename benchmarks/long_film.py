"""A film of many shots: whether time per shot, RAM, open files and the film's records grow with the number of shots.

    python -m benchmarks.long_film [--shots 120]

The toy model makes small shots of one step, so that what the loop adds is visible. Time is CPU time of the process,
which depends little on other work on the machine. Written are ``benchmarks/results/long_film.md``, a table of every
twelfth part of the film, and ``long_film.png``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
from matplotlib.figure import Figure

from benchmarks.tables import markdown

RESULTS = Path(__file__).parent / "results"
_SMALL = ("model=toy", "runtime=cpu", "sampler.steps=1", "sampler.guidance=1", "sampler.negative_sees_memory=true")
_MEMORY = ("scorer.quality.threshold=-100", "memory.selector.bank_similarity_threshold=1")  # the memory fills
_SIZE = ("model.video.height=32", "model.video.width=48", "model.video.frames=5", "continuity=none")
_PARTS = 12
_HEADS = (
    "up to shot",
    "CPU s a shot",
    "keyframes",
    "RAM MB",
    "open files",
    "film.json kB",
    "memory.json kB",
    "page kB",
)


class Row(NamedTuple):
    """The state after a shot: CPU seconds since the shot before, RAM, open files, sizes of the film's records."""

    shot: int
    seconds: float
    recalled: int
    ram_mb: float
    files: int
    film_kb: float
    memory_kb: float
    page_kb: float


def story(shots: int) -> str:
    """A story of ``shots`` shots in scenes of ten."""
    lines = ["title: A long film", "overview: Ada walks.", "scenes:"]
    for shot in range(shots):
        lines += ["  - shots:"] if shot % 10 == 0 else []
        lines.append(f'      - {{prompt: "Ada walks in the {("desert", "forest")[shot % 2]} at noon. Medium shot."}}')
    return "\n".join(lines) + "\n"


def measure(shots: int, folder: Path) -> tuple[pd.DataFrame, float]:
    """Generate the film and measure after each shot; also CPU seconds of resuming the finished film."""
    from storymem.film.generate import generate
    from storymem.film.progress import Progress

    rows: list[Row] = []
    film, process = folder / "film", psutil.Process()

    class Watching(Progress):
        began = time.process_time()

        def end_shot(self, take: Any) -> None:
            super().end_shot(take)
            now = time.process_time()
            names = ("film.json", "memory.json", "storyboard.html")
            sizes = [os.path.getsize(film / name) / 1e3 if (film / name).exists() else 0.0 for name in names]
            state = process.memory_info().rss / 1e6, process.num_fds(), *sizes
            rows.append(Row(take.shot, now - self.began, len(take.memory), *state))
            self.began = time.process_time()

    (folder / "story.yaml").write_text(story(shots), encoding="utf-8")
    settings: dict[str, Any] = {"output": film, "model": "toy", "overrides": [*_SMALL, *_SIZE, *_MEMORY]}
    generate(folder / "story.yaml", **settings, progress=Watching(enabled=False))
    began = time.process_time()
    generate(folder / "story.yaml", **settings)
    return pd.DataFrame(rows), time.process_time() - began


def table(rows: pd.DataFrame) -> str:
    """A Markdown table of medians of equal parts of the film, without the first shot, which loads the networks."""
    later = rows.iloc[1:]
    parts = later.groupby(np.arange(len(later)) // max(1, len(rows) // _PARTS))
    medians = parts.median().assign(shot=parts["shot"].last())
    cells = [
        [f"{value:.{2 if name == 'seconds' else 0}f}" for name, value in row.items()] for _, row in medians.iterrows()
    ]
    return markdown(list(_HEADS), cells)


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Seconds, RAM and open files by shot."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), ("seconds", "ram_mb", "files"), strict=True):
        axis.plot(rows["shot"][1:], rows[name][1:])
        axis.set(title=_HEADS[rows.columns.get_loc(name)], xlabel="shot", ylim=(0, 1.1 * rows[name][1:].max()))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=120)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, resumed = measure(arguments.shots, Path(folder))
    command = f"python -m benchmarks.long_film --shots {arguments.shots}"
    text = f"A film of {arguments.shots} shots, on a CPU: `{command}`.\n\n{table(rows)}\n"
    text += f"\nThe same command again, with nothing left to generate: {resumed:.1f} s of CPU.\n"
    print(text)
    (RESULTS / "long_film.md").write_text(text, encoding="utf-8")
    plot(rows, RESULTS / "long_film.png")


if __name__ == "__main__":
    main()
