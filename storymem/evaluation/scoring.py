"""One film, read once: every shot is decoded, shown to all metrics and let go."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from storymem.evaluation.films import FilmFiles, ShotFile
from storymem.evaluation.metric import Metric, Scores, Screening, Value
from storymem.io import write_atomically
from storymem.story import Shot, Story
from storymem.video import probe, read_video

FORMAT = 1
_DIGITS = 6  # of values in files: beyond what another batch size or processor changes
_STRIP = 3  # pictures of a shot on the page
_STRIP_HEIGHT = 96


@dataclass(frozen=True, kw_only=True)
class ShotResult:
    """A shot of a scored film; ``missing`` is the reason why it could not be read."""

    index: int
    label: str
    prompt: str
    characters: tuple[str, ...]
    cut: bool
    file: str | None
    sha256: str | None
    frames: int | None
    missing: str | None


@dataclass(frozen=True, kw_only=True)
class StoryResult:
    """What all metrics found in the film of one story.

    Args:
        key: hash of all that decides the scores; a result with the same key need not be made again.
        title: of the story.
        slug: the story's short name.
        style: as the story says.
        shots: one for each shot of the story.
        scores: metric -> what it found.
    """

    format: int = FORMAT
    key: str
    title: str
    slug: str
    style: str | None
    shots: tuple[ShotResult, ...]
    scores: dict[str, Scores]

    def value(self, column: str) -> float | None:
        """The story's value of a column."""
        return next(scores.columns[column] for scores in self.scores.values() if column in scores.columns)

    def reason(self, column: str) -> str | None:
        """Why a column has no value."""
        return next((scores.reasons[column] for scores in self.scores.values() if column in scores.reasons), None)

    def is_defined(self, column: str) -> bool:
        """Whether the story has such a column at all."""
        return not any(column in scores.undefined for scores in self.scores.values())

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())


def read_result(path: Path) -> StoryResult | None:
    """A result as it was written; None if there is none, or one of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    return TypeAdapter(StoryResult).validate_python(content)


def metric_settings(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """What decides the values beside the films, for every metric; hashing weights takes a few seconds."""
    return {name: {"version": metric.version, **metric.settings()} for name, metric in metrics.items()}


def result_key(story: Story, film: FilmFiles, settings: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides a film's scores: the story, the shots' bytes, the metrics' settings."""
    content = {
        "format": FORMAT,
        "story": story.to_dict(),
        "shots": [shot.reason if shot.path is None else _sha256(shot.path) for shot in film.shots],
        "metrics": settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def score_film(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], key: str
) -> tuple[StoryResult, dict[int, bytes]]:
    """Show a film to all metrics.

    A shot whose file is missing or cannot be read to its end has the reason in its place, and whatever needs it has no
    value.

    Returns:
        the result, and for each shot (by index) a JPEG of its first, middle and last frame, side by side.
    """
    try:
        return _show(story, film, metrics, key)
    except _Unreadable as found:
        # Once more without that shot: metrics are told before they see a film which of its shots are missing.
        shots = list(film.shots)
        shots[found.index] = ShotFile(reason=str(found))
        return score_film(story, replace(film, shots=tuple(shots)), metrics, key)


class _Unreadable(Exception):
    """A shot's file cannot be read to its end."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def _show(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], key: str
) -> tuple[StoryResult, dict[int, bytes]]:
    lengths = tuple(_length(index, file) for index, file in enumerate(film.shots))
    screening = Screening(story=story, lengths=lengths)
    shots: list[ShotResult] = []
    seen: dict[str, list[Any]] = {name: [] for name in metrics}
    strips: dict[int, bytes] = {}
    for shot, file, length in zip(story.shots, film.shots, lengths, strict=True):
        frames = None if length is None else _frames(shot.index, file, length)
        for name, metric in metrics.items():
            seen[name].append(None if frames is None else metric.see(shot, frames, screening))
        if frames is not None:
            strips[shot.index] = _strip(frames)
        shots.append(_shot_result(shot, file, length))
    scores = {name: _rounded(metric.conclude(seen[name], screening)) for name, metric in metrics.items()}
    result = StoryResult(
        key=key, title=story.title, slug=story.slug, style=story.style, shots=tuple(shots), scores=scores
    )
    return result, strips


def _length(index: int, file: ShotFile) -> int | None:
    """Number of frames; None for a file that is not there."""
    if file.path is None:
        return None
    try:
        frames = probe(file.path).frames
    except (FileNotFoundError, ValueError) as error:
        raise _Unreadable(index, str(error)) from None
    if not frames:
        raise _Unreadable(index, f"{file.path.name} has no frames")
    return frames


def _frames(index: int, file: ShotFile, length: int) -> np.ndarray:
    assert file.path is not None
    try:
        frames = read_video(file.path)
    except (FileNotFoundError, ValueError) as error:
        raise _Unreadable(index, str(error)) from None
    assert len(frames) == length
    return frames


def _shot_result(shot: Shot, file: ShotFile, length: int | None) -> ShotResult:
    return ShotResult(
        index=shot.index,
        label=shot.label,
        prompt=shot.prompt,
        characters=shot.characters,
        cut=shot.cut,
        file=None if file.path is None else file.path.name,
        sha256=None if file.path is None else _sha256(file.path),
        frames=length,
        missing=file.reason,
    )


def _rounded(scores: Scores) -> Scores:
    """Values as they are written, so that a result read back is the one that was made."""

    def short(value: Value) -> Value:
        return None if value is None else round(value, _DIGITS)

    return replace(
        scores,
        columns={name: short(value) for name, value in scores.columns.items()},
        shots={name: tuple(short(value) for value in values) for name, values in scores.shots.items()},
        pairs={name: tuple((i, j, short(v)) for i, j, v in pairs) for name, pairs in scores.pairs.items()},
        details={
            name: {key: short(v) for key, v in found.items()} if isinstance(found, dict) else found
            for name, found in scores.details.items()
        },
    )


def _strip(frames: np.ndarray) -> bytes:
    """First, middle and last frame side by side, as a JPEG."""
    chosen = frames[np.linspace(0, len(frames) - 1, _STRIP).round().astype(int)]
    height, width = frames.shape[1:3]
    size = (round(width * _STRIP_HEIGHT / height), _STRIP_HEIGHT)
    pictures = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in chosen]
    written = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, axis=1)).save(written, format="JPEG", quality=80)
    return written.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
