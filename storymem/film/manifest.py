"""What ``film.json`` says, as types that are checked when it is read. Loads no torch."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from storymem.config import STRICT
from storymem.film.modes import Mode
from storymem.io import FileError, check_regular, parse_json, read_text

SCHEMA = 1
MANIFEST = "film.json"
VIDEO = "film.mp4"
PAGE = "storyboard.html"
MEMORY = "memory.json"
FOLDERS = ("shots", "keyframes")
_CURE = "put it back from a copy, or choose another output"
_LENIENT = ConfigDict(extra="ignore")


class FilmError(FileError):
    """A film's folder that cannot be used as it was asked; the message says what to do instead."""


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if not name or len(name) > 200 or not name.isprintable() or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name[:60]!r} is not the name of a file in the film's folder")
    return name


FileName = Annotated[str, AfterValidator(_relative)]
KeyframeId = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100)]
Count = Annotated[int, Field(ge=0, le=10**9)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KeyframeRecord:
    """A keyframe that a shot added.

    Args:
        id: in the memory.
        frame: its index in the shot.
        quality: its score, if one was asked.
        similarity: highest cosine to what the bank held.
        sha256: of the picture as it was generated; see :func:`storymem.memory.keyframes.picture_hash`.
    """

    id: KeyframeId
    frame: Count | None
    quality: float | None
    similarity: float | None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShotRecord:
    """What the manifest says of a finished shot.

    Args:
        index: place in the film, from 0.
        scene: number of the scene, from 1.
        number: number in the scene, from 1.
        prompt: its text.
        mode: how it was made: "t2v", "m2v", "mi2v" or "mm2v".
        seed: of its noise.
        frames: in its file, without those it repeated.
        repeated: frames at its beginning that repeat the end of the shot before; they were cut.
        file: its video, relative to the film's folder.
        memory: ids of the keyframes it looked back at, oldest first.
        keyframes: what it added to the memory.
        config_hash: of the settings it was made with.
        seconds: wall time of each stage.
        sha256: of its files: the video, and its last frames unless the video was replaced by hand.
    """

    index: Count
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
    def is_by_hand(self) -> bool:
        """Whether a person put another video in the place of the one that was made."""
        return self.sha256.keys() == {self.file}

    @property
    def label(self) -> str:
        """How the shot is named to people, as in :class:`storymem.story.Shot`."""
        return f"shot {self.index + 1} (scene {self.scene}, shot {self.number})"


@dataclass(config=_LENIENT)
class _ToldShot:
    prompt: str
    references: list[str] = field(default_factory=list)


@dataclass(config=_LENIENT)
class _ToldScene:
    shots: list[_ToldShot]


@dataclass(config=_LENIENT)
class _ToldCharacter:
    name: str
    references: list[str] = field(default_factory=list)


@dataclass(config=_LENIENT)
class _Told:
    title: str
    scenes: list[_ToldScene]
    overview: str = ""
    characters: list[_ToldCharacter] = field(default_factory=list)
    reference_sha256: dict[str, str] = field(default_factory=dict)


_TOLD = TypeAdapter(_Told)


def _told(story: dict[str, Any]) -> dict[str, Any]:
    _TOLD.validate_python(story)
    return story


@dataclass(kw_only=True, config=_LENIENT)
class Manifest:
    """The whole of ``film.json``, but for what only people read.

    Args:
        story: ``Story.to_dict()`` and more of what is told.
        config: the settings that it is made with, plain JSON types.
        shots: its finished shots, in order.
        video: name of the joined film, once all shots are finished.
        made: the joined film and the page, as they were last written: name -> sha256.
        memory_sha256: of ``memory.json`` as the last finished shot left it.
        writing: files that are being written, and that the next process deletes if this one does not finish.
        replaced: files of earlier takes, deleted once the film is whole again: name -> sha256.
    """

    story: Annotated[dict[str, Any], AfterValidator(_told)]
    config: dict[str, Any]
    shots: tuple[ShotRecord, ...] = ()
    video: Literal["film.mp4"] | None = None
    made: dict[FileName, str] = field(default_factory=dict)
    memory_sha256: str | None = None
    writing: tuple[FileName, ...] = ()
    replaced: dict[FileName, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if [shot.index for shot in self.shots] != list(range(len(self.shots))):
            raise ValueError("shots are not numbered from 0, one after the other")
        if len({shot.file for shot in self.shots}) < len(self.shots):
            raise ValueError("two shots have one file")


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of the film in ``folder``, and the JSON object that it was read from.

    Raises:
        FilmError: if there is none, or it cannot be understood.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FilmError(f"{folder} holds no film: there is no {MANIFEST}")
    check_regular(path)
    try:
        text = read_text(path)
        written = parse_json(text, MANIFEST)
        if not isinstance(written, dict) or "schema" not in written:
            raise FileError("it is not the manifest of a film")
        if written["schema"] != SCHEMA:
            raise FilmError(f"{path}: schema {written['schema']!r:.60} is not known; this version reads {SCHEMA}")
        missing = sorted({"story", "config", "shots", "video"} - written.keys())
        if missing:
            raise FileError(f"{missing[0]} is missing")
        return _MANIFEST.validate_json(text, strict=True), written
    except FilmError:
        raise
    except FileError as error:
        raise FilmError(f"{path} is damaged ({error}): {_CURE}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FilmError(f"{path} is damaged ({where}: {problem['msg']}): {_CURE}") from None
