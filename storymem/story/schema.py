"""Stories: read from YAML or from ST-Bench's JSON into plain records.

All mistakes in a story are found here together, before any model is loaded: reading imports neither torch nor numpy,
and Pillow only if the story has reference images.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from storymem.config import closest
from storymem.io import files_below, find_sibling, folded
from storymem.story.json_schema import MAX_FRAMES, SHOT, STORY
from storymem.story.parser import (
    STORY_SUFFIXES,
    StoryError,
    StoryFile,
    Value,
    as_written,
    image_fault,
    listing,
    shorten,
)

logger = logging.getLogger(__name__)

MAX_SHOTS = 5000
MAX_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Character:
    """A character of the story, with a text about their look, and images of it (paths that exist)."""

    name: str
    description: str | None = None
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot: a prompt and its settings.

    Args:
        prompt: one to four sentences, white space collapsed.
        cut: False if the shot continues the previous one.
        scene: the scene's number in the story, from 1.
        number: the shot's number in its scene, from 1.
        characters: names from ``Story.characters``.
        frames: length in frames, 4n + 1; ``None``, as in the next two, means the setting of the configuration.
        seed: of the shot's noise.
        negative_prompt: what should not be seen; may be empty.
        references: images that join the memory just before this shot and stay in it.
        index: place in the film, from 0.
    """

    prompt: str
    cut: bool
    scene: int
    number: int
    characters: tuple[str, ...] = ()
    frames: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    references: tuple[Path, ...] = ()
    index: int

    @property
    def label(self) -> str:
        """The shot's name in messages: ``shot 3 (scene 2, shot 1)``."""
        return _label(self.index, self.scene, self.number)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Shots that belong together, numbered from 1."""

    number: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story, checked.

    Args:
        title: of the film; its folder is named after it.
        overview: one to three sentences.
        characters: who appears in it.
        scenes: with their shots.
        style: begins every prompt that the model is given: ``Stop-motion`` -> ``Stop-motion: A fox runs.``
        genre: for tables; not part of the prompt.
        reconstruct_target: the looks of all subjects, one a line; read by Memento alone.
        source: absolute path of its file, if it has one.
        notes: one line for each file that was read under another name than the story gives.
    """

    title: str
    overview: str
    characters: tuple[Character, ...] = ()
    scenes: tuple[Scene, ...]
    style: str | None = None
    genre: str | None = None
    reconstruct_target: str | None = None
    source: Path | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def shots(self) -> tuple[Shot, ...]:
        """All shots in the film's order."""
        return tuple(shot for scene in self.scenes for shot in scene.shots)

    def prompt_of(self, shot: Shot) -> str:
        """The text that the model is given for ``shot``: style, prompt, descriptions of its characters.

        A description that the prompt contains is not repeated.
        """
        looks = {one.name: one.description or "" for one in self.characters}
        shown = [(name, looks.get(name, "")) for name in shot.characters]
        added = [f"{name}: {look.rstrip('.')}." for name, look in shown if look not in shot.prompt]
        prompt = " ".join([shot.prompt, *added])
        return f"{self.style}: {prompt}" if self.style else prompt

    @property
    def references(self) -> tuple[Path, ...]:
        """The reference images of all characters, in order; those of single shots are not among them."""
        return tuple(path for character in self.characters for path in character.references)

    @property
    def all_references(self) -> tuple[Path, ...]:
        """The reference images of all characters, then those of all shots, in order."""
        return (*self.references, *(path for shot in self.shots for path in shot.references))

    @property
    def slug(self) -> str:
        """The title as a folder's name: lower case, words joined by ``_``, at most 60 characters."""
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", self.title).lower().replace("'", ""))
        return "_".join(words).strip("_")[:60].rstrip("_") or "story"

    def to_dict(self) -> dict[str, Any]:
        """The content of the story as plain JSON types, without the genre and the content of images.

        Paths are relative to the story's folder, so a moved story gives an equal result.
        """
        return {
            "title": self.title,
            "overview": self.overview,
            "style": self.style,
            "characters": [
                {"name": one.name, "references": self.written(one.references)}
                | ({"description": one.description} if one.description else {})
                for one in self.characters
            ],
            "scenes": [
                {"number": scene.number, "shots": [self._shot_dict(shot) for shot in scene.shots]}
                for scene in self.scenes
            ],
        } | ({} if self.reconstruct_target is None else {"reconstruct_target": self.reconstruct_target})

    def _shot_dict(self, shot: Shot) -> dict[str, Any]:
        lists = {"characters": list(shot.characters), "references": self.written(shot.references)}
        return {key: getattr(shot, key) for key in SHOT["properties"]} | lists

    def written(self, paths: Iterable[Path]) -> list[str]:
        """Paths relative to the story's folder where they lie below it, with forward slashes."""
        folder = None if self.source is None else self.source.parent
        return [
            (path.relative_to(folder) if folder and path.is_relative_to(folder) else path).as_posix() for path in paths
        ]


