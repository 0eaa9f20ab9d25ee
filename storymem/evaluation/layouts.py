"""Which videos in a film's folder are its shots, by the numbers in their names.

This finds what StoryMem's own code, Memento and ViMax write; a film in one file (HoloCine) needs its cuts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from storymem.config import first_of
from storymem.film.folder import Film
from storymem.film.manifest import MANIFEST, FilmError
from storymem.io import files_below, hash_file
from storymem.story import Story

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
Numbers = tuple[int, ...]

_NUMBER = re.compile(r"[0-9]+")
_HOLE = "\0"  # where a pattern has a number; no file name contains it
_OURS = (f"{_HOLE}_{_HOLE}", f"shots/{_HOLE}_{_HOLE}")  # 01_02.mp4: scene 1, shot 2
_BY_SCENE = "scene from {}, shot from {}"
_LISTED = 6  # names in a message before the rest is only counted


class UnclearError(ValueError):
    """Files that do not determine which video is which shot, as ``films.yaml`` can.

    Args:
        problem: the message, to be followed by the advice.
        story: the title under which to write the answer.
        place: the file or folder that the answer names.
        entry: the answer; ``%s`` stands for ``place``.
    """

    def __init__(self, problem: str, story: Story, place: Path, entry: str = "%s") -> None:
        super().__init__(problem)
        self.story, self.place, self.entry = story, place, entry

    def advice(self, folder: Path, mapping: Path) -> str:
        """The whole message: ``mapping`` is the file to write, with paths relative to ``folder``."""
        place = self.place.relative_to(folder).as_posix() if self.place.is_relative_to(folder) else str(self.place)
        entry = self.entry.replace("%s", quoted(place))
        return f"{self} in {mapping}:\nstories:\n  {quoted(self.story.title)}: {entry}"


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
        seconds: wall time of making the film, where its manifest states it for every shot.
        one_video: whether its manifest states that the shots were cut from one video.
    """

    folder: Path | None
    shots: tuple[ShotFile, ...]
    layout: str = ""
    ignored: tuple[str, ...] = ()
    seconds: float | None = None
    one_video: bool = False

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """SHA-256 of each file."""
        return {path: hash_file(path) for path in {shot.path for shot in self.shots if shot.path is not None}}


class _Reading(NamedTuple):
    """Files of one pattern (a path without suffix, with a hole for each number) and one way to read their numbers."""

    pattern: str
    files: Mapping[Numbers, Path]
    shots: Sequence[Numbers]  # the numbers of each shot of the story
    numbering: str  # describes these

    def __str__(self) -> str:
        return f"{self.pattern.replace(_HOLE, '#')} ({self.numbering})"

    def shot(self, numbers: Numbers) -> ShotFile:
        """The file with these numbers, or the name that it would have, padded as the others are."""
        if numbers in self.files:
            return ShotFile(path=self.files[numbers])
        shortest = min(self.files.values(), key=lambda path: len(str(path)))
        widths = map(len, _NUMBER.findall(str(shortest.with_suffix("")))[-len(numbers) :])
        pieces = iter(f"{number:0{width}d}" for number, width in zip(numbers, widths, strict=True))
        name = re.sub(_HOLE, lambda _: next(pieces), self.pattern) + shortest.suffix
        return ShotFile(reason=f"there is no file {name}")


def find_shots(place: Path, story: Story) -> FilmFiles:
    """The shots of ``story`` in a film's folder or file, by our manifest or by the names of the videos in it.

    Numbers are (scene, shot) or the shot's place in the film, counted from 1 or from 0, if they then fit all files of
    one pattern. ``01_02.mp4`` in the folder or in ``shots/`` is scene 1, shot 2, unless a 0 occurs.

    Raises:
        FilmError: if a film of ours has other prompts.
        UnclearError: if the files fit in several ways or in none, or the film is one file.
        ValueError: if two files have the same numbers.
    """
    if is_video(place):
        return _whole_film(place, story)
    if Film.exists(place):
        return _own_film(Film.open(place), story)
    names = {video: video.relative_to(place).as_posix() for video in sorted(videos_below(place))}
    readings = [
        _Reading(pattern, files, shots, numbering)
        for pattern, files in _groups(place, names).items()
        for shots, numbering in _numberings(story, pattern.count(_HOLE)).items()
        if files.keys() <= set(shots)
    ]
    if (chosen := _choose(readings, story, place)) is not None:
        ignored = tuple(name for video, name in names.items() if video not in chosen.files.values())
        shots = tuple(map(chosen.shot, chosen.shots))
        return FilmFiles(folder=place, shots=shots, layout=str(chosen), ignored=ignored)
    if len(names) == 1:
        return _whole_film(next(iter(names)), story)
    if names:
        listed = f"its {len(names)} videos ({first_of(list(names.values()), _LISTED)})"
        of_shots = f"those of the {len(story.shots)} shots of {story.title!r}"
        raise _unclear_files(f"the numbers in the names of {listed} are not {of_shots}", story, place)
    missing = tuple(ShotFile(reason=f"there is no file {s.scene:02d}_{s.number:02d}.mp4") for s in story.shots)
    return FilmFiles(folder=place, shots=missing)


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
    takes = {take.index: ShotFile.at(film.folder / take.file) for take in film.shots}
    unfinished = ShotFile(reason=f"the film has only {len(takes)} finished shots")
    shots = tuple(takes.get(shot.index, unfinished) for shot in story.shots)
    timed = [sum(take.seconds.values()) for take in film.shots if take.seconds]
    seconds = round(sum(timed), 3) if len(timed) == len(shots) else None
    one_video = bool(film.config.get("method", {}).get("one_video"))
    return FilmFiles(folder=film.folder, shots=shots, layout=MANIFEST, seconds=seconds, one_video=one_video)


