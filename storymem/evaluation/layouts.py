"""Which videos in the folder of one film are its shots: told by the numbers in their paths, or asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storymem.film.folder import MANIFEST, Film, FilmError
from storymem.story import Story

MAPPING = "films.yaml"
MAPPING_SUFFIXES = (".yaml", ".yml")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_NUMBER = re.compile(r"[0-9]+")
_HOLE = "\0"  # where a number stands in a pattern; no file's name has it
_OURS = (f"{_HOLE}_{_HOLE}", f"shots/{_HOLE}_{_HOLE}")  # 01_02.mp4: scene 1, shot 2
_SHOWN = 6  # names in a message before the rest is only counted


@dataclass(frozen=True, kw_only=True)
class ShotFile:
    """The video of one shot: a path, or the reason why there is none.

    Args:
        path: of the file.
        frames: the shot is these frames of the file, from the first to before the second, counted from 0; None: all.
        reason: why there is no file.
    """

    path: Path | None = None
    frames: tuple[int, int] | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class FilmFiles:
    """The film of one story.

    Args:
        folder: where it lies, or its file; None if there is none.
        shots: a `ShotFile` for each shot of the story.
        layout: how the shots were found, for the plan.
        ignored: videos in the folder that are no shots, for the plan.
    """

    folder: Path | None
    shots: tuple[ShotFile, ...]
    layout: str = ""
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Root:
    """A folder of films.

    Args:
        folder: where it lies.
        mapping: the file in which a person says where films lie; it need not exist.
    """

    folder: Path
    mapping: Path

    def name(self, path: Path) -> str:
        """A path as the mapping file names it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Files with one pattern, and one way to read their numbers."""

    pattern: str
    files: Mapping[tuple[int, ...], Path]
    expected: Mapping[tuple[int, ...], int]
    said: str

    @property
    def is_complete(self) -> bool:
        return self.files.keys() == self.expected.keys()

    @property
    def is_ours(self) -> bool:
        return self.pattern in _OURS and self.said == _BY_SCENE.format(1, 1)

    def __str__(self) -> str:
        return f"{self.pattern.replace(_HOLE, '#')} ({self.said})"


_BY_SCENE = "scene from {}, shot from {}"


def find_shots(folder: Path, story: Story, root: Root) -> FilmFiles:
    """The shots of ``story`` in a film's folder: as our manifest says, or else by the names of the videos below it.

    Numbers are read as (scene, shot) or as the shot's place in the film, counted from 1 or from 0, whichever explains
    all files of one pattern. ``01_02.mp4`` in the folder or its ``shots`` is scene 1, shot 2, unless a 0 occurs.

    Args:
        folder: of the film.
        story: what it tells.
        root: the folder of films, for messages.

    Raises:
        FilmError: if a film of ours tells another text.
        ValueError: if the files can be read in several ways or in none, or the film is one file; it says what to write.
    """
    if Film.exists(folder):
        return _ours(Film.open(folder), story)
    videos = sorted(videos_below(folder))
    groups = _groups(folder, videos)
    readings = [
        _Reading(pattern=pattern, files=files, expected=expected, said=said)
        for pattern, files in groups.items()
        for said, expected in _numberings(story, pattern.count(_HOLE))
        if files.keys() <= expected.keys()
    ]
    chosen = _choose(readings, how_to_say(folder, story, root), story, folder)
    if chosen is None and len(videos) == 1:
        return whole_film(videos[0], story, root)
    if chosen is None and videos:
        names = _some([_name(video, folder) for video in videos])
        raise ValueError(
            f"{folder}: the numbers in the names of its {len(videos)} videos ({names}) are not those of the "
            f"{len(story.shots)} shots of {story.title!r}{how_to_say(folder, story, root)}"
        )
    if chosen is None:
        missing = tuple(ShotFile(reason=f"there is no file {s.scene:02d}_{s.number:02d}.mp4") for s in story.shots)
        return FilmFiles(folder=folder, shots=missing)
    found = {chosen.expected[numbers]: path for numbers, path in chosen.files.items()}
    expected = {index: _filled(chosen, folder, numbers) for numbers, index in chosen.expected.items()}
    return FilmFiles(
        folder=folder,
        shots=tuple(
            ShotFile(path=found[index]) if index in found else ShotFile(reason=f"there is no file {expected[index]}")
            for index in range(len(story.shots))
        ),
        layout=str(chosen),
        ignored=tuple(_name(video, folder) for video in videos if video not in found.values()),
    )


def tells(film: Film, story: Story) -> bool:
    """Whether a film of ours was made from these prompts."""
    told = [shot["prompt"] for scene in film.story["scenes"] for shot in scene["shots"]]
    return told == [shot.prompt for shot in story.shots]


def _ours(film: Film, story: Story) -> FilmFiles:
    if not tells(film, story):
        raise FilmError(
            f"{film.folder} holds a film of another text under the title {film.story['title']!r}: score it with the "
            "stories it was made from (stbench.stories=FOLDER)"
        )
    finished = len(film.shots)
    files = [film.folder / record.file for record in film.shots]
    shots = [ShotFile(path=f) if is_video(f) else ShotFile(reason=f"there is no file {f.name}") for f in files]
    shots += [ShotFile(reason=f"the film has only {finished} finished shots")] * (len(story.shots) - finished)
    return FilmFiles(folder=film.folder, shots=tuple(shots), layout=MANIFEST)


def whole_film(path: Path, story: Story, root: Root) -> FilmFiles:
    """A film in one file, if its only shot is the whole of it.

    Raises:
        ValueError: if the story has several shots, whose frames must then be given.
    """
    if len(story.shots) == 1:
        return FilmFiles(folder=path, shots=(ShotFile(path=path),), layout="one file, one shot")
    raise ValueError(
        f"{path} holds the whole film of {story.title!r}, which has {len(story.shots)} shots: say which frames they "
        f"are in {root.mapping}:\n"
        "stories:\n"
        f"  {quoted(story.title)}: {{file: {quoted(root.name(path))}, cuts: [...]}}\n"
        f"where cuts are the first frames of shots 2 to {len(story.shots)}, counted from 0 (HoloCine's "
        "shot_cut_frames); or frames: [[0, 40], ...], for each shot its first frame and the one after its last"
    )


def is_video(path: Path) -> bool:
    """Whether a video file may lie there: by the name, and that it is a file."""
    try:
        return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    except (OSError, ValueError):  # a name no file can have
        return False


def videos_below(folder: Path) -> Iterator[Path]:
    """The videos in a folder and its sub-folders, symbolic links followed, but for hidden ones."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = (Path(place) / name for name in sorted(files) if not name.startswith("."))
        yield from (path for path in found if is_video(path))


