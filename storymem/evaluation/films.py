"""Which film belongs to which story: by exact names, or by similar names if only one film and one story have them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem.config import nearest
from storymem.evaluation.layouts import (
    FilmFiles,
    ShotFile,
    UnclearError,
    find_shots,
    has_prompts_of,
    is_video,
    quoted,
    videos_below,
)
from storymem.evaluation.mapping import MAPPING, MAPPING_SUFFIXES, FilmsMapping, mapped_films, read_mapping
from storymem.film.folder import Film
from storymem.film.manifest import MANIFEST
from storymem.story import STORY_SUFFIXES, Story, StoryError, load_stories
from storymem.story.writing import story_of


def stories_of(folder: str | Path, only: Sequence[str] = ()) -> list[Story]:
    """All stories of a folder (YAML or published JSON, with sub-folders), ordered by file name.

    Args:
        folder: of the stories; other YAML or JSON files must not be in it.
        only: titles, short names or file names of the stories wanted; all by default.

    Raises:
        ValueError: if there is no story, two have one short name, ``only`` names an unknown one or could mean several,
            or files are faulty (it lists all faults).
    """
    if Path(folder).is_file():
        one = Path(folder)
        raise ValueError(
            f"stbench.stories={folder} is one story: write stbench.stories={one.parent} stbench.only=[{one.name}]"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"stbench.stories={folder}: there is no such folder")
    try:
        return only_named(load_stories([folder]), only)
    except StoryError as error:
        raise ValueError(f"stbench.stories={folder}:\n{error}") from None


def only_named(stories: Sequence[Story], only: Sequence[str]) -> list[Story]:
    """The ``stories`` that ``only`` names, all if it is empty. Raises ``ValueError`` as `stories_of`."""
    chosen = set()
    for name in only:
        stem = name.rsplit(".", 1)[0] if name.endswith(STORY_SUFFIXES) else name
        found = [story for story in stories if {_nfc(stem), _nfc(name)} & set(_names(story))]
        if len(found) != 1:
            known = [story.slug for story in found or stories]
            raise ValueError(f"stbench.only: {name!r} names {len(found)} stories{nearest(name, known)}")
        chosen.add(found[0].title)
    return [story for story in stories if story.title in chosen or not only]


def stories_of_films(places: Sequence[Path]) -> list[Story]:
    """The stories that films were made from, by their manifests; none if a place holds other films or has a mapping.

    Args:
        places: folders, each a film or with a film in each sub-folder.

    Raises:
        ValueError: if films of one title were made from different prompts.
    """
    found: dict[str, Story] = {}
    for place in places:
        below = sorted(place.iterdir()) if place.is_dir() else []
        folders = [folder for folder in (place, *below) if folder.is_dir() and Film.exists(folder)]
        if not folders or os.path.lexists(place / MAPPING):
            return []
        for film in map(Film.open, folders):
            story = story_of(_as_written(film.story), film.folder / MANIFEST)
            other = found.setdefault(story.title, story)
            if [shot.prompt for shot in other.shots] != [shot.prompt for shot in story.shots]:
                raise ValueError(
                    f"{film.folder} and another film are called {story.title!r} and have other prompts: "
                    "name their stories with stbench.stories=FOLDER"
                )
    return list(found.values())


def _as_written(record: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's story as a story file; images whose paths depend on where the story was are left out."""
    content = {key: value for key, value in record.items() if key in ("title", "overview", "style") and value}
    content.setdefault("overview", record["title"])
    content["characters"] = [
        {key: one[key] for key in ("name", "description") if one.get(key)}
        | {"references": [path for path in one.get("references", ()) if Path(path).is_absolute()]}
        for one in record.get("characters", ())
    ]
    known = ("prompt", "cut", "characters")
    content["scenes"] = [
        {"shots": [{key: shot[key] for key in known if key in shot} for shot in scene["shots"]]}
        for scene in record["scenes"]
    ]
    return content


@dataclass(frozen=True, kw_only=True)
class Films:
    """The films in a folder.

    Args:
        root: the folder.
        films: of each story asked for, in order.
        unused: what else is there, for the plan.
    """

    root: Path
    films: tuple[FilmFiles, ...]
    unused: tuple[str, ...] = ()


def find_films(place: str | Path, stories: Sequence[Story]) -> Films:
    """The film of each story; a film or shot that is not there has a reason instead.

    The mapping file comes first; then films of ours by the title in their manifest; then folders or videos with the
    story's title, short name or file name; then those with the same name but for leading numbers, case and
    punctuation, if only one film and one story have it.

    Args:
        place: a folder of films, which may contain ``films.yaml``, or such a mapping file.
        stories: of the films.

    Raises:
        ValueError: if there is no such folder, the mapping file is faulty, a story could have two films or a film two
            stories (also through links), the shots of a film cannot be identified, or a film of ours has the same title
            but other prompts.
    """
    path = Path(place)
    if not path.is_dir() and path.suffix.lower() not in MAPPING_SUFFIXES:
        several = "; several are 'films={NAME: FOLDER, NAME: FOLDER}'" if "," in str(place) else ""
        raise ValueError(f"films={place}: there is no such folder{several}")
    file = path / MAPPING if path.is_dir() else path
    without = path.is_dir() and not os.path.lexists(file)
    mapping, folder = (FilmsMapping(), path) if without else read_mapping(file)
    try:
        found = mapped_films(mapping, file, folder, stories)
        unused = [f"{title!r} in {file.name}" for title in sorted(mapping.stories.keys() - {s.title for s in stories})]
        if others := [story for story in stories if story.title not in found]:
            searched, left = _search(folder, others, {film.folder for film in found.values()})
            found |= searched
            unused += left
    except UnclearError as error:
        raise ValueError(error.advice(folder, file)) from None
    _check_distinct(found, path)
    return Films(root=folder, films=tuple(found[story.title] for story in stories), unused=tuple(unused))