def _whole_film(path: Path, story: Story) -> FilmFiles:
    """A film in one file, which is the shot of a story with one shot; else the user has to give the frames."""
    count = len(story.shots)
    if count == 1:
        return FilmFiles(folder=path, shots=(ShotFile(path=path),), layout="one file, one shot")
    raise UnclearError(
        f"{path} holds the whole film of {story.title!r}, which has {count} shots: write which frames they are",
        *(story, path),
        f"{{file: %s, cuts: [...]}}\nwhere cuts are the first frames of shots 2 to {count}, counted from 0 (HoloCine's "
        "shot_cut_frames); or frames: [[0, 40], ...], for each shot its first frame and the one after its last",
    )


def is_video(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix of a video."""
    try:
        return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def videos_below(folder: Path) -> Iterator[Path]:
    """The videos in a folder and its sub-folders, also through links; hidden ones are skipped."""
    yield from (path for path in files_below(folder) if not path.name.startswith(".") and is_video(path))


def quoted(text: str) -> str:
    """Text as YAML reads it back."""
    return json.dumps(text, ensure_ascii=False)


def _groups(folder: Path, names: Mapping[Path, str]) -> dict[str, dict[Numbers, Path]]:
    """Pattern -> numbers -> file."""
    groups: dict[str, dict[Numbers, Path]] = {}
    for video, name in names.items():
        stem = name.removesuffix(video.suffix)
        numbers = tuple(map(int, _NUMBER.findall(stem)))
        other = groups.setdefault(_NUMBER.sub(_HOLE, stem), {}).setdefault(numbers, video)
        if other != video:
            raise ValueError(f"{folder}: {names[other]} and {name} have the same numbers: move one of them away")
    return groups


def _numberings(story: Story, count: int) -> dict[tuple[Numbers, ...], str]:
    """Ways to number the shots with ``count`` numbers: those of each shot -> description."""
    found: dict[tuple[Numbers, ...], str] = {}
    places = {scene.number: place for place, scene in enumerate(story.scenes)}
    for scene_from, shot_from in product((1, 0), (1, 0)):
        if count == 1:
            found[tuple((shot.index + shot_from,) for shot in story.shots)] = f"shot from {shot_from}"
        elif count == 2:
            of_scene = {number: number if scene_from else place for number, place in places.items()}
            numbers = tuple((of_scene[shot.scene], shot.number - 1 + shot_from) for shot in story.shots)
            found.setdefault(numbers, _BY_SCENE.format(scene_from, shot_from))
    return found


def _choose(readings: Sequence[_Reading], story: Story, folder: Path) -> _Reading | None:
    """The reading of all shots under our own names; else of all shots; else our own names; else of several files."""
    ours = [one for one in readings if one.pattern in _OURS and one.numbering == _BY_SCENE.format(1, 1)]
    complete = [one for one in readings if one.files.keys() == set(one.shots)]
    several = [one for one in readings if len(one.files) > 1]
    found = [one for one in complete if one in ours] or complete or ours or several
    if len(found) > 1:
        problem = f"the files can be read as the shots of {story.title!r} in several ways"
        raise _unclear_files(f"{problem}: {'; '.join(map(str, found))}", story, folder)
    return found[0] if found else None


def _unclear_files(problem: str, story: Story, folder: Path) -> UnclearError:
    return UnclearError(
        f'{folder}: {problem}; write a template for all stories, shots: "{{story}}/shot_{{index}}.mp4", where '
        "{story} is the folder, {scene}, {shot} (in its scene) and {index} (in the film) count from 1, and {scene0}, "
        "{shot0} and {index0} from 0; or the paths themselves",
        *(story, folder / "shot_1.mp4"),
        f"[{', '.join('...' for _ in story.shots)}]  # such as %s",
    )
