"""Preparing data at the smallest size: configurations, what came of them, and what is in a set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from storymem.data.cache import LatentCache
from storymem.training.batches import train_batches
from storymem.training.objectives.memory import MemorySamples
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.training.run_settings import BatchSettings
from tests.composing import composed
from tests.data.drawn_clips import FRAMES, HEIGHT, WIDTH
from tests.training.tiny import source

SMALL = [
    "model=tiny",
    f"data.buckets=[{{frames:{FRAMES},height:{HEIGHT},width:{WIDTH}}}]",
    f"model.video={{height:{HEIGHT},width:{WIDTH},frames:{FRAMES},fps:8}}",
    "model.network.text_tokens=16",
    "model.network.vae.dim_mult=[1,1,1,1]",
    "scorer/quality=none",
    "cache.given=[1]",
    "runtime=cpu",
    # An untrained encoder finds all images alike.
    "group.similarity=0.5",
    "group.near_duplicate=0.999999",
]


def config(folder: Path, *overrides: str) -> dict[str, Any]:
    where = (f"videos={folder / 'videos'}", f"output={folder / 'set'}")
    return composed(*where, *SMALL, *overrides, name="prepare_data")


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "set" / "rejected.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return {row["key"]: row["reason"] for row in map(json.loads, lines)}


def contents(cache: LatentCache) -> dict[str, Any]:
    """Everything in a set that training can read; not in which shards it lies."""
    found: dict[str, Any] = {"empty": cache.empty_text()}
    for index, clip in enumerate(cache.clips):
        found[clip.id] = {name: value for name, value in asdict(clip).items() if name != "shard"} | {
            "video": cache.video(index),
            "keyframes": cache.keyframes(index),
            "mask": cache.mask(index),
            "text": cache.text(index),
            **{f"given {kind}": cache.given(index, kind) for kind in (0, *cache.given_kinds)},
        }
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two results of :func:`contents` are equal to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def train_on(folder: Path) -> None:
    """Open a set as a training does and read the batches of three steps."""
    cache = LatentCache.open(folder)
    batch = BatchSettings(size=2, max_memory=1, workers=0)
    drawn_from = source(cache, batch=batch, conditioning="mi2v", count=batch.size)  # type: ignore[arg-type]
    samples = MemorySamples(MemoryObjectiveSettings(), drawn_from)
    batches = train_batches(samples, size=batch.size)
    for _ in range(3):
        assert next(batches).x0.isfinite().all()
    batches.close()
