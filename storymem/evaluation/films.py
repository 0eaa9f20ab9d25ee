"""Which film tells which story: folders of films are matched by exact names, or by names that leave no doubt."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from storymem.evaluation.layouts import (
    MAPPING,
    MAPPING_SUFFIXES,
    FilmFiles,
    Root,
    ShotFile,
    find_shots,
    is_video,
    quoted,
    tells,
    videos_below,
    whole_film,
)
from storymem.evaluation.mapping import FilmsMapping, mapped_films, read_mapping
from storymem.film.folder import Film
from storymem.story import STORY_SUFFIXES, Story, StoryError, load_stories

K = TypeVar("K")
V = TypeVar("V")

__all__ = ["FilmFiles", "Films", "ShotFile", "find_all", "find_films", "stories_of"]


def stories_of(folder: str | Path, only: Sequence[str] = ()) -> list[Story]:
    """All stories of a folder (YAML or published JSON, sub-folders included), ordered by file name.

    Args:
        folder: holds the files; other YAML or JSON files must not lie there.
        only: titles, slugs or file names of the stories wanted; all by default.

    Raises:
        ValueError: if there is no story, two have one slug, ``only`` names an unknown one or could mean several, or a
            file is faulty (all faults of all files are told).
    """
    if not Path(folder).is_dir():
        raise ValueError(f"stbench.stories={folder}: there are no stories, for there is no such folder")
    try:
        stories = load_stories([folder])
    except StoryError as error:
        raise ValueError(f"stbench.stories={folder}:\n{error}") from None
    if not only:
        return stories
    chosen = {_named(name, stories).title for name in only}
    return [story for story in stories if story.title in chosen]


def _named(name: str, stories: Sequence[Story]) -> Story:
    """The story that a person calls ``name``."""
    exact = [story for story in stories if _nfc(_stem(name)) in _names(story) or _nfc(name) in _names(story)]
    found = exact or [story for story in stories if _key(name) in _keys(story)]
    if not found:
        known = ", ".join(story.slug for story in stories)
        raise ValueError(f"stbench.only: there is no story {name!r}; known are: {known}")
    if len(found) > 1:
        could = ", ".join(story.slug for story in found)
        raise ValueError(f"stbench.only: {name!r} could be {could}: write one of these")
    return found[0]


@dataclass(frozen=True, kw_only=True)
class Films:
    """What lies in a folder of films.

    Args:
        root: the folder.
        films: of each story asked for, in order.
        unused: what else lies there, for the plan.
    """

    root: Path
    films: tuple[FilmFiles, ...]
    unused: tuple[str, ...] = ()


def find_films(folder: str | Path, stories: Sequence[Story]) -> list[FilmFiles]:
    """The film of each story, in order; see `find_all`."""
    return list(find_all(folder, stories).films)


def find_all(place: str | Path, stories: Sequence[Story]) -> Films:
    """The film of each story; a film or shot that is not there has the reason in its place.

    Looks at what a mapping file says first, then for film folders of ours (by the title in their manifest), then for
    folders named after the story: exactly (title, short name or file name), or else by a name that is the same without
    leading number, case and punctuation if it can only be this one.

    Args:
        place: a folder of films, which may hold ``films.yaml``, or such a mapping file.
        stories: what the films tell.

    Raises:
        ValueError: if there is nothing there, the mapping file is faulty, two films could tell one story or one film
            two stories, a film's shots cannot be told apart, or a film of ours tells another text under the same title.
    """
    path = Path(place)
    is_folder = path.is_dir()
    if not is_folder and path.suffix.lower() not in MAPPING_SUFFIXES:
        raise ValueError(f"films={place}: there is no such folder")
    path = path / MAPPING if is_folder else path
    unsaid = is_folder and not os.path.lexists(path)
    mapping, root = (FilmsMapping(), Root(folder=path.parent, mapping=path)) if unsaid else read_mapping(path)
    found, unknown = mapped_films(mapping, root, stories)
    unused = [f"{title!r} in {path.name}" for title in unknown]
    others = [story for story in stories if story.title not in found]
    if others:
        searched, left = _searched(root, others, taken=[film.folder for film in found.values()])
        found |= searched
        unused += left
    return Films(root=root.folder, films=tuple(found[story.title] for story in stories), unused=tuple(unused))


def _searched(
    root: Root, stories: Sequence[Story], taken: Iterable[Path | None]
) -> tuple[dict[str, FilmFiles], list[str]]:
    """Films found by manifests and names: title -> film; and what else lies in ``root``."""
    below = sorted(path for path in root.folder.iterdir() if not path.name.startswith("."))
    manifests = [folder for folder in (root.folder, *below) if Film.exists(folder)]
    ours = _by_manifest([Film.open(folder) for folder in manifests], stories, root)
    known = {*manifests, *taken}
    inside = [] if root.folder in manifests else below  # of a film of ours
    folders = [path for path in inside if path not in known and path.is_dir() and _holds_video(path)]
    files = [path for path in inside if path not in known and is_video(path)]
    told = {story.title: story for story in stories}
    for title, place in ours.items():
        if named := [folder for folder in folders if _nfc(folder.name) in _names(told[title])]:
            raise _two_films(title, [place, *named], root)
    places = _by_name(folders, stories, root, ours)
    found = {title: find_shots(place, told[title], root) for title, place in places.items()}
    single = _by_name(files, stories, root, places)
    found |= {t: whole_film(file, told[t], root) for t, file in single.items() if t not in places}
    if not found and (film := _root_itself(root, inside, folders, stories)) is not None:
        return {stories[0].title: film}, []
    absent = f"there is no film of this story in {root.folder.name}/ (a folder {{}}/ was looked for)"
    for story in stories:
        if story.title not in found:
            missing = ShotFile(reason=absent.format(story.slug))
            found[story.title] = FilmFiles(folder=None, shots=(missing,) * len(story.shots))
    used = {film.folder for film in found.values()}
    return found, [path.name for path in (*manifests, *folders, *files) if path not in used and path != root.folder]


def _by_manifest(films: Sequence[Film], stories: Sequence[Story], root: Root) -> dict[str, Path]:
    """Title -> folder of the one film of ours with this title, word for word if there are several."""
    by_title: dict[str, list[Film]] = {}
    for film in films:
        by_title.setdefault(_nfc(film.story["title"]), []).append(film)
    found = {}
    for story in stories:
        same = by_title.get(_nfc(story.title), [])
        telling = [film for film in same if tells(film, story)]
        if len(telling) > 1:
            raise _two_films(story.title, [film.folder for film in telling], root)
        if same:
            found[story.title] = (telling or same)[0].folder
    return found


def _by_name(
    places: Sequence[Path], stories: Sequence[Story], root: Root, known: Mapping[str, Path]
) -> dict[str, Path]:
    """``known``, and for other stories the folder or file that bears their name: exactly, or nearly beyond doubt.

    Raises:
        ValueError: if two places bear one story's name, or one place the names of two stories.
    """
    found = dict(known)
    for names_of, name_of in ((_names, _nfc), (_keys, _key)):
        named = _grouped((name_of(path.name if path.is_dir() else path.stem), path) for path in places)
        hits = {
            story.title: list(dict.fromkeys(path for name in names_of(story) for path in named.get(name, ())))
            for story in stories
        }
        owners = _grouped((path, title) for title, paths in hits.items() for path in paths)
        taken = set(found.values())
        for title, paths in hits.items():
            free = [path for path in paths if path not in taken]
            if title in found or not free:
                continue
            if len(free) > 1:
                raise _two_films(title, free, root)
            if len(titles := owners[free[0]]) > 1:
                raise ValueError(
                    f"{free[0]} could be the film of {' or '.join(map(repr, titles))}: rename it, or say which in "
                    f"{root.mapping}:\nstories:\n  {quoted(title)}: {quoted(root.name(free[0]))}"
                )
            found[title] = free[0]
    return found


def _two_films(title: str, places: Sequence[Path], root: Root) -> ValueError:
    return ValueError(
        f"{' and '.join(map(str, places))} could both be the film of {title!r}: move one of them away, or say which in "
        f"{root.mapping}:\nstories:\n  {quoted(title)}: {quoted(root.name(places[0]))}"
    )


def _root_itself(
    root: Root, inside: Sequence[Path], folders: Sequence[Path], stories: Sequence[Story]
) -> FilmFiles | None:
    """The film whose shots lie in ``root`` itself, as the official code of StoryMem leaves them; None if none do."""
    of_shots = [path for path in inside if path in folders and re.fullmatch(r"shots|scene_?[0-9]+", path.name)]
    numbered = [path for path in inside if is_video(path) and re.search("[0-9]", path.stem)]
    if len(folders) > len(of_shots) or not (of_shots or numbered):
        return None
    if len(stories) > 1:
        raise ValueError(
            f"films={root.folder} holds the shots of one film, and there are {len(stories)} stories: say which one it "
            "is with stbench.only=[NAME], or name this folder as the story and give the one above it"
        )
    return find_shots(root.folder, stories[0], root)


def _holds_video(folder: Path) -> bool:
    return next(videos_below(folder), None) is not None


def _names(story: Story) -> list[str]:
    """The names that are the story's own."""
    stem = [] if story.source is None else [story.source.stem]
    return list(dict.fromkeys(_nfc(name) for name in (story.title, story.slug, *stem)))


def _keys(story: Story) -> list[str]:
    return [key for key in dict.fromkeys(map(_key, _names(story))) if key]


def _key(name: str) -> str:
    """A name without its leading number, case, spaces and punctuation: several stories may have the same."""
    letters = "".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", name).lower()))
    return letters.lstrip("0123456789") or letters


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.endswith(STORY_SUFFIXES) else name


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
