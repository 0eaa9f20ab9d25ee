"""``films.yaml``: where the shots of films lie, as a person says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, build_settings, nearest
from storymem.evaluation.layouts import FilmFiles, Root, ShotFile, find_shots, is_video, quoted, said_twice, whole_film
from storymem.io import FileError, read_yaml
from storymem.media.video import probe
from storymem.story import Shot, Story

_FIELD = re.compile(r"\{(\w+)(?::0?([1-9])d)?\}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OneFile:
    """A film in one file, cut into shots by ``cuts`` or ``frames``.

    Args:
        file: path of the file.
        cuts: first frames of all shots but the first, counted from 0.
        frames: of each shot the first frame and the one after the last.
    """

    file: str
    cuts: list[int] | None = None
    frames: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if (self.cuts is None) == (self.frames is None):
            raise ValueError("write either cuts or frames")

    def ranges(self, total: int, shots: int) -> list[tuple[int, int]]:
        """The frames of each of so many shots, of a file with ``total`` frames.

        Raises:
            ValueError: if they are not as many, do not follow one another, or end after the file.
        """
        if self.frames is None:
            starts = [0, *(self.cuts or ())]
            ranges = list(zip(starts, [*starts[1:], total], strict=True))
        else:
            ranges = list(self.frames)
        if len(ranges) != shots:
            said = f"{len(ranges) - 1} cuts, so {len(ranges)} shots" if self.frames is None else f"{len(ranges)} shots"
            raise ValueError(f"gives {said}, and the story has {shots}")
        end = 0
        for first, after in ranges:
            if not end <= first < after <= total:
                raise ValueError(
                    f"frames [{first}, {after}] do not follow those before, or end after the file's {total} frames"
                )
            end = after
        return ranges


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilmsMapping:
    """What ``films.yaml`` says; paths are relative to ``folder``.

    Args:
        shots: path of a shot with ``{story}`` and with ``{scene}``, ``{shot}`` (number in its scene) or ``{index}``
            (number in the film), counted from 1, or ``{scene0}``, ``{shot0}``, ``{index0}``, counted from 0; for
            numbers of three digits ``{index:03d}``.
        stories: a story's title -> its folder (with ``shots``: what stands for ``{story}``), a list of its shots'
            paths, or a `OneFile`. A story that is not named here stands under its short name (``the_last_tram``), or is
            looked for where there is no ``shots``.
        folder: that of this file by default.
    """

    shots: str | None = None
    stories: dict[str, str | list[str] | OneFile] = field(default_factory=dict)
    folder: UserPath | None = None


def read_mapping(path: Path) -> tuple[FilmsMapping, Root]:
    """What a mapping file says, and the folder of films that its paths are relative to.

    Raises:
        FileError, ConfigError: naming the file, if it cannot be read.
    """
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
    return mapping, Root(folder=folder, mapping=path)


def mapped_films(mapping: FilmsMapping, root: Root, stories: Sequence[Story]) -> tuple[dict[str, FilmFiles], list[str]]:
    """The films that a mapping says where to find: title -> film, and the titles that no story has.

    Raises:
        ValueError: if an entry does not fit its story, or the files speak against what is said.
    """
    titles = {story.title: story for story in stories}
    unknown = sorted(mapping.stories.keys() - titles.keys())
    if unknown and mapping.shots is None and not titles.keys() & mapping.stories.keys():
        raise ValueError(f"{root.mapping}: names none of these stories; {unknown[0]!r}{nearest(unknown[0], titles)}")
    named = stories if mapping.shots is not None else [story for story in stories if story.title in mapping.stories]
    found = {}
    for story in named:
        found[story.title] = _of_entry(mapping, root, story)
        if twice := said_twice(found[story.title], story):
            raise ValueError(f"{root.mapping}: {twice}")
    return found, unknown


def _of_entry(mapping: FilmsMapping, root: Root, story: Story) -> FilmFiles:
    path, folder = root.mapping, root.folder
    entry = mapping.stories.get(story.title, story.slug)
    where = f"{path}: stories.{story.title}"
    if isinstance(entry, OneFile):
        file = folder / entry.file
        if not is_video(file):
            raise ValueError(f"{where}: there is no video file {file}")
        try:
            ranges = entry.ranges(probe(file).frames, len(story.shots))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        shots = tuple(ShotFile(path=file, frames=frames) for frames in ranges)
        return FilmFiles(folder=file, shots=shots, layout=f"one file, frames as {path.name} says")
    if isinstance(entry, list):
        if len(entry) != len(story.shots):
            raise ValueError(
                f"{where} lists {len(entry)} shots and the story has {len(story.shots)}: write one path for each"
            )
        return FilmFiles(
            folder=folder, shots=tuple(_file(folder / name) for name in entry), layout=f"paths in {path.name}"
        )
    if mapping.shots is None:
        place = folder / entry
        if is_video(place):
            return whole_film(place, story, root)
        if not place.is_dir():
            raise ValueError(f"{where}: there is no folder or video {place}")
        return find_shots(place, story, root)
    _check_numbering(path, mapping.shots, folder, entry, story)
    shots = tuple(_file(folder / _filled(path, mapping.shots, entry, shot)) for shot in story.shots)
    return FilmFiles(folder=folder, shots=shots, layout=f"{mapping.shots} of {path.name}, {{story}} being {entry}")


def _filled(path: Path, template: str, entry: str, shot: Shot, *, off: Mapping[str, int] | None = None) -> str:
    """The path of a shot; ``off`` is added to the numbers of these fields."""
    counted = {"scene": shot.scene, "shot": shot.number, "index": shot.index + 1}
    fields: dict[str, int | str] = {"story": entry}
    for name, number in counted.items():
        fields |= {name: number + (off or {}).get(name, 0), f"{name}0": number - 1}

    def fill(found: re.Match[str]) -> str:
        name, width = found.groups()
        if name not in fields or (width and name == "story"):
            known = ", ".join(f"{{{one}}}" for one in fields)
            raise ValueError(f"{path}: shots: {found[0]} cannot be filled in; known are: {known}")
        return f"{fields[name]:0{width}d}" if width else str(fields[name])

    filled = _FIELD.sub(fill, template)
    if "{" in _FIELD.sub("", template) or "}" in _FIELD.sub("", template):
        raise ValueError(f"{path}: shots: {template!r} has braces that are no field such as {{index}} or {{index:03d}}")
    return filled


def _check_numbering(path: Path, template: str, root: Path, entry: str, story: Story) -> None:
    """Raise ValueError if files lie there by which a field seems to count otherwise than it does."""
    first, last = story.shots[0], story.shots[-1]
    usual = root / _filled(path, template, entry, first)
    for off in ({"scene": -first.scene, "shot": -1}, {"scene": -first.scene}, {"shot": -1}, {"index": -1}):
        file = root / _filled(path, template, entry, first, off=off)
        if file != usual and is_video(file):
            wrong = " and ".join(f"{{{name}}}" for name in off if f"{{{name}" in template)
            raise ValueError(
                f"{path}: {file} is there, so these files count from 0, and {wrong} from 1: write {{scene0}}, "
                f"{{shot0}} or {{index0}} instead, or list the paths under stories: {quoted(story.title)}: [...]"
            )
    file = root / _filled(path, template, entry, last, off={"index": 1})
    if file != root / _filled(path, template, entry, last) and is_video(file):
        raise ValueError(f"{path}: {file} is there, and {story.title!r} has only {len(story.shots)} shots")


def _file(path: Path) -> ShotFile:
    return ShotFile(path=path) if is_video(path) else ShotFile(reason=f"there is no file {path.name}")
