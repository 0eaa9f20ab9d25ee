"""The content of ``film.json``, and which folder may hold a film. Loads no torch.

Shots, scenes, takes and frames are counted from 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from storymem.config import STRICT
from storymem.film.settings import END_FRAMES, Mode
from storymem.io import FileError, folder_lock, hash_json
from storymem.memory import Candidate
from storymem.memory.bank import KeyframeRecord
from storymem.memory.keyframes import unused_id

SCHEMA = 3  # 2 had one take of a shot; 1 also counted shots and frames from 0
MANIFEST = "film.json"
VIDEO = "film.mp4"
PAGE = "storyboard.html"
MEMORY = "memory.json"
IMAGES = "keyframe_images"  # that the shots of some methods begin with; `keyframes` are the memory's
REPLACED = "replaced by the user"  # a take's video
FOLDERS = ("shots", "keyframes", IMAGES)
_LIBRARIES = ("storymem", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "av")


class FilmError(FileError):
    """A film's folder that cannot be used as asked; the message names what to do instead."""


class OtherFilmError(FilmError):
    """A film's folder that holds another film.

    Args:
        differs: how it differs, several lines.
        cures: what to type, several lines.
    """

    def __init__(self, differs: str, cures: str) -> None:
        super().__init__(f"{differs}\n{cures}")
        self.differs = differs


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or len(name) > 200 or not name.isprintable() or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name[:60]!r} is not the name of a file in the film's folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Place = Annotated[int, Field(ge=1, le=10**9)]


class _Shot(TypedDict):
    prompt: str
    characters: NotRequired[list[str]]
    references: NotRequired[list[str]]


class _Script(TypedDict):
    prompt: str


class _Scene(TypedDict):
    shots: list[_Shot]
    number: NotRequired[int]


class _Character(TypedDict):
    name: str
    description: NotRequired[str]
    references: NotRequired[list[str]]


class _Story(TypedDict):
    title: str
    scenes: list[_Scene]
    overview: NotRequired[str]
    characters: NotRequired[list[_Character]]
    reference_sha256: NotRequired[dict[str, str]]


def _checked(kind: Any) -> AfterValidator:
    """What is read has at least the keys of ``kind``, and is kept as it is."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def check(content: dict[str, Any]) -> dict[str, Any]:
        adapter.validate_python(content)
        return content

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CandidateRecord(Candidate):
    """As :class:`storymem.memory.Candidate`, but ``frame`` counts from 1."""

    frame: Place


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Take:
    """One generation of a shot.

    Args:
        shot, scene, number: the place of its shot: in the film; of its scene; in the scene.
        folder: which takes belong to one shot: ``01_02``, or another name where that was taken.
        take: its number among these.
        script: what it was made from: the shot in the story's record, with the story's style; see :func:`scripts`.
        mode: how it was made: "t2v", "i2v", "m2v", "mi2v" or "mm2v".
        seed: of its noise.
        frames: in its file, without those it repeated.
        repeated: frames at its beginning that repeated the end of the previous shot and were cut.
        file: its video, relative to the film's folder.
        config_hash: of the settings it was made with.
        memory: ids of the keyframes that were recalled for it, oldest first.
        memory_of: of a method whose experts recall on their own, the ids that each recalled, by its name.
        keyframes: what it adds to the memory where it is chosen, as the user left them.
        bank: digest of the memory before it, when it was made; None: not known.
        follows: sha256 of the video that it continues; None if it is a cut.
        candidates: frames that were examined as keyframes, and why they were kept or not; None: not known.
        seconds: wall time of each stage.
        sha256: of its files: the video, and its last frames unless the user replaced the video.
        generated_sha256: of the generated video, if the user replaced it.
    """

    shot: Place
    scene: Count
    number: Count
    folder: Name
    take: Place
    script: Annotated[dict[str, Any], _checked(_Script)]
    mode: Mode
    seed: int
    frames: Place
    repeated: Count
    file: FileName
    config_hash: str
    memory: tuple[Name, ...] = ()
    keyframes: tuple[KeyframeRecord, ...] = ()
    memory_of: dict[Name, tuple[Name, ...]] = field(default_factory=dict)
    bank: str | None = None
    follows: str | None = None
    candidates: tuple[CandidateRecord, ...] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    sha256: dict[FileName, str] = field(default_factory=dict)
    generated_sha256: str | None = None

    @property
    def index(self) -> int:
        """Place of its shot in the film, from 0."""
        return self.shot - 1

    @property
    def prompt(self) -> str:
        """The text of the shot that it was made from."""
        return self.script["prompt"]

    @property
    def is_replaced(self) -> bool:
        """Whether the user replaced the video that was made."""
        return self.sha256.keys() == {self.file}

    @property
    def label(self) -> str:
        """As in :attr:`storymem.story.Shot.label`."""
        return f"shot {self.shot} (scene {self.scene}, shot {self.number})"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Slot:
    """A shot of the film.

    Args:
        folder: of its takes; see :attr:`Take.folder`.
        take: the number of the one that is chosen; None: the shot has none yet.
        again: a run that regenerates shots has not come to it yet.
    """

    folder: Name
    take: Place | None = None
    again: bool = False


class Script(NamedTuple):
    """A shot in a story's record: number of its scene, number in the scene, and what a take is made from."""

    scene: int
    number: int
    content: dict[str, Any]


def scripts(story: Mapping[str, Any]) -> list[Script]:
    """The shots of a story's record, in order. Two of equal content are the same shot, wherever they stand."""
    digests = story.get("reference_sha256", {})
    looks = {one["name"]: one["description"] for one in story.get("characters", ()) if one.get("description")}
    found = []
    for place, scene in enumerate(story["scenes"], start=1):
        for number, shot in enumerate(scene["shots"], start=1):
            content = {**shot, "style": story.get("style")}
            content["references"] = {source: digests.get(source) for source in shot.get("references", ())}
            if shown := {name: looks[name] for name in shot.get("characters", ()) if name in looks}:
                content["looks"] = shown
            found.append(Script(scene.get("number", place), number, content))
    return found


