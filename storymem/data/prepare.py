"""The command ``prepare``: from a folder of videos with captions to a cached training set.

    videos ── split ──> shots ── check ──> clips ── embed ──> embeddings ── group ──> groups ── cache ──> LatentCache

Torch is loaded once settings, captions and weights are checked. The last step is in :mod:`storymem.data.encoding`, the
others are in :mod:`storymem.data.steps`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from storymem.config import build_settings
from storymem.data.settings import PrepareSettings
from storymem.data.videos import find_masks, read_captions, scan_videos
from storymem.io import FileError, folder_lock, remove_leftovers
from storymem.stopping import stopping_on_signals
from storymem.wan.sources import check_weights

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache

_LOCK = re.compile(r"\.worker-(\d+)-of-(\d+)\.lock")


def prepare(config: Mapping[str, Any]) -> LatentCache | None:
    """Run the steps that a composed configuration (plain containers) asks for.

    Returns:
        the cache; None if ``cache`` is not among the steps, or other workers have not finished it.

    Raises:
        ValueError: for settings, captions, masks or videos with which nothing can be prepared.
        MissingWeights: before anything is decoded.
        storymem.stopping.Stopped: after SIGINT, SIGTERM or SIGUSR1; what was finished is recorded.
    """
    settings = build_settings(PrepareSettings, config)
    output, videos = Path(settings.output), Path(settings.videos)
    if output.is_dir() and videos.is_dir() and output.samefile(videos):
        raise FileError(f"output={output} is the folder of the videos: write another one, such as output=data")
    found = scan_videos(videos, without=[output, *([Path(settings.masks)] if settings.masks else [])])
    captions = read_captions(found, Path(settings.captions) if settings.captions else None)
    if captions.respelled:
        name, video = min(captions.respelled.items())
        print(
            "names in captions that are spelled differently than the videos (accents, spaces): "
            f"{len(captions.respelled)}, such as {name!r} for {video!r}",
            file=sys.stderr,
        )
    masks = find_masks(Path(settings.masks), found) if settings.masks else {}
    _check_weights(settings)
    if (output / "journal").exists():
        raise FileError(f"{output} was prepared by an older version: prepare the data again, in another output folder")
    with stopping_on_signals(), _locked(output, settings):
        from storymem.data.encoding import cache_clips
        from storymem.data.steps import Preparation

        run = Preparation(settings, found, captions, masks)
        steps = {"split": run.split, "check": run.check, "embed": run.embed, "group": run.group}
        try:
            for name, step in steps.items():
                if name in settings.steps:
                    step()
            return cache_clips(run) if "cache" in settings.steps else None
        finally:
            run.write_rejected()


def _check_weights(settings: PrepareSettings) -> None:
    """Raise ``MissingWeights`` if networks that the steps need are not on this machine."""
    from storymem.scorers import check_scorers, scorer_weights
    from storymem.weights import locate

    scorers = {}
    if "cache" in settings.steps:
        check_weights(settings.model, text_to_video=False, experts=())
        scorers["quality"] = settings.scorer.quality
    if not {"embed", "cache"}.isdisjoint(settings.steps):
        scorers["clip"] = settings.scorer.clip
    check_scorers(scorers)
    for weights in scorer_weights(scorers):
        locate(weights)


@contextmanager
def _locked(output: Path, settings: PrepareSettings) -> Iterator[None]:
    """Inside the block this process is the worker that ``settings`` name, and all workers agree on their number.

    If no other process works on ``output``, what killed ones left is removed first.
    """
    own = f".worker-{settings.worker:03d}-of-{settings.workers:03d}.lock"
    with ExitStack() as locks:
        with folder_lock(output, "beginning to prepare data in", name=".shared.lock", wait=60.0):
            others = [path.name for path in sorted(output.glob(".worker-*.lock")) if path.is_file() and _is_held(path)]
            for name in others:
                match = _LOCK.fullmatch(name)
                if match is not None and (name == own or int(match[2]) != settings.workers):
                    raise FileError(
                        f"another prepare_data works on {output} (workers={int(match[2])} worker={int(match[1])}): to "
                        "share the work, start N with workers=N and worker=0 to N - 1"
                    )
            locks.enter_context(folder_lock(output, "preparing data in", name=own))
            if not others:
                for folder in filter(Path.is_dir, output.glob("cache/*")):
                    remove_leftovers(folder)
        yield


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True