def how_to_say(folder: Path, story: Story, root: Root) -> str:
    """What to write where files cannot be told apart; the end of a message."""
    shots = ", ".join("..." for _ in story.shots)
    return (
        f'; write {root.mapping} with shots: "{{story}}/shot_{{index}}.mp4", where {{scene}}, {{shot}} (in its scene)'
        " and {index} (in the film) count from 1, {scene0}, {shot0} and {index0} from 0, and {story} is the folder; or "
        f"with the paths themselves:\nstories:\n  {quoted(story.title)}: [{shots}]  # "
        f"such as {root.name(folder)}/shot_1.mp4"
    )


def quoted(text: str) -> str:
    """Text as YAML reads it back."""
    return json.dumps(text, ensure_ascii=False)


def said_twice(film: FilmFiles, story: Story) -> str | None:
    """Why a film cannot be scored: two shots are the same frames; None if all differ."""
    seen: dict[tuple[Path, int], int] = {}
    for index, shot in enumerate(film.shots):
        if shot.path is None:
            continue
        start = (Path(os.path.realpath(shot.path)), 0 if shot.frames is None else shot.frames[0])
        if start in seen:
            both = f"{story.shots[seen[start]].label} and {story.shots[index].label}"
            return f"{both} of {story.title!r} are the same frames of {shot.path}"
        seen[start] = index
    return None


def _groups(folder: Path, videos: Sequence[Path]) -> dict[str, dict[tuple[int, ...], Path]]:
    """Pattern (the path with a hole for each number) -> numbers -> file."""
    groups: dict[str, dict[tuple[int, ...], Path]] = {}
    for video in videos:
        stem = video.relative_to(folder).with_suffix("").as_posix()
        numbers = tuple(int(number) for number in _NUMBER.findall(stem))
        files = groups.setdefault(_NUMBER.sub(_HOLE, stem), {})
        if numbers in files:
            both = f"{_name(files[numbers], folder)} and {_name(video, folder)}"
            raise ValueError(f"{folder}: {both} have the same numbers: move one of them away")
        files[numbers] = video
    return groups


def _numberings(story: Story, count: int) -> Iterator[tuple[str, dict[tuple[int, ...], int]]]:
    """Ways to number the shots with so many numbers: what it is called, and numbers -> the shot's index."""
    if count == 1:
        for first in (1, 0):
            yield f"shot from {first}", {(shot.index + first,): shot.index for shot in story.shots}
    if count == 2:
        by_place = {scene.number: place for place, scene in enumerate(story.scenes)}
        for from_zero in (False, True):
            if from_zero and all(number == place for number, place in by_place.items()):
                continue
            for first in (1, 0):
                yield (
                    _BY_SCENE.format(0 if from_zero else 1, first),
                    {
                        (by_place[shot.scene] if from_zero else shot.scene, shot.number - 1 + first): shot.index
                        for shot in story.shots
                    },
                )


def _choose(readings: Sequence[_Reading], cure: str, story: Story, folder: Path) -> _Reading | None:
    """The one reading to go by: of all shots, else of our own names, else of more than one file."""
    complete = [reading for reading in readings if reading.is_complete]
    ours = [reading for reading in readings if reading.is_ours]
    several = [reading for reading in readings if len(reading.files) > 1]
    for candidates in ([reading for reading in complete if reading.is_ours], complete, ours, several):
        if len(candidates) > 1:
            raise ValueError(
                f"{folder}: the files can be read as the shots of {story.title!r} in several ways: "
                f"{'; '.join(map(str, candidates))}{cure}"
            )
        if candidates:
            return candidates[0]
    return None


def _filled(reading: _Reading, folder: Path, numbers: tuple[int, ...]) -> str:
    """The name that a file with these numbers would have, padded as those that are there."""
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in reading.files.values()]
    widths = [min(map(len, column)) for column in zip(*(_NUMBER.findall(stem) for stem in stems), strict=True)]
    pieces = iter(f"{number:0{width}d}" for number, width in zip(numbers, widths, strict=True))
    name = re.sub(_HOLE, lambda _: next(pieces), reading.pattern)
    return name + next(iter(reading.files.values())).suffix


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _some(names: Sequence[str]) -> str:
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