def unused_folder(scene: int, number: int, taken: Sequence[str] | set[str]) -> str:
    """A name for the takes of a shot: ``01_02``, or the first of ``01_02_2``, ... that is not taken."""
    return unused_id(f"{scene:02d}_{number:02d}", taken)


def new_slots(story: Mapping[str, Any]) -> list[Slot]:
    """The shots of a story of which nothing was made."""
    slots: list[Slot] = []
    for script in scripts(story):
        slots.append(Slot(folder=unused_folder(script.scene, script.number, {slot.folder for slot in slots})))
    return slots


def end_names(file: str) -> list[str]:
    """The files of the last frames of a take whose video is ``file``."""
    return [f"{file.removesuffix('.mp4')}_end/{number}.png" for number in range(1, END_FRAMES + 1)]


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of settings, as 16 hexadecimal digits."""
    return hash_json(config)[:16]


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that influence what a film looks like."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions


@dataclass(kw_only=True, eq=False, repr=False, config=ConfigDict(extra="ignore", populate_by_name=True))
class Manifest:
    """The content of ``film.json``, except what is only for users to read.

    Args:
        story: see :func:`storymem.film.resume.story_record`.
        config: the settings that the film is made with, plain JSON types.
        slots: one for each shot of the story, in order; ``shots`` in the file.
        takes: all that were made, also of shots that the story no longer has.
        configs: other settings that takes were made with: hash -> settings.
        joined: name of the joined film, if it is that of the takes that are chosen; ``video`` in the file.
        made: the joined film and the page as they were last written: name -> sha256.
        made_before: the same of their content before that, which they have until they are renamed.
        memory_sha256: of ``memory.json`` as it was last written.
        deleted_seeds: of takes that were deleted, by the folder of their shot.
        edits: of the memory by ``storymem memory``, as the arguments after the folder; oldest first.
        writing: files that are being written or deleted; the next process deletes them.
    """

    story: Annotated[dict[str, Any], _checked(_Story)]
    config: dict[str, Any]
    slots: Annotated[list[Slot], Field(alias="shots")]
    takes: list[Take] = field(default_factory=list)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    joined: Annotated[Literal["film.mp4"] | None, Field(alias="video")] = None
    made: dict[FileName, str] = field(default_factory=dict)
    made_before: dict[FileName, str] = field(default_factory=dict)
    memory_sha256: str | None = None
    deleted_seeds: dict[Name, list[int]] = field(default_factory=dict)
    edits: list[str] = field(default_factory=list)
    writing: list[FileName] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.slots) != len(scripts(self.story)):
            raise ValueError("there is not one entry of shots for each shot of the story")
        if len({slot.folder for slot in self.slots}) < len(self.slots):
            raise ValueError("two shots have one folder")
        names = {(take.folder, take.take) for take in self.takes}
        if len({take.file for take in self.takes}) < len(self.takes) or len(names) < len(self.takes):
            raise ValueError("two takes have one name or one file")
        if any(slot.take is not None and (slot.folder, slot.take) not in names for slot in self.slots):
            raise ValueError("a take is chosen that does not exist")

    @property
    def shots(self) -> list[Take]:
        """The chosen take of every shot that has one, in order."""
        return [take for index in range(len(self.slots)) if (take := self.take_of(index)) is not None]

    @property
    def not_shown(self) -> list[Take]:
        """The takes that no shot shows."""
        shown = self.shots
        return [take for take in self.takes if take not in shown]

    def takes_of(self, index: int) -> list[Take]:
        """All takes of a shot (index from 0), oldest first."""
        return sorted((t for t in self.takes if t.folder == self.slots[index].folder), key=lambda take: take.take)

    def seeds_of(self, index: int) -> set[int]:
        """The seeds of all takes that a shot (index from 0) has or had."""
        return {take.seed for take in self.takes_of(index)} | {*self.deleted_seeds.get(self.slots[index].folder, ())}

    def take_of(self, index: int) -> Take | None:
        """The chosen take of a shot (index from 0)."""
        slot = self.slots[index]
        return next((t for t in self.takes if (t.folder, t.take) == (slot.folder, slot.take)), None)

    @property
    def is_complete(self) -> bool:
        """Whether every shot has a take."""
        return all(slot.take is not None for slot in self.slots)

    @property
    def config_hash(self) -> str:
        """SHA-256 of the settings, as 16 hexadecimal digits."""
        return config_hash(self.config)

    def config_of(self, take: Take) -> dict[str, Any] | None:
        """The settings that a take was made with; None for takes of older versions with settings of their own."""
        return self.config if take.config_hash == self.config_hash else self.configs.get(take.config_hash)

    def to_json(self) -> dict[str, Any]:
        """The content of ``film.json``, with what is only for users to read."""
        used = {take.config_hash for take in self.takes} - {self.config_hash}
        return {
            "schema": SCHEMA,
            "title": self.story["title"],
            "seconds": round(sum(sum(take.seconds.values()) for take in self.takes), 3),
            "config_hash": self.config_hash,
            "versions": library_versions(),
            **MANIFEST_TYPE.dump_python(self, by_alias=True, mode="json"),
            "configs": {key: config for key, config in self.configs.items() if key in used},
        }


MANIFEST_TYPE = TypeAdapter(Manifest)


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
        cure = "choose another folder, or ask its owner"
        raise FilmError(f"the film's folder {folder} cannot be written (permission denied): {cure}")


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
