"""Seconds to score a story, compared with a direct implementation of each definition.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --quick    # smaller networks, three small shots

Networks have their true sizes (unless ``--quick``) and random weights. Ours decodes each shot once, embeds each frame
and clip once, in batches, and compares all pairs in one matrix product. The direct one decodes a shot whenever a
definition needs it and embeds both clips of every pair, one at a time. Both give the same values, which is checked. The
direct one is slow, so each of its parts is timed once and the total is calculated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
import open_clip
import torch
from torch import Tensor

from benchmarks.tables import show
from storymem.devices import resolve_device
from storymem.evaluation.films import find_films
from storymem.evaluation.metric import Metric
from storymem.evaluation.metrics import AestheticQuality, ViclipScores
from storymem.evaluation.scoring import StoryResult, score_film
from storymem.media.video import read_video, write_video
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer
from storymem.scorers.viclip_network import VICLIP_B_16, VICLIP_L_14
from storymem.story import Story, load_story

T = TypeVar("T")


def now() -> float:
    """The time, after the accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_story(folder: Path, shots: int, frames: int, height: int, width: int) -> Story:
    """A story and its film of smooth noise, with a file for each shot."""
    lines = [f'      - {{prompt: "Shot number {number} of a walk along the river."}}' for number in range(shots)]
    text = "\n".join(["title: Bench", "overview: A walk along a river.", "scenes:", "  - shots:", *lines])
    (folder / "bench.yaml").write_text(text + "\n")
    story = load_story(folder / "bench.yaml")
    (folder / "films" / "bench").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for shot in story.shots:
        noise = torch.rand(1, 3, 6, 8, generator=generator)
        wide = torch.nn.functional.interpolate(noise, size=(height, width + frames), mode="bilinear")[0]
        image = (wide * 255).byte().movedim(0, -1).numpy()
        film = np.stack([image[:, shift : shift + width] for shift in range(frames)])
        write_video(folder / "films" / "bench" / f"01_{shot.number:02d}.mp4", film, 16)
    return story


class Direct:
    """Each definition as it is written."""

    def __init__(self, story: Story, files: list[Path], aesthetic: AestheticScorer, viclip: ViclipScorer) -> None:
        self.story, self.files, self.aesthetic, self.viclip = story, files, aesthetic, viclip

    def aesthetic_quality(self, shot: int) -> float:
        frames = read_video(self.files[shot])
        return float(np.mean([self.aesthetic.score(as_images(frame[None])).item() for frame in frames])) / 10

    def clip(self, shot: int) -> Tensor:
        return self.viclip.embed_clips(as_images(read_video(self.files[shot]))[None])[0]

    def following(self, shot: int) -> float:
        text = self.viclip.embed_texts([self.story.shots[shot].prompt])[0]
        return float(self.clip(shot) @ text)

    def whole_film(self) -> float:
        frames = np.concatenate([read_video(file) for file in self.files])
        clip = as_images(frames[self.viclip.frame_indices(len(frames))])
        return float(self.viclip.embed_clips(clip[None])[0] @ self.viclip.embed_texts([self.story.overview])[0])

    def pair(self, first: int, second: int) -> float:
        return float(self.clip(first) @ self.clip(second))

    def prompts_alike(self, first: int, second: int) -> float:
        one, other = (self.viclip.embed_texts([self.story.shots[shot].prompt])[0] for shot in (first, second))
        return float(one @ other)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What ``run`` returns, and its seconds."""
    start = now()
    found = run()
    return found, now() - start


def direct_seconds(direct: Direct, result: StoryResult) -> dict[str, float]:
    """Totals from one timing of each part, whose values are checked."""
    shots = len(direct.files)
    pairs = len(list(combinations(range(shots), 2)))
    top = min(10, pairs)
    scores = result.scores["viclip"]
    checks = {
        "aesthetic": (lambda: direct.aesthetic_quality(0), result.scores["aesthetic"].shots["aesthetic_quality"][0]),
        "following": (lambda: direct.following(0), scores.shots["prompt_following_shot"][0]),
        "whole film": (direct.whole_film, scores.columns["prompt_following_global"]),
        "pair": (lambda: direct.pair(0, 1), scores.pairs["consistency_overall"][0][2]),
    }
    measured = {}
    for name, (run, expected) in checks.items():
        found, measured[name] = timed(run)
        assert expected is not None, name
        assert abs(found - expected) < 1e-4, (name, found, expected)
    _, alike = timed(lambda: direct.prompts_alike(0, 1))
    return {
        "aesthetic": shots * measured["aesthetic"],
        "viclip": shots * measured["following"]
        + measured["whole film"]
        + (pairs + top) * measured["pair"]
        + pairs * alike,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller networks, three small shots")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--frames", type=int, default=81, help="of each shot")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shots, arguments.frames = 3, 9
    size = (96, 160) if arguments.quick else (480, 832)
    clip_name = "ViT-B-32-quickgelu" if arguments.quick else "ViT-L-14-quickgelu"
    sizes = replace(VICLIP_B_16, resolution=96) if arguments.quick else VICLIP_L_14
    viclip = ViclipScorer.from_config(sizes, device=arguments.device)
    aesthetic = AestheticScorer.from_config(open_clip.get_model_config(clip_name), device=arguments.device)
    metrics: dict[str, Metric] = {"aesthetic": AestheticQuality(aesthetic), "viclip": ViclipScores(viclip)}
    with tempfile.TemporaryDirectory() as folder:
        story = make_story(Path(folder), arguments.shots, arguments.frames, *size)
        (film,) = find_films(Path(folder) / "films", [story]).films
        files = [shot.path for shot in film.shots if shot.path is not None]
        one = replace(film, shots=film.shots[:1])
        scene = replace(story.scenes[0], shots=story.shots[:1])
        score_film(replace(story, scenes=(scene,)), one, metrics, "warm")  # once to warm up
        (result, _), ours = timed(lambda: score_film(story, film, metrics, "bench"))
        direct = direct_seconds(Direct(story, files, aesthetic, viclip), result)
    total = sum(direct.values())
    row = {
        "shots": arguments.shots,
        "frames": arguments.frames,
        "size": f"{size[1]}x{size[0]}",
        "seconds": round(ours, 2),
    }
    row |= {f"direct_{name}": round(seconds, 2) for name, seconds in direct.items()}
    row |= {"times_as_fast": round(total / ours, 2), "device": str(resolve_device(arguments.device))}
    show("scoring", [row | {"threads": torch.get_num_threads(), "torch": torch.__version__}])


if __name__ == "__main__":
    main()
