"""Stories: what a person writes, read from YAML or from ST-Bench's JSON into plain records.

Whatever is wrong in a story is found here, all of it at once and before any model loads: reading imports
neither torch nor numpy, and Pillow only if the story names reference images.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storymem.story_file import StoryError, StoryFile, kind, listing, nearest, nearest_file, quoted

__all__ = ["Character", "Scene", "Shot", "Story", "StoryError", "load_stories", "load_story"]

STORY_SUFFIXES = (".yaml", ".yml", ".json")
_STORY_KEYS = ("title", "overview", "style", "characters", "scenes")
_CHARACTER_KEYS = ("name", "references")
_SCENE_KEYS = ("shots",)
_SHOT_KEYS = ("prompt", "cut", "characters", "frames", "seed", "negative_prompt", "references")
_BENCH_STORY_KEYS = ("story_name", "story_overview", "scenes")
_BENCH_SCENE_KEYS = ("scene_num", "video_prompts", "first_frame_prompt", "cut")


@dataclass(frozen=True, kw_only=True)
class Character:
    """Someone who appears in the story, with pictures of how they look (paths that exist)."""

    name: str
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot: a prompt and what the generator is told beside it.

    Args:
        prompt: one to four sentences, white space collapsed.
        cut: false if the shot begins where the one before it ended.
        scene: the scene's number in the story, from 1.
        number: the shot's number in its scene, from 1.
        characters: names out of ``Story.characters``.
        frames: length in frames, 4n + 1; ``None``, here and in the next two, leaves it to the config.
        seed: of the shot's noise.
        negative_prompt: what should not be seen; may be empty.
        references: pictures that join the memory just before this shot and stay in it.
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
        """How the shot is named to people: ``shot 3 (scene 2, shot 1)``."""
        return _label(self.index, self.scene, self.number)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Shots that belong together, numbered from 1."""

    number: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story as it was written, checked. ``source`` is the absolute path of its file, if it has one."""

    title: str
    overview: str
    characters: tuple[Character, ...] = ()
    scenes: tuple[Scene, ...]
    style: str | None = None
    source: Path | None = None

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All shots in the film's order."""
        return tuple(shot for scene in self.scenes for shot in scene.shots)

    @property
    def references(self) -> tuple[Path, ...]:
        """The reference images of all characters, in order; those of single shots are not among them."""
        return tuple(path for character in self.characters for path in character.references)

    @property
    def slug(self) -> str:
        """The title as a folder's name: lower case, words joined by ``_``, at most 60 characters."""
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", self.title).lower().replace("'", ""))
        return "_".join(words).strip("_")[:60].rstrip("_") or "story"

    def to_dict(self) -> dict[str, Any]:
        """What the story says, as plain JSON types; equal for two stories that say the same.

        Paths are relative to the story's folder as they were written, so a moved story stays equal; what the
        pictures show is not part of it.
        """
        return {
            "title": self.title,
            "overview": self.overview,
            "style": self.style,
            "characters": [{"name": one.name, "references": self.written(one.references)} for one in self.characters],
            "scenes": [
                {"number": scene.number, "shots": [self._shot_dict(shot) for shot in scene.shots]}
                for scene in self.scenes
            ],
        }

    def _shot_dict(self, shot: Shot) -> dict[str, Any]:
        return {
            "prompt": shot.prompt,
            "cut": shot.cut,
            "characters": list(shot.characters),
            "frames": shot.frames,
            "seed": shot.seed,
            "negative_prompt": shot.negative_prompt,
            "references": self.written(shot.references),
        }

    def written(self, paths: Iterable[Path]) -> list[str]:
        """Paths relative to the story's folder where they lie below it, with forward slashes."""
        folder = None if self.source is None else self.source.parent
        return [
            (path.relative_to(folder) if folder and path.is_relative_to(folder) else path).as_posix() for path in paths
        ]


def load_story(path: str | os.PathLike[str]) -> Story:
    """Read a story from our YAML or from ST-Bench's JSON; its keys tell which of the two it is.

    A shot is a cut unless the story says ``cut: false``. JSON may hold comments (``//``, ``/* */``) and
    trailing commas. In ST-Bench's format ``cut`` may be the strings ``"True"`` and ``"False"``, and
    ``first_frame_prompt`` is ignored. Reference images are looked for beside the story file.

    Raises:
        StoryError: naming every problem: file, line, shot, what was expected, what to write instead.
    """
    reader = _Reader(Path(path))
    story = reader.read()
    reader.raise_if_faulty()
    return story


