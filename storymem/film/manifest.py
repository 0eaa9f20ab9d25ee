"""The content of ``film.json``, checked when it is read, and which folder may hold a film. Loads no torch.

Shots, scenes and frames are counted from 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from storymem.config import STRICT
from storymem.film.settings import Mode
from storymem.io import FileError, check_regular, folder_lock, parse_json, read_text

SCHEMA = 2  # in schema 1, shots and frames were counted from 0
MANIFEST = "film.json"
VIDEO = "film.mp4"
PAGE = "storyboard.html"
MEMORY = "memory.json"
FOLDERS = ("shots", "keyframes")
_CURE = "put it back from a copy, or choose another output"


class FilmError(FileError):
    """A film's folder that cannot be used as asked; the message names what to do instead."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or len(name) > 200 or not name.isprintable() or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name[:60]!r} is not the name of a file in the film's folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
KeyframeId = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100)]
Count = Annotated[int, Field(ge=0, le=10**9)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KeyframeRecord:
    """A keyframe that a shot added to the memory.

    Args:
        id: in the memory.
        frame: its place in the shot, from 1.
        quality: its score, if it was scored.
        similarity: highest cosine to the memory before.
        sha256: of the image as it was generated; see :func:`storymem.memory.keyframes.image_hash`.
    """

    id: KeyframeId
    frame: Count | None
    quality: float | None
    similarity: float | None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShotRecord:
    """A finished shot.

    Args:
        shot: place in the film, from 1.
        scene: number of the scene, from 1.
        number: number in the scene, from 1.
        prompt: its text in the story.
        mode: how it was made: "t2v", "m2v", "mi2v" or "mm2v".
        seed: of its noise.
        frames: in its file, without those it repeated.
        repeated: frames at its beginning that repeated the end of the previous shot and were cut.
        file: its video, relative to the film's folder.
        memory: ids of the keyframes that were recalled for it, oldest first.
        keyframes: what it added to the memory.
        config_hash: of the settings it was made with.
        seconds: wall time of each stage.
        sha256: of its files: the video, and its last frames unless the user replaced the video.
    """

    shot: Annotated[int, Field(ge=1, le=10**9)]
    scene: Count
    number: Count
    prompt: str
    mode: Mode
    seed: int
    frames: Annotated[int, Field(ge=1, le=10**9)]
    repeated: Count
    file: FileName
    memory: tuple[KeyframeId, ...]
    keyframes: tuple[KeyframeRecord, ...]
    config_hash: str
    seconds: dict[str, float] = field(default_factory=dict)
    sha256: dict[FileName, str] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """Place in the film, from 0."""
        return self.shot - 1

    @property
    def is_replaced(self) -> bool:
        """Whether the user replaced the video that was made."""
        return self.sha256.keys() == {self.file}

    @property
    def label(self) -> str:
        """As in :attr:`storymem.story.Shot.label`."""
        return f"shot {self.shot} (scene {self.scene}, shot {self.number})"


class _Shot(TypedDict):
    prompt: str
    references: NotRequired[list[str]]


class _Scene(TypedDict):
    shots: list[_Shot]


class _Character(TypedDict):
    name: str
    references: NotRequired[list[str]]


class _Story(TypedDict):
    title: str
    scenes: list[_Scene]
    overview: NotRequired[str]
    characters: NotRequired[list[_Character]]
    reference_sha256: NotRequired[dict[str, str]]


_STORY = TypeAdapter(_Story)


def _checked_story(story: dict[str, Any]) -> dict[str, Any]:
    _STORY.validate_python(story)
    return story


@dataclass(kw_only=True, config=ConfigDict(extra="ignore"))
class Manifest:
    """The content of ``film.json``, except what is only for users to read.

    Args:
        story: see :func:`storymem.film.resume.story_record`.
        config: the settings that the film is made with, plain JSON types.
        shots: its finished shots, in order.
        video: name of the joined film, once all shots are finished.
        made: the joined film and the page as they were last written: name -> sha256.
        memory_sha256: of ``memory.json`` as the last finished shot left it.
        writing: files that are being written, which the next process deletes if this one does not finish.
        replaced: files of earlier takes, which are deleted once the film is complete again: name -> sha256.
    """

    story: Annotated[dict[str, Any], AfterValidator(_checked_story)]
    config: dict[str, Any]
    shots: tuple[ShotRecord, ...] = ()
    video: Literal["film.mp4"] | None = None
    made: dict[FileName, str] = field(default_factory=dict)
    memory_sha256: str | None = None
    writing: tuple[FileName, ...] = ()
    replaced: dict[FileName, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if [shot.shot for shot in self.shots] != list(range(1, len(self.shots) + 1)):
            raise ValueError("shots are not numbered from 1, one after the other")
        if len({shot.file for shot in self.shots}) < len(self.shots):
            raise ValueError("two shots have one file")


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of the film in ``folder``, and the JSON object that it was read from.

    Raises:
        FilmError: if there is none, or it is not understood.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FilmError(f"{folder} holds no film: there is no {MANIFEST}")
    check_regular(path)
    try:
        written = parse_json(read_text(path), MANIFEST)
        if not isinstance(written, dict) or "schema" not in written:
            raise FileError("it is not the manifest of a film")
        if written["schema"] not in (1, SCHEMA):
            known = f"this version reads 1 and {SCHEMA}"
            raise FilmError(f"{path}: schema {written['schema']!r:.60} is not known; {known}: update storymem")
        if missing := sorted({"story", "config", "shots", "video"} - written.keys()):
            raise FileError(f"{missing[0]} is missing")
        content = _counted_from_1(written) if written["schema"] == 1 else written
        return _MANIFEST.validate_json(json.dumps(content), strict=True), written
    except FilmError:
        raise
    except FileError as error:
        raise FilmError(f"{path} is damaged ({error}): {_CURE}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FilmError(f"{path} is damaged ({where}: {problem['msg']}): {_CURE}") from None


def _counted_from_1(written: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 as schema 2; what has other types is left to the validation."""

    def is_numbered(item: Any, key: str) -> bool:
        return isinstance(item, dict) and type(item.get(key)) is int

    def keyframe(entry: Any) -> Any:
        return {**entry, "frame": entry["frame"] + 1} if is_numbered(entry, "frame") else entry

    def shot(entry: Any) -> Any:
        if not is_numbered(entry, "index") or not isinstance(entry.get("keyframes"), list):
            return entry
        converted = {**entry, "shot": entry["index"] + 1, "keyframes": [keyframe(one) for one in entry["keyframes"]]}
        del converted["index"]
        return converted

    shots = written["shots"]
    return {**written, "shots": [shot(entry) for entry in shots] if isinstance(shots, list) else shots}


@contextmanager
def film_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that may hold a film, exists, can be written, and is locked until the end of the block.

    Raises:
        FileError: see :func:`check_folder`; or another process has locked it.
    """
    check_folder(folder)
    with folder_lock(folder, "making the film in") as folder:
        yield folder


def check_folder(folder: str | Path) -> None:
    """Check that a film may be made in ``folder``; nothing changes.

    Raises:
        FilmError: if it is not empty and holds no film, lies among another film's own files, holds folders or links
            where a film has files, or cannot be written.
    """
    try:
        real = Path(folder).resolve()
        _check_place(Path(folder), real)
        if real.is_dir():
            _check_content(Path(folder), sorted(path.name for path in real.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, FilmError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise FilmError(f"the film's folder {folder} cannot be used ({reason}): choose another output") from None


def _check_place(folder: Path, real: Path) -> None:
    for ancestor in real.parents:
        name = real.relative_to(ancestor).parts[0]
        if name in (*FOLDERS, VIDEO, PAGE, MEMORY, MANIFEST) and (ancestor / MANIFEST).is_file():
            raise FilmError(f"{folder} would lie in {name} of the film in {ancestor}: choose another output")
    existing = next(path for path in (real, *real.parents) if path.exists())
    if not existing.is_dir():
        raise FilmError(f"the film's folder {folder} cannot be written ({existing} is a file): choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FilmError(f"the film's folder {folder} cannot be written (permission denied): choose another output")


def _check_content(folder: Path, names: list[str]) -> None:
    if MANIFEST not in names:
        if foreign := [name for name in names if not (name.startswith(".") and (folder / name).is_file())]:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise FilmError(
                f"{folder} is not empty and holds no film to resume ({shown}): "
                "choose another output, or an empty folder"
            )
        return
    for path in (folder / name for name in names):
        if path.name in FOLDERS and (path.is_symlink() or not path.is_dir()):
            raise FilmError(f"{path} must be a folder, not a link or a file: move it away, or choose another output")
        if path.name in (VIDEO, PAGE, MEMORY) and path.is_dir():
            raise FilmError(f"{path} is a folder, and a film has a file of that name: move it away")
