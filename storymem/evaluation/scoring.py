"""One film, read once: every shot is decoded, shown to all metrics and let go."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from storymem.evaluation.layouts import FilmFiles, ShotFile
from storymem.evaluation.metric import Metric, Scores, Screening
from storymem.io import FileError, NotFiniteError, hash_file, hash_json, naming_full_disk, read_json, write_json
from storymem.media.video import READER, READING, probe, read_video
from storymem.story import Shot, Story

FORMAT = 2
_DIGITS = 6  # of values in files: beyond what another batch size or processor changes
_STRIP = 3  # pictures of a shot on the page
_STRIP_HEIGHT = 96


@dataclass(frozen=True, kw_only=True)
class ShotResult:
    """A shot of a scored film; ``missing`` is the reason why it could not be read.

    Args:
        index: place in the film, from 0.
        label: how it is named to people.
        prompt, characters, cut: as the story says.
        file: its video, relative to the film's folder.
        file_frames: the frames of the file that are the shot, from the first to before the second; None: all.
        sha256: of the file.
        frames: how many were read.
        reader: the library that read them.
        notes: how they were read (turned, tone-mapped ...); see :class:`storymem.media.video.VideoInfo`.
        missing: see above.
    """

    index: int
    label: str
    prompt: str
    characters: tuple[str, ...]
    cut: bool
    file: str | None
    file_frames: tuple[int, int] | None = None
    sha256: str | None
    frames: int | None
    reader: str | None = None
    notes: tuple[str, ...] = ()
    missing: str | None


@dataclass(frozen=True, kw_only=True)
class StoryResult:
    """What all metrics found in the film of one story.

    Args:
        key: hash of all that decides the scores; a result with the same key need not be made again.
        title: of the story.
        slug: the story's short name.
        style: as the story says.
        story_sha256: of what the story says.
        folder: where the film lies.
        shots: one for each shot of the story.
        scores: metric -> what it found.
        metrics: how all was measured: versions, rules, hashes of weights.
        faults: values that are not finite, and why; such a result is made again by the next run.
        pictures: files written beside the result for the page.
    """

    format: int = FORMAT
    key: str
    title: str
    slug: str
    style: str | None
    story_sha256: str = ""
    folder: str | None = None
    shots: tuple[ShotResult, ...]
    scores: dict[str, Scores]
    metrics: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()

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
        """Write as JSON, in one step. Raises ``FileError`` if that is not possible."""
        with naming_full_disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def read_result(path: Path) -> StoryResult | None:
    """A result as it was written; None if there is none, it is damaged, or one of another format."""
    try:
        content = read_json(path)
    except (FileNotFoundError, FileError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    try:
        return TypeAdapter(StoryResult).validate_python(content)
    except ValidationError:
        return None


def metric_settings(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """What decides the values beside the films, for every metric; hashing weights takes a few seconds."""
    return {
        name: {
            "version": metric.version,
            "weights": metric.weights,
            "columns": [column.name for column in metric.columns],
            **metric.settings(),
        }
        for name, metric in metrics.items()
    }


def result_key(story: Story, film: FilmFiles, settings: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides a film's scores: story, shots' bytes and frames, how they are read, metrics."""
    hashes = _hashes(film)
    content = {
        "format": FORMAT,
        "story": story.to_dict(),
        "shots": [shot.reason if shot.path is None else [hashes[shot.path], shot.frames] for shot in film.shots],
        "metrics": settings,
        "reader": [READER, READING],
    }
    return hash_json(content)


def story_sha256(story: Story) -> str:
    """SHA-256 of what a story says."""
    return hash_json(story.to_dict())


