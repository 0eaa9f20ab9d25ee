"""Growth of grouping: time and peak RAM at 1k, 10k and 100k clips.

    python -m benchmarks.grouping [--quick] [--threads N] [--device cuda]

The embeddings are drawn: clusters of eight clips with cosines of about 0.86, 512 dimensions as of ViT-B/32, and one
clip in fifty a near-duplicate of another. Each size runs in a process of its own; the peak RAM printed is less
what that process uses before grouping begins. Growth is that of CPU seconds, which other work on the machine disturbs
less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from benchmarks.tables import show
from storymem.data.grouping import group_clips
from storymem.data.settings import GroupSettings
from storymem.memory.keyframes import normalised

DIMENSIONS, CLUSTER = 512, 8


def draw(count: int, folder: Path) -> None:
    """Write embeddings, float32 [count, 512], and the cluster of each, [count]."""
    random = np.random.default_rng(0)
    cluster = np.arange(count) // CLUSTER
    centres = normalised(random.standard_normal((cluster[-1] + 1, DIMENSIONS), dtype=np.float32))
    rows = centres[cluster] + 0.4 * normalised(random.standard_normal((count, DIMENSIONS), dtype=np.float32))
    copies = np.arange(50, count, 50)
    rows[copies] = rows[copies - 1] + 0.002
    cluster[copies] = cluster[copies - 1]
    np.save(folder / "embeddings.npy", normalised(rows))
    np.save(folder / "cluster.npy", cluster)


def measure(folder: Path, threads: int | None, device: str) -> dict[str, Any]:
    """Group the clips of the embeddings and clusters in ``folder``, in this process.

    ``found`` is the share of clips in a group with at least half of their cluster.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    embeddings, cluster = np.load(folder / "embeddings.npy"), np.load(folder / "cluster.npy")
    count = len(embeddings)
    ids = [f"clip{number:07d}" for number in range(count)]
    settings = GroupSettings()
    group_clips(ids[:64], embeddings[:64], settings, device=device)  # libraries load what they need
    before = psutil.Process().memory_info().rss / 1e6
    start, cpu_start = time.perf_counter(), time.process_time()
    grouping = group_clips(ids, embeddings, settings, device=device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "clips": count,
        "device": device,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before, 1),
        "embeddings_megabytes": round(embeddings.nbytes / 1e6, 1),
        "groups": len(grouping.split),
        "grouped": round(len(grouping.group) / count, 4),
        "duplicates": len(grouping.duplicates),
        "found": round(_found(pd.Series(ids).map(grouping.group), cluster), 4),
        "threads": torch.get_num_threads(),
    }


def _found(group: pd.Series, cluster: np.ndarray) -> float:
    """Share of all clips in a group with at least half of their cluster; NaN is no group."""
    together = group.groupby([group, cluster]).transform("size")
    return float((together >= CLUSTER // 2).mean())


def in_own_process(count: int, *arguments: Any) -> dict[str, Any]:
    """Draw and measure, each in a fresh process: a child begins with its parent's peak memory."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        with spawn.Pool(1) as pool:
            pool.apply(draw, (count, Path(name)))
        with spawn.Pool(1) as pool:
            return pool.apply(measure, (Path(name), *arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1k and 10k clips only")
    parser.add_argument("--threads", type=int, help="threads (default: the libraries' own choice)")
    parser.add_argument("--device", default="cpu", help="where similarities are computed")
    arguments = parser.parse_args()
    sizes = [1_000, 10_000] if arguments.quick else [1_000, 10_000, 100_000]
    results: list[dict[str, Any]] = []
    for count in sizes:
        result = in_own_process(count, arguments.threads, arguments.device)
        if results:
            result["growth"] = f"N^{log(result['cpu_seconds'] / results[-1]['cpu_seconds'], 10):.2f}"
        print(f"{count} clips: {result['seconds']:.2f} s", flush=True)
        results.append(result)
    show("grouping", results)


if __name__ == "__main__":
    main()
