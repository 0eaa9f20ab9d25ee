"""From a folder of videos with captions to a cached training set, in steps that can each be run again.

    videos ── split ──> shots ── check ──> clips ── embed ──> embeddings ── group ──> groups ── cache ──> LatentCache

Every step writes down what it finished, item by item, together with a digest of what that depended on. So a run that
was killed goes on where it stopped, and what a changed setting or video touches is made again, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from storymem.config import build_settings
from storymem.training.captions import read_captions
from storymem.training.clips import find_videos
from storymem.training.data_settings import PrepareSettings, Step
from storymem.training.masks import find_masks
from storymem.training.preparation import Preparation
from storymem.wan.sources import check_weights

if TYPE_CHECKING:
    from storymem.training.cache import LatentCache


def prepare(config: Mapping[str, Any]) -> LatentCache | None:
    """Run the steps that a composed configuration (plain containers) asks for.

    Returns:
        the cache; None if ``cache`` is not among the steps, or other workers have not finished it.

    Raises:
        ValueError: for settings, captions, masks or videos with which nothing can be prepared.
        MissingWeights: before anything is decoded.
    """
    settings = build_settings(PrepareSettings, config)
    if "cache" in settings.steps:
        check_weights(settings.model, text_to_video=False)
    folder = Path(settings.videos).expanduser()
    videos = find_videos(folder)
    captions = read_captions(folder, videos, Path(settings.captions) if settings.captions else None)
    masks = find_masks(Path(settings.masks).expanduser(), videos, folder) if settings.masks else None
    output = Path(settings.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / f".worker-{settings.worker:03d}.lock").acquire(timeout=0):
            return run_steps(Preparation(settings, folder, output, videos, captions, masks))
    except Timeout:
        raise ValueError(
            f"another prepare_data works on {output}: to share the work, start N with workers=N and worker=0 to N - 1"
        ) from None


def run_steps(data: Preparation) -> LatentCache | None:
    """The steps in their order; however it ends, ``rejected.jsonl`` is written and counts are printed."""
    from storymem.training import preparation_steps as steps

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
