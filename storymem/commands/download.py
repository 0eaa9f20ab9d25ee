"""``storymem download``: which published weights settings need, with sizes and licences; on request, fetch them."""

from __future__ import annotations

import shutil
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings
from storymem.film.settings import FirstShot
from storymem.io import replacing
from storymem.wan.settings import Continuity, ModelSettings, SamplerSettings
from storymem.weights import MissingWeights, Weights, locate, size_text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DownloadSettings:
    """The settings of ``download.yaml``: those of ``generate.yaml`` and ``eval_stbench.yaml`` that choose weights.

    Args:
        untrained: set by ``metrics=[tiny]``, which needs no weights.
        dry_run: list only; ``--yes`` is ``dry_run=false``.
    """

    model: ModelSettings
    sampler: SamplerSettings
    scorer: dict[str, dict[str, Any]]
    memory: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False
    continuity: Continuity = "mi2v"
    first_shot: FirstShot = "auto"
    dry_run: bool = True


def download(config: Mapping[str, Any]) -> None:
    """List the weights that a composed configuration needs; unless ``dry_run``, fetch those that are missing.

    Raises:
        ValueError: if the disk is too small, or a source can only be given by the user.
    """
    settings = build_settings(DownloadSettings, config)
    needed = list(_needed(settings))
    missing = [weights for weights in needed if not _is_here(weights)]
    if not needed:
        print(
            f"model={settings.model.name} comes with the package or is built from its configuration: nothing to fetch"
        )
        return
    rows = [
        (
            "missing" if weights in missing else "here",
            size_text(weights.size_gb),
            weights.name,
            f"{weights.source}{f' {weights.file}' if weights.file else ''}",
            weights.licence or "see the model's page",
        )
        for weights in needed
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    total = sum(weights.size_gb for weights in missing)
    print(f"to fetch: {size_text(total)} of {size_text(sum(weights.size_gb for weights in needed))}")
    if settings.dry_run:
        if missing:
            print("Nothing was fetched: add --yes to fetch what is missing, under the licences above.")
        return
    _check_disk(total)
    for weights in missing:
        print(f"fetching {weights.name} ({size_text(weights.size_gb)})", file=sys.stderr)
        _fetch(weights)


def _needed(settings: DownloadSettings) -> Iterator[Weights]:
    from storymem.scorers import scorer_weights
    from storymem.wan.sources import required_weights

    text_to_video = settings.first_shot != "m2v"
    seen = required_weights(
        settings.model, text_to_video=text_to_video, continuity=settings.continuity, sampler=settings.sampler
    )
    seen += scorer_weights(settings.scorer) + scorer_weights(settings.metrics)
    yield from dict.fromkeys(weights for weights in seen if not weights.source.startswith("package:"))


def _is_here(weights: Weights) -> bool:
    try:
        return locate(weights) is not None
    except MissingWeights:
        return False


def _check_disk(gigabytes: float) -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free / 1e9) < gigabytes:
        raise ValueError(
            f"{folder}: {free:.0f} GB are free and {gigabytes:.0f} GB are needed; "
            "set HF_HUB_CACHE to a folder on a larger disk"
        )


def _fetch(weights: Weights) -> None:
    if not weights.is_local:
        from huggingface_hub import snapshot_download

        snapshot_download(weights.source, allow_patterns=weights.patterns)
    elif weights.url:
        target = weights.path / (weights.file or "") if weights.path.is_dir() else weights.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial, urllib.request.urlopen(weights.url) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out)
    else:
        raise ValueError(f"{weights.name}: {weights.source} does not exist, and nothing is known about where to get it")
