"""Which videos in a film's folder are its shots, by the numbers in their names.

This finds what StoryMem's own code, Memento and ViMax write; a film in one file (HoloCine) needs its cuts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storymem.film.folder import MANIFEST, Film, FilmError
from storymem.story import Story

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_NUMBER = re.compile(r"[0-9]+")
_HOLE = "\0"  # where a pattern has a number; no file name contains it
_OURS = (f"{_HOLE}_{_HOLE}", f"shots/{_HOLE}_{_HOLE}")  # 01_02.mp4: scene 1, shot 2
_BY_SCENE = "scene from {}, shot from {}"
_LISTED = 6  # names in a message before the rest is only counted


@dataclass(frozen=True, kw_only=True)
class ShotFile:
    """The video of one shot.

    Args:
        path: of the file; None if there is none.
        frames: the range of the file's frames that is the shot (first, last + 1), from 0; None: all.
        reason: why there is no file.
    """

    path: Path | None = None
    frames: tuple[int, int] | None = None
    reason: str | None = None

    @classmethod
    def at(cls, path: Path) -> ShotFile:
        """The file at ``path``, or that there is none."""
        return cls(path=path) if is_video(path) else cls(reason=f"there is no file {path.name}")


@dataclass(frozen=True, kw_only=True)
class FilmFiles:
    """The film of one story.

    Args:
        folder: of the film, or its file; None if there is none.
        shots: one for each shot of the story.
        layout: how the shots were found, for the plan.
        ignored: videos in the folder that are no shots, for the plan.
    """

    folder: Path | None
    shots: tuple[ShotFile, ...]
    layout: str = ""
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Root:
    """A folder of films, and the mapping file with the user's answers, which need not exist."""

    folder: Path
    mapping: Path

    def name(self, path: Path) -> str:
        """A path as it is written in the mapping file."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def advice(self, story: Story, entry: str) -> str:
        """The end of a message: what to write into the mapping file for ``story``."""
        return f"in {self.mapping}:\nstories:\n  {quoted(story.title)}: {entry}"


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Files of one pattern and one way to read their numbers.

    Args:
        pattern: path without suffix, with a hole for each number.
        files: numbers -> file.
        shots: numbers -> index of the shot, for all shots of the story.
        numbering: its description.
    """

    pattern: str
    files: Mapping[tuple[int, ...], Path]
    shots: Mapping[tuple[int, ...], int]
    numbering: str

    def __str__(self) -> str:
        return f"{self.pattern.replace(_HOLE, '#')} ({self.numbering})"

    def file_name(self, numbers: tuple[int, ...]) -> str:
        """The name that a file with these numbers would have, padded as the others."""
        names = [_NUMBER.findall(str(path.with_suffix("")))[-len(numbers) :] for path in self.files.values()]
        widths = [min(map(len, column)) for column in zip(*names, strict=True)]
        pieces = iter(f"{number:0{width}d}" for number, width in zip(numbers, widths, strict=True))
        return re.sub(_HOLE, lambda _: next(pieces), self.pattern) + next(iter(self.files.values())).suffix


def find_shots(folder: Path, story: Story, root: Root) -> FilmFiles:
    """The shots of ``story`` in a film's folder, by our manifest or by the names of the videos in it.

    Numbers are (scene, shot) or the shot's place in the film, counted from 1 or from 0, if they then fit all files of
    one pattern. ``01_02.mp4`` in the folder or in ``shots/`` is scene 1, shot 2, unless a 0 occurs.

    Raises:
        FilmError: if a film of ours has other prompts.
        ValueError: if the files fit in several ways or in none, or the film is one file; with what to write instead.
    """
    if Film.exists(folder):
        return _own_film(Film.open(folder), story)
    videos = sorted(videos_below(folder))
    names = {video: video.relative_to(folder).as_posix() for video in videos}
    readings = [
        _Reading(pattern=pattern, files=files, shots=shots, numbering=numbering)
        for pattern, files in _groups(folder, names).items()
        for numbering, shots in _numberings(story, pattern.count(_HOLE))
        if files.keys() <= shots.keys()
    ]
    chosen = _choose(readings, story, folder, root)
    if chosen is None and len(videos) == 1:
        return whole_film(videos[0], story, root)
    if chosen is None and videos:
        raise ValueError(
            f"{folder}: the numbers in the names of its {len(videos)} videos ({_listed(list(names.values()))}) are not "
            f"those of the {len(story.shots)} shots of {story.title!r}{_how_to_map(folder, story, root)}"
        )
    if chosen is None:
        missing = tuple(ShotFile(reason=f"there is no file {s.scene:02d}_{s.number:02d}.mp4") for s in story.shots)
        return FilmFiles(folder=folder, shots=missing)
    by_index = sorted((index, numbers) for numbers, index in chosen.shots.items())
    return FilmFiles(
        folder=folder,
        shots=tuple(
            ShotFile(path=chosen.files[numbers])
            if numbers in chosen.files
            else ShotFile(reason=f"there is no file {chosen.file_name(numbers)}")
            for _, numbers in by_index
        ),
        layout=str(chosen),
        ignored=tuple(name for video, name in names.items() if video not in chosen.files.values()),
    )


