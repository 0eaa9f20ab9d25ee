"""One film: every shot is decoded once and measured by all metrics; the result is a file."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from storymem.evaluation.controls import Alter, Control
from storymem.evaluation.layouts import FilmFiles, ShotFile
from storymem.evaluation.metric import FilmInfo, Metric, Scores
from storymem.io import (
    FileError,
    NotFiniteError,
    hash_file,
    hash_json,
    naming_full_disk,
    read_json,
    remove_leftovers,
    write_atomically,
    write_json,
)
from storymem.media.video import READER, READING, probe, read_video
from storymem.story import Shot, Story

FORMAT = 5
_DIGITS = 6  # of values in files: more than other batch sizes or processors agree on
_STRIP_HEIGHT = 96


@dataclass(frozen=True, kw_only=True)
class ShotResult:
    """A shot of a scored film.

    Args:
        number: of the shot in the film, from 1.
        label: its name in messages.
        prompt, characters, cut: as in the story.
        file: its video, relative to the film's folder.
        file_frames: the range of the file's frames that is the shot (first, last + 1), from 0; None: all.
        sha256: of the file.
        frames: how many were read.
        reader: the library that read them.
        notes: how they were converted (rotated, tone-mapped ...); see :class:`storymem.media.video.VideoInfo`.
        missing: why the shot could not be read; None if it was.
    """

    number: int
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
    """The scores of one film by all metrics. Unlike metrics, it counts the shots of pairs from 1.

    Args:
        key: hash of all that decides the scores; a result with the same key is not recomputed.
        title, slug, style: of the story.
        story_sha256: of the story's content.
        folder: of the film.
        seconds: wall time of making it, where its manifest states it.
        shots: one for each shot of the story.
        scores: metric -> its scores.
        metrics: metric -> its version, rules and hashes of weights.
        faults: values that are not finite; a result with faults is recomputed by the next run.
        images: image files beside the result, for the page.
    """

    format: int = FORMAT
    key: str
    title: str
    slug: str
    style: str | None
    story_sha256: str = ""
    folder: str | None = None
    seconds: float | None = None
    shots: tuple[ShotResult, ...]
    scores: dict[str, Scores]
    metrics: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def value(self, column: str) -> float | None:
        """The story's value of a column."""
        return next(scores.columns[column] for scores in self.scores.values() if column in scores.columns)

    def reason(self, column: str) -> str | None:
        """Why a column has no value."""
        return next((scores.reasons[column] for scores in self.scores.values() if column in scores.reasons), None)

    def mark(self, column: str) -> str | None:
        """A sentence that explains a column's value."""
        return next((scores.marks[column] for scores in self.scores.values() if column in scores.marks), None)

    def is_defined(self, column: str) -> bool:
        """Whether the story can have a value of this column."""
        return not any(column in scores.undefined for scores in self.scores.values())


def read_result(path: Path) -> StoryResult | None:
    """A result that was written before; None if there is none, or it is damaged or of another format."""
    try:
        content = read_json(path)
        is_current = isinstance(content, dict) and content.get("format") == FORMAT
        return TypeAdapter(StoryResult).validate_python(content) if is_current else None
    except (FileNotFoundError, FileError, ValidationError):
        return None