def score_film(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], key: str
) -> tuple[StoryResult, dict[int, bytes]]:
    """Show a film to all metrics.

    A shot whose file is missing or cannot be read to its end has the reason in its place, and whatever needs it has no
    value. What a metric finds that is NaN or infinite is no value either, and is named in ``faults``.

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
    hashes = _hashes(film)
    shots: list[ShotResult] = []
    seen: dict[str, list[Any]] = {name: [] for name in metrics}
    faults: dict[str, list[str]] = {name: [] for name in metrics}
    strips: dict[int, bytes] = {}
    for shot, file, length in zip(story.shots, film.shots, lengths, strict=True):
        frames = None if length is None else _frames(shot.index, file, length)
        for name, metric in metrics.items():
            try:
                seen[name].append(None if frames is None else metric.see(shot, frames, screening))
            except NotFiniteError as error:
                seen[name].append(None)
                faults[name].append(f"{shot.label}: {error}")
        if frames is not None:
            strips[shot.index] = _strip(frames)
        shots.append(_shot_result(shot, file, length, film.folder, hashes))
    scores = {name: _concluded(metric, seen[name], screening, faults[name]) for name, metric in metrics.items()}
    result = StoryResult(
        key=key,
        title=story.title,
        slug=story.slug,
        style=story.style,
        story_sha256=story_sha256(story),
        folder=None if film.folder is None else str(film.folder),
        shots=tuple(shots),
        scores=scores,
        faults=tuple(f"{name}: {fault}" for name, found in faults.items() for fault in found),
        pictures=tuple(picture_name(index) for index in strips),
    )
    return result, strips


def picture_name(index: int) -> str:
    """The file of a shot's strip, beside the result."""
    return f"{index + 1:02d}.jpg"


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
    if file.frames is None:
        return frames
    first, after = file.frames
    if after > frames:
        raise _Unreadable(index, f"{file.path.name} has {frames} frames, and the shot is frames {first} to {after - 1}")
    return after - first


def _frames(index: int, file: ShotFile, length: int) -> np.ndarray:
    assert file.path is not None
    try:
        frames = read_video(file.path, None if file.frames is None else range(*file.frames))
    except (FileNotFoundError, ValueError) as error:
        raise _Unreadable(index, str(error)) from None
    if len(frames) != length:
        raise _Unreadable(index, f"{file.path.name} has {length} frames, of which {len(frames)} can be read")
    return frames


def _shot_result(
    shot: Shot, file: ShotFile, length: int | None, folder: Path | None, hashes: Mapping[Path, str]
) -> ShotResult:
    return ShotResult(
        index=shot.index,
        label=shot.label,
        prompt=shot.prompt,
        characters=shot.characters,
        cut=shot.cut,
        file=None if file.path is None else _below(file.path, folder),
        file_frames=file.frames,
        sha256=None if file.path is None else hashes[file.path],
        frames=length,
        reader=None if length is None else READER,
        notes=() if file.path is None or length is None else probe(file.path).notes,
        missing=file.reason,
    )


def _below(path: Path, folder: Path | None) -> str:
    inside = folder is not None and path != folder and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside and folder is not None else path.name


def _concluded(metric: Metric, seen: Sequence[Any], screening: Screening, faults: list[str]) -> Scores:
    """A metric's scores as they are written: rounded, so that a result read back is the one that was made, and finite.

    What is not finite becomes None, is named in ``faults`` and is the reason for columns that have no value for it.
    """
    try:
        found = metric.conclude(seen, screening)
    except NotFiniteError as error:
        faults.append(str(error))
        found = Scores(columns=dict.fromkeys(column.name for column in metric.columns))
    labels = [shot.label for shot in screening.story.shots]
    scores = Scores(
        shots={
            name: tuple(
                _plain(value, f"{name} of {label}", faults) for label, value in zip(labels, values, strict=True)
            )
            for name, values in found.shots.items()
        },
        pairs={name: _plain(values, name, faults) for name, values in found.pairs.items()},
        columns=_plain(found.columns, "", faults),
        details=_plain(found.details, "", faults),
        undefined=found.undefined,
        reasons=dict(found.reasons),
    )
    for column, value in scores.columns.items():
        if value is None and column not in scores.reasons:
            scores.reasons[column] = "; ".join(faults) or "no value"
    return scores


def _plain(value: Any, where: str, faults: list[str]) -> Any:
    """``value`` with its numbers rounded and None for those that are not finite, which are noted in ``faults``."""
    if isinstance(value, dict):
        return {key: _plain(item, f"{where} {key}".strip(), faults) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, where, faults) for item in value)
    if isinstance(value, float | np.floating):
        if math.isfinite(value):
            return round(float(value), _DIGITS)
        if (fault := f"{where} is not a finite number") not in faults:
            faults.append(fault)
        return None
    return value


def _strip(frames: np.ndarray) -> bytes:
    """First, middle and last frame side by side, as a JPEG."""
    chosen = frames[np.linspace(0, len(frames) - 1, _STRIP).round().astype(int)]
    height, width = frames.shape[1:3]
    size = (max(1, round(width * _STRIP_HEIGHT / height)), _STRIP_HEIGHT)
    pictures = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in chosen]
    written = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, axis=1)).save(written, format="JPEG", quality=80)
    return written.getvalue()


def _hashes(film: FilmFiles) -> dict[Path, str]:
    """SHA-256 of each file of a film; one in which all shots lie is read once."""
    return {path: hash_file(path) for path in {shot.path for shot in film.shots if shot.path is not None}}