def load_stories(paths: Iterable[str | os.PathLike[str]]) -> list[Story]:
    """The stories of files and of folders (with sub-folders, ordered by file name), in this order.

    Args:
        paths: in folders all YAML and JSON files must be stories.

    Raises:
        StoryError: naming every problem of all files; for a folder without stories, or no path at all; for two stories
            whose films would have one name.
    """
    stories: list[Story] = []
    faults: list[str] = []
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*") if file.suffix in STORY_SUFFIXES) if path.is_dir() else [path]
        if not files:
            faults.append(f"{path}: there are no stories (*.yaml, *.json) in this folder")
        for file in files:
            try:
                stories.append(load_story(file))
            except StoryError as error:
                faults += error.problems
    if not stories and not faults:
        faults.append("no story was named: write the path of a story's file, of several, or of a folder of stories")
    if faults:
        raise StoryError(faults)
    slugs = [story.slug for story in stories]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        where = ", ".join(str(story.source) for story in stories if story.slug == twice[0])
        raise StoryError([f"two stories are called {twice[0]} ({where}): give each a title of its own"])
    return stories


class _Reader(StoryFile):
    """From nodes to records. A faulty value is noted and a default stands in for it until all is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._names: set[str] | None = None  # what shots may list; None while the story's own list is faulty
        self._pictures: dict[Path, tuple[str, str] | None] = {}

    def read(self) -> Story:
        keys = _BENCH_STORY_KEYS if self._is_bench() else _STORY_KEYS
        title, overview = keys[:2]
        entries = self.mapping(self.root, "story", keys, required=(title, overview, "scenes"), example=f"{title}: ...")
        characters = self.characters(entries.get("characters"))
        return Story(
            title=self.string(entries.get(title), "story", title) or "",
            overview=self.string(entries.get(overview), "story", overview) or "",
            characters=characters,
            scenes=self.scenes(entries.get("scenes")),
            style=self.string(entries.get("style"), "story", "style"),
            source=self.path.absolute(),
        )

    def _is_bench(self) -> bool:
        pairs = self.root.value if isinstance(self.root, yaml.MappingNode) else []
        return any(key.value in ("story_name", "story_overview") for key, _ in pairs)

    def characters(self, node: yaml.Node | None) -> tuple[Character, ...]:
        found: list[Character] = []
        for place, item in enumerate(self.items(node, "story", "characters")):
            where = f"character {place + 1}"
            example = _example(item, "name")
            entries = self.mapping(item, where, _CHARACTER_KEYS, required=("name",), example=example)
            name = self.string(entries.get("name"), where, "name") or ""
            if name and name.lower() in (one.name.lower() for one in found):
                wrong = f"the name {name} is taken"
                self.note(entries["name"], where, wrong, "a name of its own for each", "write another name")
            found.append(Character(name=name, references=self.references(entries.get("references"), where)))
        names = {character.name for character in found}
        # A list that could not be read says nothing about the names in the shots.
        faulty = "" in names or (not names and bool(self.problems))
        self._names = None if faulty else names
        return tuple(found)

    def scenes(self, node: yaml.Node | None) -> tuple[Scene, ...]:
        read_scene = self.bench_scene if self._is_bench() else self.scene
        found: list[Scene] = []
        for item in self.items(node, "story", "scenes", at_least=1):
            found.append(read_scene(item, found))
        return tuple(found)

    def scene(self, node: yaml.Node, before: list[Scene]) -> Scene:
        number = len(before) + 1
        start = sum(len(scene.shots) for scene in before)
        where = f"scene {number}"
        example = 'shots: [{prompt: "..."}]'
        entries = self.mapping(node, where, _SCENE_KEYS, required=("shots",), example=example)
        nodes = self.items(entries.get("shots"), where, "shots", at_least=1)
        shots = (self.shot(shot, number, place, start + place) for place, shot in enumerate(nodes))
        return Scene(number=number, shots=tuple(shots))

    def shot(self, node: yaml.Node, scene: int, place: int, index: int) -> Shot:
        where = _label(index, scene, place + 1)
        example = _example(node, "prompt")
        entries = self.mapping(node, where, _SHOT_KEYS, required=("prompt",), example=example)
        return Shot(
            prompt=self.string(entries.get("prompt"), where, "prompt") or "",
            cut=self.cut(entries.get("cut"), where, index),
            scene=scene,
            number=place + 1,
            characters=self.cast(entries.get("characters"), where),
            frames=self.frames(entries.get("frames"), where),
            seed=self.integer(entries.get("seed"), where, "seed"),
            negative_prompt=self.string(entries.get("negative_prompt"), where, "negative_prompt", empty=True),
            references=self.references(entries.get("references"), where),
            index=index,
        )

    def bench_scene(self, node: yaml.Node, before: list[Scene]) -> Scene:
        number = len(before) + 1
        start = sum(len(scene.shots) for scene in before)
        entries = self.mapping(
            node,
            f"scene {number}",
            _BENCH_SCENE_KEYS,
            required=("video_prompts",),
            example="video_prompts: [...]",
        )
        number = self.scene_number(entries.get("scene_num"), before)
        where = f"scene {number}"
        prompts = self.items(entries.get("video_prompts"), where, "video_prompts", at_least=1)
        cuts = self.items(entries.get("cut"), where, "cut")
        if cuts and prompts and len(cuts) != len(prompts):
            wrong = f"cut has {len(cuts)} entries and video_prompts has {len(prompts)}"
            self.note(entries["cut"], where, wrong, "as many of each", "write one true or false for each prompt")
        shots = []
        for place, prompt in enumerate(prompts):
            label = _label(start + place, number, place + 1)
            shot = Shot(
                prompt=self.string(prompt, label, "video_prompts", item=True) or "",
                cut=self.cut(cuts[place] if place < len(cuts) else None, label, start + place, strings=True),
                scene=number,
                number=place + 1,
                index=start + place,
            )
            shots.append(shot)
        return Scene(number=number, shots=tuple(shots))

    def scene_number(self, node: yaml.Node | None, before: list[Scene]) -> int:
        """``scene_num`` as written, by which other tools name files; without one, scenes are counted."""
        following = before[-1].number + 1 if before else 1
        where = f"scene {len(before) + 1}"
        number = self.integer(node, where, "scene_num")
        if node is None or number is None:
            return following
        if before and number < following:
            wrong = f"scene_num {number} comes after scene_num {following - 1}"
            self.note(node, where, wrong, "numbers that rise", f"write scene_num: {following} instead")
            return following
        return number

    # What a shot may say

    def cut(self, node: yaml.Node | None, where: str, index: int, strings: bool = False) -> bool:
        if node is None:
            return True
        found, value = kind(node), str(node.value).lower()
        if found == "bool" or (strings and found == "str" and value in ("true", "false")):
            cut = value in ("true", "yes", "on")
        else:
            meant = "false" if value in ("false", "no", "off", "0", "n", "f") else "true"
            cure = f"write {meant} instead" if strings else f"write cut: {meant} instead"
            self.note(node, where, f"cut is {self.excerpt(node)}", "true or false without quotes", cure)
            return True
        if index == 0 and not cut:
            wrong = "the first shot of a film has nothing to continue"
            self.note(node, where, wrong, "a cut", "write true instead" if strings else "write cut: true instead")
        return cut

    def cast(self, node: yaml.Node | None, where: str) -> tuple[str, ...]:
        found: list[str] = []
        for item in self.items(node, where, "characters"):
            name = self.string(item, where, "characters", item=True)
            if name is None:
                continue
            if name in found:
                self.note(item, where, f"{name} is listed twice", "each character once", "remove one of the two")
            elif self._names is not None and name not in self._names:
                near = nearest(name, self._names)
                cure = f"write {near} instead" if near else f"add - {{name: {name}}} to the story's characters"
                known = listing(sorted(self._names)) or "none, for the story lists no characters"
                self.note(item, where, f"{name} is not a character of this story", known, cure)
            found.append(name)
        return tuple(found)

    def frames(self, node: yaml.Node | None, where: str) -> int | None:
        frames = self.integer(node, where, "frames")
        if node is None or frames is None or (frames >= 5 and frames % 4 == 1):
            return frames
        below = (frames - 1) // 4 * 4 + 1
        cure = f"write frames: {below} or {below + 4} instead" if below >= 5 else "write frames: 5 or more"
        self.note(node, where, f"frames is {frames}", "4n + 1, from 5", cure)
        return None

    def references(self, node: yaml.Node | None, where: str) -> tuple[Path, ...]:
        found = []
        for item in self.items(node, where, "references"):
            written = self.string(item, where, "references", item=True)
            if written is None:
                continue
            path = self.path.absolute().parent / written
            if path not in self._pictures:
                self._pictures[path] = _picture_fault(path)
            if fault := self._pictures[path]:
                wrong, cure = fault
                self.note(item, where, f"reference {written} {wrong}", f"an image at {path}", cure)
            found.append(path)
        return tuple(found)


def _label(index: int, scene: int, number: int) -> str:
    return f"shot {index + 1} (scene {scene}, shot {number})"


def _example(node: yaml.Node, key: str) -> str:
    """The list item to write, where text stands alone in place of a mapping."""
    return f"- {{{key}: {quoted(node.value)}}}" if isinstance(node, yaml.ScalarNode) else f'- {{{key}: "..."}}'


def _picture_fault(path: Path) -> tuple[str, str] | None:
    """What keeps ``path`` from being used as a reference image and what to do about it, or None."""
    if not path.is_file():
        near = nearest_file(path, (".png", ".jpg", ".jpeg", ".webp"))
        cure = f"write {near.name} instead" if near else "put the picture there or mend the path"
        return "does not exist", cure
    from PIL import Image

    save_again = "save the picture again as PNG, JPEG or WebP with 8 bits per channel"
    try:
        with Image.open(path) as image:
            image.load()
            deep = image.mode.startswith(("I", "F"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return "cannot be read as an image", save_again
    return ("has more than 8 bits per channel", save_again) if deep else None
