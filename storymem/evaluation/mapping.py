"""``films.yaml``: the user's answer to where the shots of films are."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from string import Formatter

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings, nearest
from storymem.evaluation.layouts import FilmFiles, ShotFile, UnclearError, find_shots, is_video, quoted
from storymem.io import FileError, read_yaml
from storymem.media.video import probe
from storymem.story import Shot, Story

MAPPING = "films.yaml"
MAPPING_SUFFIXES = (".yaml", ".yml")
_WIDTH = "(0?[1-9]d)?"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OneFile:
    """A film in one file, divided into shots by ``cuts`` or ``frames``.

    Args:
        file: path of the file.
        cuts: first frames of all shots but the first, from 0.
        frames: of each shot the first frame and the one after the last.
    """

    file: str
    cuts: list[int] | None = None
    frames: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if (self.cuts is None) == (self.frames is None):
            raise ValueError("write either cuts or frames")

    def ranges(self, total: int, shots: int) -> list[tuple[int, int]]:
        """The frames of each shot in a file of ``total`` frames. Raises ``ValueError`` if they do not fit."""
        starts = [0, *(self.cuts or ())]
        ranges = list(zip(starts, [*starts[1:], total], strict=True)) if self.frames is None else self.frames
        if len(ranges) != shots:
            given = f"{len(ranges) - 1} cuts, so " if self.frames is None else ""
            raise ValueError(f"gives {given}{len(ranges)} shots, and the story has {shots}")
        for (_, before), (first, after) in zip([(0, 0), *ranges], ranges, strict=False):
            if not before <= first < after <= total:
                raise ValueError(
                    f"frames [{first}, {after}] do not follow those before, or end after the file's {total} frames"
                )
        return ranges


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilmsMapping:
    """The content of ``films.yaml``; paths are relative to ``folder``.

    Args:
        shots: path of a shot with ``{story}`` and with ``{scene}``, ``{shot}`` (number in its scene) or ``{index}``
            (number in the film), from 1, or ``{scene0}``, ``{shot0}``, ``{index0}``, from 0; for numbers of three
            digits ``{index:03d}``.
        stories: a story's title -> its folder (with ``shots``: what stands for ``{story}``), a list of its shots'
            paths, or a `OneFile`. A story that is not here has its short name (``the_last_tram``) for ``{story}``, or
            is searched for if there is no ``shots``.
        folder: that of this file by default.
    """

    shots: str | None = None
    stories: dict[str, str | list[str] | OneFile] = field(default_factory=dict)
    folder: UserPath | None = None


def read_mapping(path: Path) -> tuple[FilmsMapping, Path]:
    """A mapping file, and the folder that its paths are relative to. Raises ``FileError`` if it cannot be used."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise FileError(f'{path}: expected a mapping, for example shots: "{{story}}/{{scene:02d}}_{{shot:02d}}.mp4"')
    try:
        mapping = build_settings(FilmsMapping, {str(key): value for key, value in content.items()})
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    folder = path.parent / (mapping.folder or ".")
    if not folder.is_dir():
        raise FileError(f"{path}: folder: there is no folder {folder}")
    return mapping, folder


def mapped_films(mapping: FilmsMapping, file: Path, folder: Path, stories: Sequence[Story]) -> dict[str, FilmFiles]:
    """The films that the mapping in ``file`` locates in ``folder``, by title.

    Raises:
        ValueError: if an entry does not fit its story or the files.
    """
    titles = [story.title for story in stories]
    if mapping.shots is None and mapping.stories and not mapping.stories.keys() & set(titles):
        unknown = min(mapping.stories)
        raise ValueError(f"{file}: names none of these stories; {unknown!r}{nearest(unknown, titles)}")
    found = {}
    for story in stories:
        if mapping.shots is None and story.title not in mapping.stories:
            continue
        try:
            found[story.title] = film = _mapped_film(mapping, file.name, folder, story)
            starts = [
                (os.path.realpath(shot.path), (shot.frames or (0, 0))[0])
                for shot in film.shots
                if shot.path is not None
            ]
            if twice := [path for (path, _), count in Counter(starts).items() if count > 1]:
                raise ValueError(f"two shots of {story.title!r} are the same frames of {twice[0]}")
        except (FileError, UnclearError):
            raise
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return found


def _mapped_film(mapping: FilmsMapping, source: str, folder: Path, story: Story) -> FilmFiles:
    entry, where = mapping.stories.get(story.title, story.slug), f"stories.{story.title}"
    if isinstance(entry, OneFile):
        file = folder / entry.file
        if not is_video(file):
            raise ValueError(f"{where}: there is no video file {file}")
        try:
            ranges = entry.ranges(probe(file).frames, len(story.shots))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        shots = tuple(ShotFile(path=file, frames=frames) for frames in ranges)
        return FilmFiles(folder=file, shots=shots, layout=f"one file, frames from {source}")
    if isinstance(entry, list):
        if len(entry) != len(story.shots):
            raise ValueError(
                f"{where} lists {len(entry)} shots and the story has {len(story.shots)}: write one path for each"
            )
        shots = tuple(ShotFile.at(folder / name) for name in entry)
        return FilmFiles(folder=folder, shots=shots, layout=f"paths from {source}")
    if mapping.shots is not None:
        shots = tuple(ShotFile.at(folder / _filled(mapping.shots, entry, shot)) for shot in story.shots)
        _check_all_used(mapping.shots, folder, entry, story, shots)
        return FilmFiles(folder=folder, shots=shots, layout=f"{mapping.shots} from {source}, {{story}}: {entry}")
    place = folder / entry
    if not place.is_dir() and not is_video(place):
        raise ValueError(f"{where}: there is no folder or video {place}")
    return find_shots(place, story)


def _filled(template: str, entry: str, shot: Shot) -> str:
    """The path of a shot."""
    values: dict[str, int | str] = {"story": entry}
    for name, number in (("scene", shot.scene), ("shot", shot.number), ("index", shot.index + 1)):
        values |= {name: number, f"{name}0": number - 1}
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
        if all(name in values and not kind and re.fullmatch(_WIDTH, width or "") for _, name, width, kind in fields):
            return template.format(**values)
    except ValueError:  # a single brace, or a width for {story}
        pass
    names = ", ".join(f"{{{name}}}" for name in values)
    raise ValueError(f"shots: {template!r} cannot be filled in; known are: {names}, and widths as in {{index:03d}}")


def _check_all_used(template: str, folder: Path, entry: str, story: Story, shots: Sequence[ShotFile]) -> None:
    """Raise ValueError if the template with other numbers fits a video: its fields may count differently."""

    def pattern(escape: Callable[[str], str], number: str) -> str:
        values = {None: "", "story": escape(entry)}
        return "".join(escape(text) + values.get(name, number) for text, name, *_ in Formatter().parse(template))

    used = {shot.path for shot in shots}
    for found in sorted(glob.glob(pattern(glob.escape, "*"), root_dir=folder)):
        path = folder / found
        if re.fullmatch(pattern(re.escape, "[0-9]+"), found) and is_video(path) and path not in used:
            raise ValueError(
                f"{path} is there, and no shot of {story.title!r} has these numbers: {{scene}}, {{shot}} and {{index}} "
                "count from 1; write {scene0}, {shot0} or {index0} where files count from 0, or list the paths under "
                f"stories: {quoted(story.title)}: [...]"
            )