def _check_distinct(found: Mapping[str, FilmFiles], where: Path) -> None:
    """Raise ``ValueError`` if two shots are the same frames of one file, also through links."""
    owners: dict[tuple[str, int], str] = {}
    for title, film in found.items():
        for shot in film.shots:
            if shot.path is None:
                continue
            frames = (os.path.realpath(shot.path), (shot.frames or (0, 0))[0])
            if (other := owners.setdefault(frames, title)) != title:
                cure = f"write stbench.only=[{quoted(title)}] for one of them, or give each a film of its own"
                raise ValueError(
                    f"{where}: shots of {other!r} and {title!r} are the same frames of {frames[0]}: {cure}"
                )


def _search(root: Path, stories: Sequence[Story], taken: set[Path | None]) -> tuple[dict[str, FilmFiles], list[str]]:
    """Films by manifests and names: title -> film, and what else is in ``root``."""
    below = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    own = [folder for folder in (root, *below) if Film.exists(folder)]
    others = [] if root in own else [path for path in below if path not in own and path not in taken]
    folders = [path for path in others if path.is_dir() and next(videos_below(path), None) is not None]
    files = [path for path in others if is_video(path)]
    places = _by_name(folders, stories, _by_manifest([Film.open(folder) for folder in own], folders, stories))
    places = _by_name(files, stories, places)
    if not places and _holds_one_film(root, folders, files, stories):
        places, folders, files = {stories[0].title: root}, [], []
    found = {story.title: find_shots(places[story.title], story) for story in stories if story.title in places}
    for story in stories:
        reason = f"there is no film of this story in {root.name}/ (a folder {story.slug}/ is expected)"
        found.setdefault(story.title, FilmFiles(folder=None, shots=(ShotFile(reason=reason),) * len(story.shots)))
    return found, [path.name for path in (*own, *folders, *files) if path not in {root, *places.values()}]


def _by_manifest(films: Sequence[Film], folders: Sequence[Path], stories: Sequence[Story]) -> dict[str, Path]:
    """Title -> folder of the film of ours with this title; if there are several, the only one with its prompts.

    Raises:
        UnclearError: if there are several with its prompts, or another of the ``folders`` has the story's name.
    """
    found = {}
    for story in stories:
        same = [film for film in films if _nfc(film.story["title"]) == _nfc(story.title)]
        exact = [film for film in same if has_prompts_of(film, story)]
        if len(exact) > 1:
            raise _two_films(story, [film.folder for film in exact])
        if same:
            found[story.title] = (exact or same)[0].folder
            if named := [folder for folder in folders if _nfc(folder.name) in _names(story)]:
                raise _two_films(story, [found[story.title], *named])
    return found


def _by_name(places: Sequence[Path], stories: Sequence[Story], known: Mapping[str, Path]) -> dict[str, Path]:
    """``known``, and for other stories the folder or file with their name: exactly, else without number and case.

    Raises:
        UnclearError: if two places have one story's name, or one place the names of two stories.
    """
    found = dict(known)
    for names_of, name_of in ((_names, _nfc), (_keys, _key)):
        named = {path: name_of(path.name if path.is_dir() else path.stem) for path in places}
        taken = set(found.values())
        for story in stories:
            free = [path for path, name in named.items() if name in names_of(story) and path not in taken]
            if story.title in found or not free:
                continue
            if len(free) > 1:
                raise _two_films(story, free)
            owners = [other.title for other in stories if named[free[0]] in names_of(other)]
            if len(owners) > 1:
                either = " or ".join(map(repr, owners))
                raise UnclearError(
                    f"{free[0]} could be the film of {either}: rename it, or write which it is", story, free[0]
                )
            found[story.title] = free[0]
    return found


def _two_films(story: Story, places: Sequence[Path]) -> UnclearError:
    both = " and ".join(map(str, places := sorted(places)))
    problem = f"{both} could both be the film of {story.title!r}: move one of them away, or write which one it is"
    return UnclearError(problem, story, places[0])


def _holds_one_film(root: Path, folders: Sequence[Path], files: Sequence[Path], stories: Sequence[Story]) -> bool:
    """Whether ``root`` itself holds the shots of a film, as the official code of StoryMem writes them."""
    of_shots = [path for path in folders if re.fullmatch(r"shots|scene_?[0-9]+", path.name)]
    numbered = [path for path in files if re.search("[0-9]", path.stem)]
    if len(folders) > len(of_shots) or not (of_shots or numbered):
        return False
    if len(stories) > 1:
        raise ValueError(
            f"films={root} holds the shots of one film, and there are {len(stories)} stories: write which it "
            "is with stbench.only=[NAME], or name this folder as the story and give the one above it"
        )
    return True


def _names(story: Story) -> list[str]:
    """Title, short name and file name."""
    stem = [] if story.source is None else [story.source.stem]
    return [_nfc(name) for name in (story.title, story.slug, *stem)]


def _keys(story: Story) -> list[str]:
    return [key for key in map(_key, _names(story)) if key]


def _key(name: str) -> str:
    """A name without leading number, case, spaces and punctuation; several stories may have the same."""
    letters = "".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", name).lower()))
    return letters.lstrip("0123456789") or letters


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