def load_story(path: str | os.PathLike[str], text: str | None = None) -> Story:
    """Read a story from YAML or from ST-Bench's JSON; the format is detected from its keys.

    A shot is a cut unless ``cut: false`` is set. JSON may contain comments (``//``, ``/* */``) and trailing commas. In
    ST-Bench's format ``cut`` may be the strings ``"True"`` and ``"False"``, and ``first_frame_prompt`` is ignored.
    Paths of reference images are relative to the story file. ``text`` is read in place of the file's, if given.

    Raises:
        StoryError: with a line for every problem: file, line, shot, what was expected, what to write instead.
    """
    reader = _Reader(Path(path), text)
    story = reader.read()
    reader.raise_if_faulty()
    return story


def load_stories(paths: Iterable[str | os.PathLike[str]]) -> list[Story]:
    """The stories of files and of folders (with sub-folders, ordered by file name), in this order.

    Args:
        paths: in folders all YAML and JSON files must be stories; hidden ones are skipped with a warning.

    Raises:
        StoryError: with every problem of all files; for a folder without stories, or no path at all; for two stories
            with the same name for their films.
    """
    stories: list[Story] = []
    faults: list[str] = []
    files: dict[Path, Path] = {}  # each once, even if it is given by two ways
    for path in map(Path, paths):
        found = _stories_below(path) if path.is_dir() else [path]
        if not found:
            faults.append(f"{path}: there are no stories (*.yaml, *.json) in this folder")
        files |= {file.resolve(): file for file in found if file.resolve() not in files}
    for file in files.values():
        try:
            stories.append(load_story(file))
        except StoryError as error:
            faults += error.problems
    if not stories and not faults:
        faults.append("no story is given: write the path of a story file, of several, or of a folder of stories")
    if faults:
        raise StoryError(faults)
    by_folder: dict[str, list[Story]] = {}
    for story in stories:
        by_folder.setdefault(story.slug, []).append(story)
    for slug, alike in by_folder.items():
        if len(alike) > 1:
            where = ", ".join(str(story.source) for story in alike)
            titles = " and ".join(dict.fromkeys(f'"{shorten(story.title)}"' for story in alike))
            which = "two" if len(alike) == 2 else str(len(alike))
            faults.append(f"{which} stories are called {slug} ({where}): give each its own title, not {titles}")
    if faults:
        raise StoryError(faults)
    return stories


def _stories_below(folder: Path) -> list[Path]:
    """Story files in a folder and its subfolders, links included, sorted by path."""
    stories = sorted(path for path in files_below(folder) if path.suffix.lower() in STORY_SUFFIXES)
    if hidden := [path.name for path in stories if path.name.startswith(".")]:
        logger.warning("%s: hidden files are not read as stories: %s", folder, listing(sorted(hidden)))
    return [path for path in stories if not path.name.startswith(".")]


