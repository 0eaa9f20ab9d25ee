"""Keyframe selection: every frame embedded once, against the published procedure.

    python -m benchmarks.keyframes [--quick] [--threads N]

Both sides choose from the same frames with the same encoder, a ViT-B/32 with random weights, and must choose
the same keyframes. The published procedure, written here as it was published, encodes both frames of every
pair that it compares and starts again whenever the threshold falls; ours embeds all frames in batches and
compares numbers. Quality scores are left out of both. Random weights put all cosines close to 1, so the
thresholds of the second shot are placed between the cosines measured, such that they fall exactly ten times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import torch

from benchmarks.tables import show
from storymem.memory import EmbedFrames, KeyframeSelector, embed_in_batches
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import as_images

NO_BANK = np.zeros((0, 0), dtype=np.float32)
FALLS = 10
REPEATS = 3


class CountedEncoder:
    """A CLIP image encoder on uint8 frames that counts the frames it was given."""

    def __init__(self) -> None:
        config = open_clip.get_model_config("ViT-B-32-quickgelu")
        self.scorer = ClipScorer.from_config(config, seed=0)
        self.count = 0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        self.count += len(frames)
        return self.scorer.embed_images(as_images(frames)).numpy()


def select_as_published(
    frames: np.ndarray, embed: EmbedFrames, selector: KeyframeSelector
) -> tuple[tuple[int, ...], int]:
    """The published procedure, without quality scores and with an empty bank; also how often its threshold fell."""

    def similarity(one: int, other: int) -> float:
        first, second = embed(frames[one : one + 1])[0], embed(frames[other : other + 1])[0]
        return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))

    threshold, falls = selector.similarity_threshold, 0
    while True:
        chosen = [0]
        for frame in range(2, len(frames)):
            if similarity(chosen[-1], frame) < threshold:
                chosen.append(frame)
        if len(chosen) <= selector.max_keyframes:
            return tuple(chosen), falls
        threshold, falls = threshold - selector.threshold_step, falls + 1


def static_shot(count: int) -> np.ndarray:
    """One image with a little film grain."""
    rng = np.random.default_rng(0)
    grain = rng.integers(-3, 4, (count, 480, 832, 1))
    return np.clip(_image(rng) + grain, 0, 255).astype(np.uint8)


def changing_shot(count: int, looks: int = 6) -> np.ndarray:
    """Several images one after the other, each held for an equal part of the shot."""
    rng = np.random.default_rng(1)
    images = np.stack([_image(rng) for _ in range(looks)])
    return images[np.arange(count) * looks // count].astype(np.uint8)


def _image(rng: np.random.Generator) -> np.ndarray:
    tiles = rng.integers(0, 256, (15, 26, 3))
    return tiles.repeat(32, axis=0).repeat(32, axis=1)


def falling_selector(embeddings: np.ndarray) -> KeyframeSelector:
    """A selector whose threshold falls exactly ``FALLS`` times on a shot with these embeddings."""

    def chosen_at(threshold: float) -> int:
        once = KeyframeSelector(similarity_threshold=threshold, max_keyframes=len(embeddings))
        return len(once.select(embeddings, bank=NO_BANK).selected)

    cosines = np.unique((embeddings @ embeddings.T).astype(float).round(6))
    cosines = cosines[cosines < 0.9999]
    enough = [chosen_at(threshold) <= 3 for threshold in (cosines[:-1] + cosines[1:]) / 2]
    last = int(np.flatnonzero(enough)[-1])
    # Every threshold above this cosine chooses more than three frames, and one just below it does not.
    boundary = cosines[last + 1]
    step = min((cosines[-1] - boundary) / FALLS, cosines[last + 1] - cosines[last])
    start = float(boundary + (FALLS - 0.5) * step)
    return KeyframeSelector(similarity_threshold=start, threshold_step=float(step))


def measure(name: str, frames: np.ndarray, selector: KeyframeSelector, target: float) -> dict[str, Any]:
    """Run ours, the published procedure, and ours again; ours is the median of its runs."""
    encoder = CountedEncoder()
    encoder(frames[:1])

    def ours() -> tuple[int, ...]:
        return selector.select(embed_in_batches(frames, encoder), bank=NO_BANK).selected

    encoder.count = 0
    before = [_timed(ours) for _ in range(REPEATS)]
    ours_encoded = encoder.count // REPEATS
    encoder.count = 0
    published_seconds, (published, falls) = _timed(lambda: select_as_published(frames, encoder, selector))
    published_encoded = encoder.count
    after = [_timed(ours) for _ in range(REPEATS)]
    if any(chosen != published for _, chosen in before + after):
        raise SystemExit(f"{name}: the two sides disagree: {before[0][1]} and {published}")
    ours_seconds = statistics.median(seconds for seconds, _ in before + after)
    return {
        "shot": name,
        "frames": len(frames),
        "threshold_falls": falls,
        "keyframes": len(published),
        "published_seconds": round(published_seconds, 3),
        "published_encoded": published_encoded,
        "ours_seconds": round(ours_seconds, 3),
        "ours_encoded": ours_encoded,
        "ratio": round(published_seconds / ours_seconds, 2),
        "target": target,
        "threads": torch.get_num_threads(),
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    chosen = run()
    return time.perf_counter() - start, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="21 frames instead of 81")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    count = 21 if arguments.quick else 81
    changing = changing_shot(count)
    falling = falling_selector(embed_in_batches(changing, CountedEncoder()))
    results = [
        measure("static", static_shot(count), KeyframeSelector(), target=2.0),
        measure("changing", changing, falling, target=15.0),
    ]
    print("seconds, and images encoded; 832x480, ViT-B/32 with random weights, same keyframes on both sides")
    show("keyframes", results)


if __name__ == "__main__":
    main()
