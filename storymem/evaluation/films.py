"""Where the shots of a film lie: in our film folders, in folders of ``01_02.mp4``, or where a mapping file says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, build_settings
from storymem.film import MANIFEST, Film, FilmError
from storymem.story import STORY_SUFFIXES, Shot, Story, StoryError, load_stories

MAPPING = "films.yaml"


@dataclass(frozen=True, kw_only=True)
class ShotFile:
    """The video of one shot: a path, or the reason why there is none."""

    path: Path | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class FilmFiles:
    """The film of one story: a `ShotFile` for each of its shots, and the folder they lie in, if it was found."""

    folder: Path | None
    shots: tuple[ShotFile, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilmsMapping:
    """What ``films.yaml`` in a folder of films says; paths are relative to that folder.

    Args:
        shots: path of a shot with the fields ``{story}``, ``{scene}``, ``{shot}`` (number in its scene) and ``{index}``
            (number in the film), all counted from 1: ``"{story}/clip_{index:03d}.mp4"``.
        stories: a story's title -> what stands for ``{story}``, or a list of its shots' paths; a story that is not
            named here stands under its slug (``the_last_tram``).
    """

    shots: str | None = None
    stories: dict[str, str | list[str]] = field(default_factory=dict)


def stories_of(folder: str | Path, only: Sequence[str] = ()) -> list[Story]:
    """All stories of a folder (YAML or published JSON, sub-folders included), ordered by file name.

    Args:
        folder: holds the files; other YAML or JSON files must not lie there.
        only: titles, slugs or file names of the stories wanted; all by default.

    Raises:
        ValueError: if there is no story, two have one slug, ``only`` names an unknown one, or a file is faulty (all
            faults of all files are told).
    """
    if not Path(folder).is_dir():
        raise ValueError(f"stbench.stories={folder}: there are no stories, for there is no such folder")
    try:
        stories = load_stories([folder])
    except StoryError as error:
        raise ValueError(f"stbench.stories={folder}:\n{error}") from None
    return _chosen(stories, only)


def _chosen(stories: list[Story], only: Sequence[str]) -> list[Story]:
    if not only:
        return stories
    wanted = {_key(name): name for name in only}
    found = [story for story in stories if wanted.keys() & set(_names(story))]
    unknown = [name for key, name in wanted.items() if not any(key in _names(story) for story in found)]
    if unknown:
        known = ", ".join(story.slug for story in stories)
        raise ValueError(f"stbench.only: there is no story {unknown[0]!r}; known are: {known}")
    return found


def find_films(folder: str | Path, stories: Sequence[Story]) -> list[FilmFiles]:
    """The film of each story, in order; a film or shot that is not there has the reason in its place.

    Looks for ``films.yaml`` first, then for film folders of ours (by the title in their manifest), then for folders
    named after the story (title, slug or file name, with or without a leading number) that hold ``01_02.mp4`` or
    ``shots/01_02.mp4``: scene 1, shot 2.

    Raises:
        ValueError: if there is no such folder, the mapping file is faulty, or a film of ours tells another text under
            the same title.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"films={folder}: there is no such folder")
    if (root / MAPPING).is_file():
        return _mapped(root, stories)
    ours = dict(_manifests(root))
    folders = {_key(path.name): path for path in sorted(root.iterdir(), reverse=True) if path.is_dir()}
    found = []
    for story in stories:
        if story.title in ours:
            found.append(_of_manifest(ours[story.title], story))
            continue
        place = next((folders[name] for name in _names(story) if name in folders), None)
        found.append(_absent(story, root) if place is None else _numbered(place, story))
    return found


def _absent(story: Story, root: Path) -> FilmFiles:
    reason = f"there is no film of this story in {root.name}/ (a folder {story.slug}/ was looked for)"
    return FilmFiles(folder=None, shots=tuple(ShotFile(reason=reason) for _ in story.shots))


def _manifests(root: Path) -> Iterator[tuple[str, Film]]:
    for path in [root / MANIFEST, *sorted(root.glob(f"*/{MANIFEST}"))]:
        if path.is_file():
            film = Film.open(path.parent)
            yield film.story["title"], film


def _of_manifest(film: Film, story: Story) -> FilmFiles:
    told = [shot["prompt"] for scene in film.story["scenes"] for shot in scene["shots"]]
    written = [shot.prompt for shot in story.shots]
    if told != written:
        raise FilmError(
            f"{film.folder} holds a film of another text under the title {story.title!r}: score it with the stories it "
            "was made from (stbench.stories=FOLDER)"
        )
    finished = len(film.shots)
    shots = [_file(film.folder / record.file) for record in film.shots]
    shots += [ShotFile(reason=f"the film has only {finished} finished shots")] * (len(story.shots) - finished)
    return FilmFiles(folder=film.folder, shots=tuple(shots))


def _numbered(folder: Path, story: Story) -> FilmFiles:
    beneath = folder / "shots" if (folder / "shots").is_dir() else folder
    shots = tuple(_file(beneath / f"{shot.scene:02d}_{shot.number:02d}.mp4") for shot in story.shots)
    return FilmFiles(folder=folder, shots=shots)


def _mapped(root: Path, stories: Sequence[Story]) -> list[FilmFiles]:
    path = root / MAPPING
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a mapping, for example shots: "{{story}}/{{scene:02d}}_{{shot:02d}}.mp4"')
    mapping = build_settings(FilmsMapping, content)
    titles = {story.title for story in stories}
    if not titles & mapping.stories.keys() and mapping.shots is None:
        raise ValueError(f"{path}: names none of these stories; known are: {', '.join(sorted(titles))}")
    return [_of_mapping(root, mapping, story) for story in stories]


def _of_mapping(root: Path, mapping: FilmsMapping, story: Story) -> FilmFiles:
    entry = mapping.stories.get(story.title, story.slug)
    if isinstance(entry, list):
        if len(entry) != len(story.shots):
            raise ValueError(
                f"{root / MAPPING}: stories.{story.title} lists {len(entry)} shots and the story has "
                f"{len(story.shots)}: write one path for each"
            )
        return FilmFiles(folder=root, shots=tuple(_file(root / name) for name in entry))
    if mapping.shots is None:
        return _absent(story, root)
    return FilmFiles(folder=root, shots=tuple(_file(root / _filled(root, mapping, entry, s)) for s in story.shots))


def _filled(root: Path, mapping: FilmsMapping, entry: str, shot: Shot) -> str:
    assert mapping.shots is not None
    fields: dict[str, Any] = {"story": entry, "scene": shot.scene, "shot": shot.number, "index": shot.index + 1}
    try:
        return mapping.shots.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in fields)
        raise ValueError(f"{root / MAPPING}: shots: {error} cannot be filled in; known are: {known}") from None


def _file(path: Path) -> ShotFile:
    return ShotFile(path=path) if path.is_file() else ShotFile(reason=f"there is no file {path.name}")


def _names(story: Story) -> list[str]:
    """The keys under which a story may be asked for."""
    stem = "" if story.source is None else story.source.stem
    return [key for key in dict.fromkeys(_key(name) for name in (story.title, story.slug, stem)) if key]


def _key(name: str) -> str:
    """A name without its leading number, suffix, case, spaces and punctuation."""
    stem = name.rsplit(".", 1)[0] if name.endswith(STORY_SUFFIXES) else name
    letters = "".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", stem).lower()))
    return letters.lstrip("0123456789") or letters
