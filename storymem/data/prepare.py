"""From a folder of videos with captions to a cached training set, in steps that can each be run again.

    videos ── split ──> shots ── check ──> clips ── embed ──> embeddings ── group ──> groups ── cache ──> LatentCache

Every step writes down what it finished, item by item, together with a digest of what that depended on. So a run that
was killed goes on where it stopped, and what a changed setting or video touches is made again, and nothing else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from storymem.config import build_settings
from storymem.data import journal
from storymem.data.captions import read_captions
from storymem.data.masks import find_masks
from storymem.data.preparation import Preparation
from storymem.data.settings import PrepareSettings, Step
from storymem.data.video_folder import scan_videos
from storymem.io import FileError, folder_lock
from storymem.stopping import stopping_on_signals
from storymem.wan.sources import check_weights

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache

_LOCK = re.compile(r"\.worker-(\d+)-of-(\d+)\.lock")
_DIGEST = re.compile(r"[0-9a-f]{12,16}")


def prepare(config: Mapping[str, Any]) -> LatentCache | None:
    """Run the steps that a composed configuration (plain containers) asks for.

    Returns:
        the cache; None if ``cache`` is not among the steps, or other workers have not finished it.

    Raises:
        ValueError: for settings, captions, masks or videos with which nothing can be prepared.
        MissingWeights: before anything is decoded.
        storymem.stopping.Stopped: after SIGINT, SIGTERM or SIGUSR1; what was done is written down.
    """
    settings = build_settings(PrepareSettings, config)
    output = Path(settings.output)
    aside = [output, *([Path(settings.masks)] if settings.masks else [])]
    found = scan_videos(Path(settings.videos), without=aside)
    table = Path(settings.captions) if settings.captions else None
    captions = read_captions(found.path, found.videos, found.texts, table)
    if captions.respelled:
        name, video = min(captions.respelled.items())
        print(
            "names in captions that are spelled otherwise than the videos (accents, spaces): "
            f"{len(captions.respelled)}, such as {name!r} for {video!r}",
            file=sys.stderr,
        )
    masks = find_masks(Path(settings.masks), found.videos, found.path) if settings.masks else None
    _check_weights(settings)
    with stopping_on_signals(), _claimed(output, settings):
        return run_steps(Preparation(settings, found, output, captions, masks))


def _check_weights(settings: PrepareSettings) -> None:
    """Raise ``MissingWeights`` if networks that the steps need are not on this machine."""
    from storymem.scorers import scorer_weights
    from storymem.weights import locate

    wanted = []
    if "cache" in settings.steps:
        check_weights(settings.model, text_to_video=False, experts=())
        wanted += scorer_weights(settings.scorer.quality)
    if not {"embed", "cache"}.isdisjoint(settings.steps):
        wanted += scorer_weights(settings.scorer.clip)
    for weights in wanted:
        locate(weights)


@contextmanager
def _claimed(output: Path, settings: PrepareSettings) -> Iterator[None]:
    """Inside the block this process is the worker that ``settings`` say, and all workers share the work alike.

    If no other process works on ``output``, what killed ones left is taken away first.
    """
    own = f".worker-{settings.worker:03d}-of-{settings.workers:03d}.lock"
    with ExitStack() as kept:
        with folder_lock(output, "beginning to prepare data in", name=".shared.lock", wait=60.0):
            locks = [path for path in sorted(output.glob(".worker-*.lock")) if path.is_file()]
            others = [path.name for path in locks if _is_held(path)]
            for name in others:
                match = _LOCK.fullmatch(name)
                if match is not None and (name == own or int(match[2]) != settings.workers):
                    raise FileError(
                        f"another prepare_data works on {output} (workers={int(match[2])} worker={int(match[1])}): to "
                        "share the work, start N with workers=N and worker=0 to N - 1"
                    )
            kept.enter_context(folder_lock(output, "preparing data in", name=own))
            if not others:
                _mend(output)
        yield


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _mend(output: Path) -> None:
    """Take away what killed runs left, and damaged lines of journals: what they told is done again."""
    from storymem.data import shards

    for path in sorted((output / "journal").glob("*.jsonl")):
        if count := journal.mend(path):
            print(f"{path}: {count} lines are damaged, and what they told is done again", file=sys.stderr)
    for folder in sorted([*output.glob("cache/*"), *output.glob("embeddings/*")]):
        if folder.is_dir() and _DIGEST.fullmatch(folder.name):
            shards.mend(folder)


def run_steps(data: Preparation) -> LatentCache | None:
    """The steps in their order; however it ends, ``rejected.jsonl`` is written and counts are printed."""
    from storymem.data import preparation_steps as steps

    functions: dict[Step, Callable[[Preparation], Any]] = {
        "split": steps.split_videos,
        "check": steps.check_clips,
        "embed": steps.embed_clips,
        "group": steps.group,
    }
    try:
        for name, function in functions.items():
            if name in data.settings.steps:
                function(data)
        return steps.cache_clips(data) if "cache" in data.settings.steps else None
    finally:
        data.tell_rejected()