class _Reader(StoryFile):
    """Converts values to records. An invalid one is recorded as a problem and replaced by a default."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        super().__init__(path, text)
        self._names: set[str] | None = None  # of the characters; None if the list of characters is invalid
        self._images: dict[Path, tuple[Path, tuple[str, str] | None]] = {}
        self._notes: dict[str, None] = {}
        self._shots = 0  # read so far
        # Keys that ST-Bench does not have
        self._absent = {key: Value(self, None) for key in (*STORY["properties"], *SHOT["properties"])}

    def read(self) -> Story:
        title, overview = ("story_name", "story_overview") if self.is_bench else ("title", "overview")
        entries = self._absent | self.root.mapping("story", example=f"{title}: ...")
        characters = self.characters(entries["characters"])
        return Story(
            title=entries[title].string() or "",
            overview=entries[overview].string() or "",
            characters=characters,
            scenes=self.scenes(entries["scenes"]),
            style=entries["style"].string(),
            genre=entries["genre"].string(),
            reconstruct_target=self.lines(entries["reconstruct_target"]),
            source=self.path.absolute(),
            notes=tuple(self._notes),
        )

    def lines(self, value: Value) -> str | None:
        """As :meth:`Value.string`, for a text of several lines; empty ones are left out."""
        node = value.node
        written = node.value.splitlines() if isinstance(node, yaml.ScalarNode) else []
        if node is None or len(written) < 2:
            return value.string()
        nodes = [yaml.ScalarNode(node.tag, line, node.start_mark, node.end_mark) for line in written if line.strip()]
        return "\n".join(replace(value, node=line).string() or "" for line in nodes) or value.string()

    def characters(self, value: Value) -> tuple[Character, ...]:
        found: list[Character] = []
        taken: set[str] = set()
        listed = value.items()
        if len(listed) > MAX_CHARACTERS:
            raise listed[0].refusal(f"{len(listed):,} characters", f"at most {MAX_CHARACTERS:,}", "list fewer")
        for place, item in enumerate(listed, start=1):
            entries = item.mapping(f"character {place}")
            name = entries["name"].string() or ""
            if name and folded(name).lower() in taken:
                wrong = f"the name {name} is used twice"
                entries["name"].note(wrong, "a different name for each", "write another name")
            taken.add(folded(name).lower())
            look, references = entries["description"].string(), self.references(entries["references"])
            found.append(Character(name=name, description=look, references=references))
        names = {character.name for character in found}
        # If the list could not be read, the names in the shots cannot be checked.
        faulty = "" in names or (not names and bool(self.problems))
        self._names = None if faulty else names
        return tuple(found)

    def scenes(self, value: Value) -> tuple[Scene, ...]:
        read_scene = self.bench_scene if self.is_bench else self.scene
        found: list[Scene] = []
        for item in value.items():
            found.append(read_scene(item, found))
        return tuple(found)

    def scene(self, item: Value, before: list[Scene]) -> Scene:
        number = len(before) + 1
        entries = item.mapping(f"scene {number}", example='shots: [{prompt: "..."}]')
        listed = enumerate(entries["shots"].items(), start=1)
        shots = [self.shot(one.mapping(self.label(one, number, place)), number, place) for place, one in listed]
        return Scene(number=number, shots=tuple(shots))

    def bench_scene(self, item: Value, before: list[Scene]) -> Scene:
        entries = item.mapping(f"scene {len(before) + 1}", example="video_prompts: [...]")
        number = self.scene_number(entries["scene_num"], before)
        where = f"scene {number}"
        prompts, cuts = (entries[key].at(where).items() for key in ("video_prompts", "cut"))
        if cuts and prompts and len(cuts) != len(prompts):
            wrong = f"cut has {len(cuts)} entries and video_prompts has {len(prompts)}"
            cure = "write one true or false for each prompt"
            entries["cut"].at(where).note(wrong, "equal numbers of both", cure)
        shots = []
        for place, (prompt, cut) in enumerate(zip_longest(prompts, cuts[: len(prompts)]), start=1):
            label = self.label(prompt, number, place)
            given = {"prompt": prompt.at(label), "cut": (cut or self._absent["cut"]).at(label)}
            shots.append(self.shot(self._absent | given, number, place))
        return Scene(number=number, shots=tuple(shots))

    def label(self, item: Value, scene: int, number: int) -> str:
        """The name of the next shot, which is counted."""
        self._shots += 1
        if self._shots > MAX_SHOTS:
            raise item.refusal(f"more than {MAX_SHOTS:,} shots", "a shorter story", "divide it into several")
        return _label(self._shots - 1, scene, number)

    def shot(self, entries: Mapping[str, Value], scene: int, number: int) -> Shot:
        index = self._shots - 1
        return Shot(
            prompt=entries["prompt"].string() or "",
            cut=self.cut(entries["cut"], index),
            scene=scene,
            number=number,
            characters=self.cast(entries["characters"]),
            frames=self.frames(entries["frames"]),
            seed=entries["seed"].integer(),
            negative_prompt=entries["negative_prompt"].string(),
            references=self.references(entries["references"]),
            index=index,
        )

    def scene_number(self, value: Value, before: list[Scene]) -> int:
        """``scene_num`` as written (other tools name files after it); without it, scenes are counted."""
        following = before[-1].number + 1 if before else 1
        number = value.integer()
        if number is None:
            return following
        if before and number < following:
            wrong = f"scene_num {number} comes after scene_num {following - 1}"
            value.note(wrong, "increasing numbers", f"write scene_num: {following} instead")
            return following
        return number

    # The values of a shot

    def cut(self, value: Value, index: int) -> bool:
        """In ST-Bench's lists it may be a text."""
        if value.node is None:
            return True
        written, prefix = str(value.node.value).lower(), "write " if value.is_item else "write cut: "
        if value.kind == "bool" or (value.is_item and value.kind == "str" and written in ("true", "false")):
            cut = written in ("true", "yes", "on")
        else:
            meant = "false" if written in ("false", "no", "off", "0", "n", "f") else "true"
            value.note(f"cut is {value.excerpt}", "true or false without quotes", f"{prefix}{meant} instead")
            return True
        if index == 0 and not cut:
            value.note("the first shot of a film has nothing to continue", "a cut", f"{prefix}true instead")
        return cut

    def cast(self, value: Value) -> tuple[str, ...]:
        found: list[str] = []
        for item in value.items():
            name = item.string()
            if name is None:
                continue
            name = self.known_name(name)
            if name in found:
                item.note(f"{name} is listed twice", "each character once", "remove one of the two")
            elif self._names is not None and name not in self._names:
                near = closest(name, self._names)
                cure = f"write {near} instead" if near else f"add - {{name: {name}}} to the story's characters"
                known = listing(sorted(self._names)) or "none, because the story lists no characters"
                item.note(f"{name} is not a character of this story", known, cure)
            found.append(name)
        return tuple(found)

    def known_name(self, name: str) -> str:
        """The character with this name, whichever way accents are encoded."""
        if not self._names or name in self._names:
            return name
        same = [one for one in self._names if folded(one) == folded(name)]
        return same[0] if len(same) == 1 else name

    def frames(self, value: Value) -> int | None:
        frames = value.integer()
        if frames is None or (5 <= frames <= MAX_FRAMES and frames % 4 == 1):
            return frames
        if frames > MAX_FRAMES:
            value.note(f"frames is {frames}", f"at most {MAX_FRAMES}", f"write frames: {MAX_FRAMES}")
            return None
        below = (frames - 1) // 4 * 4 + 1
        cure = f"write frames: {below} or {below + 4} instead" if below >= 5 else "write frames: 5 or more"
        value.note(f"frames is {frames}", "4n + 1, from 5", cure)
        return None

    def references(self, value: Value) -> tuple[Path, ...]:
        found = []
        for item in value.items():
            written = item.string(verbatim=True)
            if written is None:
                continue
            path = self.path.absolute().parent / os.path.expanduser(written)
            if path not in self._images:
                file = find_sibling(path) or path
                self._images[path] = file, image_fault(file)
            file, fault = self._images[path]
            if fault is not None:
                wrong, cure = fault
                item.note(f"reference {as_written(written)} {wrong}", f"an image at {as_written(str(path))}", cure)
            elif file != path:
                note = f"reference {as_written(written)} is read from {as_written(file.name)}"
                self._notes[f"{self.path}:{item.line}: {item.where}: {note}"] = None
            found.append(file)
        return tuple(found)


def _label(index: int, scene: int, number: int) -> str:
    return f"shot {index + 1} (scene {scene}, shot {number})"