def has_prompts_of(film: Film, story: Story) -> bool:
    """Whether a film of ours was made from the prompts of ``story``."""
    prompts = [shot["prompt"] for scene in film.story["scenes"] for shot in scene["shots"]]
    return prompts == [shot.prompt for shot in story.shots]


def _own_film(film: Film, story: Story) -> FilmFiles:
    if not has_prompts_of(film, story):
        raise FilmError(
            f"{film.folder} holds a film with other prompts under the title {film.story['title']!r}: score it with the "
            "stories it was made from (stbench.stories=FOLDER)"
        )
    shots = [ShotFile.at(film.folder / record.file) for record in film.shots]
    unfinished = ShotFile(reason=f"the film has only {len(shots)} finished shots")
    shots += [unfinished] * (len(story.shots) - len(shots))
    return FilmFiles(folder=film.folder, shots=tuple(shots), layout=MANIFEST)


def whole_film(path: Path, story: Story, root: Root) -> FilmFiles:
    """A film in one file, which is the shot of a story with one shot.

    Raises:
        ValueError: if the story has more; it asks for their frames.
    """
    if len(story.shots) == 1:
        return FilmFiles(folder=path, shots=(ShotFile(path=path),), layout="one file, one shot")
    entry = f"{{file: {quoted(root.name(path))}, cuts: [...]}}"
    raise ValueError(
        f"{path} holds the whole film of {story.title!r}, which has {len(story.shots)} shots: write which frames they "
        f"are {root.advice(story, entry)}\n"
        f"where cuts are the first frames of shots 2 to {len(story.shots)}, counted from 0 (HoloCine's "
        "shot_cut_frames); or frames: [[0, 40], ...], for each shot its first frame and the one after its last"
    )


def is_video(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix of a video."""
    try:
        return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def videos_below(folder: Path) -> Iterator[Path]:
    """The videos in a folder and its sub-folders, also through links; hidden ones are skipped."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = (Path(place) / name for name in sorted(files) if not name.startswith("."))
        yield from (path for path in found if is_video(path))


def quoted(text: str) -> str:
    """Text as YAML reads it back."""
    return json.dumps(text, ensure_ascii=False)


def _groups(folder: Path, names: Mapping[Path, str]) -> dict[str, dict[tuple[int, ...], Path]]:
    """Pattern -> numbers -> file."""
    groups: dict[str, dict[tuple[int, ...], Path]] = {}
    for video, name in names.items():
        stem = name.removesuffix(video.suffix)
        numbers = tuple(int(number) for number in _NUMBER.findall(stem))
        files = groups.setdefault(_NUMBER.sub(_HOLE, stem), {})
        if numbers in files:
            raise ValueError(
                f"{folder}: {names[files[numbers]]} and {name} have the same numbers: move one of them away"
            )
        files[numbers] = video
    return groups


def _numberings(story: Story, count: int) -> Iterator[tuple[str, dict[tuple[int, ...], int]]]:
    """Ways to number the shots with ``count`` numbers: description, and numbers -> the shot's index."""
    if count == 1:
        for first in (1, 0):
            yield f"shot from {first}", {(shot.index + first,): shot.index for shot in story.shots}
    if count == 2:
        places = {scene.number: place for place, scene in enumerate(story.scenes)}
        for from_zero in (False, True):
            if from_zero and all(number == place for number, place in places.items()):
                continue
            for first in (1, 0):
                yield (
                    _BY_SCENE.format(0 if from_zero else 1, first),
                    {
                        (places[shot.scene] if from_zero else shot.scene, shot.number - 1 + first): shot.index
                        for shot in story.shots
                    },
                )


def _choose(readings: Sequence[_Reading], story: Story, folder: Path, root: Root) -> _Reading | None:
    """The reading of all shots under our own names; else of all shots; else our own names; else of several files."""
    ours = [one for one in readings if one.pattern in _OURS and one.numbering == _BY_SCENE.format(1, 1)]
    complete = [one for one in readings if one.files.keys() == one.shots.keys()]
    several = [one for one in readings if len(one.files) > 1]
    for candidates in ([one for one in complete if one in ours], complete, ours, several):
        if len(candidates) > 1:
            raise ValueError(
                f"{folder}: the files can be read as the shots of {story.title!r} in several ways: "
                f"{'; '.join(map(str, candidates))}{_how_to_map(folder, story, root)}"
            )
        if candidates:
            return candidates[0]
    return None


def _how_to_map(folder: Path, story: Story, root: Root) -> str:
    entry = f"[{', '.join('...' for _ in story.shots)}]  # such as {root.name(folder)}/shot_1.mp4"
    return (
        f'; write into {root.mapping} shots: "{{story}}/shot_{{index}}.mp4", where {{scene}}, {{shot}} (in its scene) '
        "and {index} (in the film) count from 1, {scene0}, {shot0} and {index0} from 0, and {story} is the folder; or "
        f"the paths themselves {root.advice(story, entry)}"
    )


def _listed(names: Sequence[str]) -> str:
    more = f", ... {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