def metric_settings(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Metric -> all that decides its values except the films. Takes seconds, to hash weights."""
    return {
        name: {
            "version": metric.version,
            "weights": metric.weights,
            "columns": [column.name for column in metric.columns],
            **metric.settings(),
        }
        for name, metric in metrics.items()
    }


def result_key(story: Story, film: FilmFiles, measured: Mapping[str, Any], control: str | None = None) -> str:
    """SHA-256 of all that decides a film's scores: story with its images, shots, video reader, metrics, control."""
    content = {
        "format": FORMAT,
        "story": story.to_dict(),
        "shots": [shot.reason if shot.path is None else [film.hashes[shot.path], shot.frames] for shot in film.shots],
        "metrics": measured,
        "reader": [READER, READING],
        "control": control,
        "references": [hash_file(path) for path in story.references],
    }
    return hash_json(content)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A film to score.

    Args:
        system: of the film.
        story, film: what it shows, and its files.
        folder: of the results of its row.
        control: how its frames are altered; None for the film itself. Its ``story`` is applied already.
    """

    system: str
    story: Story
    film: FilmFiles
    folder: Path
    control: Control | None = None

    @property
    def row(self) -> tuple[str, str | None]:
        """Of the tables: the system, and the control if its films were altered."""
        return self.system, None if self.control is None else self.control.name

    @property
    def path(self) -> Path:
        """Of the result."""
        return self.folder / f"{self.story.slug}.json"


def score(job: Job, metrics: Mapping[str, Metric], measured: Mapping[str, Any]) -> None:
    """Write the result ``job.path`` and its images ``STORY/SHOT.jpg`` beside it, unless the same result is there.

    The images are written first and the result last. Of older images, only those that the previous result lists are
    removed.

    Args:
        job: what to score.
        metrics: what to measure.
        measured: ``metric_settings(metrics)``.
    """
    story, film, control = job.story, job.film, job.control
    key = result_key(story, film, measured, job.row[1])
    before, images = read_result(job.path), job.folder / story.slug
    if before is not None and before.key == key and not before.faults:
        now = replace(before, folder=_folder(film), seconds=film.seconds)
        if now != before:
            write_json(job.path, asdict(now))  # the same film elsewhere
        return
    result, strips = score_film(story, film, metrics, key, None if control is None else control.alter)
    for fault in result.faults:
        print(f"{story.title}: {fault}", file=sys.stderr, flush=True)
    with naming_full_disk(images):
        images.mkdir(parents=True, exist_ok=True)
    remove_leftovers(images)
    for name, strip in strips.items():
        write_atomically(images / name, strip)
    write_json(job.path, asdict(replace(result, metrics=dict(measured))))
    for name in () if before is None else before.images:
        if name not in strips and Path(name).name == name:
            (images / name).unlink(missing_ok=True)


def score_film(
    story: Story,
    film: FilmFiles,
    metrics: Mapping[str, Metric],
    key: str,
    altered: Callable[[Mapping[str, Metric]], Alter] | None = None,
) -> tuple[StoryResult, dict[str, bytes]]:
    """Measure a film.

    A shot whose file is missing or damaged has a reason instead, and whatever needs it has no value. A value that is
    NaN or infinite becomes None, and is listed in ``faults``. ``altered``, of a :class:`Control`, changes the frames.

    Returns:
        the result, and name -> a JPEG of a shot's first, middle and last frame, side by side.
    """
    try:
        return _score(story, film, metrics, key, None if altered is None else altered(metrics))
    except _UnreadableError as error:
        # Metrics are given the missing shots before the first shot, so start again without this one.
        shots = list(film.shots)
        shots[error.index] = ShotFile(reason=str(error))
        return score_film(story, replace(film, shots=tuple(shots)), metrics, key, altered)


class _UnreadableError(Exception):
    """A shot cannot be read to its end, or its control cannot be made."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


@contextmanager
def _reading(index: int) -> Iterator[None]:
    """Errors inside the block are those of reading this shot."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:  # NotFiniteError among them
        raise _UnreadableError(index, str(error)) from None


def _score(
    story: Story, film: FilmFiles, metrics: Mapping[str, Metric], key: str, alter: Alter | None
) -> tuple[StoryResult, dict[str, bytes]]:
    info = FilmInfo(
        story=story,
        lengths=tuple(_length(index, file) for index, file in enumerate(film.shots)),
        fps=tuple(None if file.path is None else probe(file.path).fps or None for file in film.shots),
        separate=not film.one_video and all(file.frames is None for file in film.shots),
    )
    measured: dict[str, list[Any]] = {name: [] for name in metrics}
    faults: dict[str, list[str]] = {name: [] for name in metrics}
    strips: dict[str, bytes] = {}
    for shot, file in zip(story.shots, film.shots, strict=True):
        frames = None
        if file.path is not None:
            with _reading(shot.index):
                frames = read_video(file.path, None if file.frames is None else range(*file.frames))
                frames = frames if alter is None else alter(shot, frames, info)
            strips[f"{shot.index + 1:02d}.jpg"] = _strip(frames)
        for name, metric in metrics.items():
            try:
                measured[name].append(None if frames is None else metric.measure_shot(shot, frames, info))
            except NotFiniteError as error:
                measured[name].append(None)
                faults[name].append(f"{shot.label}: {error}")
    scores = {name: _computed(metric, measured[name], info, faults[name]) for name, metric in metrics.items()}
    result = StoryResult(
        key=key,
        title=story.title,
        slug=story.slug,
        style=story.genre,
        story_sha256=hash_json(story.to_dict()),
        folder=_folder(film),
        seconds=film.seconds,
        shots=tuple(_shot_result(shot, n, film) for shot, n in zip(story.shots, info.lengths, strict=True)),
        scores=scores,
        faults=tuple(f"{name}: {fault}" for name, found in faults.items() for fault in found),
        images=tuple(strips),
    )
    return result, strips


def _length(index: int, file: ShotFile) -> int | None:
    """Number of frames; None for a missing file."""
    if file.path is None:
        return None
    with _reading(index):
        frames = probe(file.path).frames
        first, end = file.frames or (0, frames)
        if end > frames:
            raise ValueError(f"{file.path.name} has {frames} frames, and the shot is frames {first} to {end - 1}")
    return end - first


def _shot_result(shot: Shot, length: int | None, film: FilmFiles) -> ShotResult:
    file, folder = film.shots[shot.index], film.folder
    path = file.path
    is_below = path is not None and folder is not None and path != folder and path.is_relative_to(folder)
    return ShotResult(
        number=shot.index + 1,
        label=shot.label,
        prompt=shot.prompt,
        characters=shot.characters,
        cut=shot.cut,
        file=None if path is None else path.relative_to(folder).as_posix() if is_below and folder else path.name,
        file_frames=file.frames,
        sha256=None if path is None else film.hashes[path],
        frames=length,
        reader=None if path is None else READER,
        notes=() if path is None else probe(path).notes,
        missing=file.reason,
    )


def _computed(metric: Metric, measured: Sequence[Any], info: FilmInfo, faults: list[str]) -> Scores:
    """A metric's scores as they are written: finite, rounded, pairs counted from 1; ``faults`` gets what is not finite.

    Rounding makes a result that is read back equal to the one that was written.
    """
    try:
        found = metric.compute(measured, info)
    except NotFiniteError as error:
        faults.append(str(error))
        found = Scores(columns=dict.fromkeys(column.name for column in metric.columns))
    labels = [shot.label for shot in info.story.shots]
    shots = {
        name: tuple(_plain(value, f"{name} of {label}", faults) for label, value in zip(labels, values, strict=True))
        for name, values in found.shots.items()
    }
    pairs = {
        name: tuple((i + 1, j + 1, _plain(value, f"{name} of shots {i + 1}, {j + 1}", faults)) for i, j, value in of)
        for name, of in found.pairs.items()
    }
    columns = _plain(found.columns, "", faults)
    reasons = {name: "; ".join(faults) or "no value" for name, value in columns.items() if value is None}
    return Scores(
        columns=columns,
        reasons=reasons | found.reasons,
        undefined=found.undefined,
        shots=shots,
        pairs=pairs,
        marks=found.marks,
        details=_plain(found.details, "", faults),
    )


def _plain(value: Any, where: str, faults: list[str]) -> Any:
    """``value`` with its numbers rounded, and None for those that are not finite, which are listed in ``faults``."""
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
    chosen = frames[np.linspace(0, len(frames) - 1, 3).round().astype(int)]
    strip = Image.fromarray(np.concatenate(list(chosen), axis=1))
    strip = strip.resize((max(1, round(strip.width * _STRIP_HEIGHT / strip.height)), _STRIP_HEIGHT))
    written = io.BytesIO()
    strip.save(written, format="JPEG", quality=80)
    return written.getvalue()


def _folder(film: FilmFiles) -> str | None:
    return None if film.folder is None else str(film.folder)
