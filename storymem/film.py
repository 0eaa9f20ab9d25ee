"""A film's folder: shots, last frames, memory, and a manifest from which the film can be taken up again or checked.

    film.json              what was told, with what, and what came of it: the truth about which shots are finished
    film.mp4               all shots joined; continued shots do not repeat frames
    storyboard.html        the film as a page: see :mod:`storymem.storyboard`
    shots/01_02.mp4        scene 1, shot 2
    shots/01_02_end/1.png  its last frames without loss, from which the next shot can go on
    memory.json, keyframes/  see :mod:`storymem.memory.storage`

Every file is written to a temporary name and renamed, ``film.json`` after the files that it names. So a process that
is killed loses at most the shot it was making.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from storymem.io import write_atomically
from storymem.story import Shot
from storymem.video import join_videos, read_image, write_image, write_video

SCHEMA = 1
MANIFEST = "film.json"
END_FRAMES = 5
_LIBRARIES = ("storymem", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "av")


class FilmError(ValueError):
    """A film's folder that cannot be used as it was asked; the message says what to do instead."""


@dataclass(frozen=True, kw_only=True)
class KeyframeRecord:
    """A keyframe that a shot added: its id in the memory, frame index, quality score, highest cosine to the bank."""

    id: str
    frame: int | None
    quality: float | None
    similarity: float | None


@dataclass(frozen=True, kw_only=True)
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
    """

    index: int
    scene: int
    number: int
    prompt: str
    mode: str
    seed: int
    frames: int
    repeated: int
    file: str
    memory: tuple[str, ...]
    keyframes: tuple[KeyframeRecord, ...]
    config_hash: str
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShotRecord:
        keyframes = tuple(KeyframeRecord(**keyframe) for keyframe in values["keyframes"])
        return cls(**{**values, "memory": tuple(values["memory"]), "keyframes": keyframes})


class Film:
    """A film on disk, finished or in the making.

    Args:
        folder: where it lies.
        story: ``Story.to_dict()`` of what is told.
        config: the settings that it is made with, plain JSON types.
        shots: records of its finished shots, in order.
        video: name of the joined film, once there is one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        story: Mapping[str, Any],
        config: Mapping[str, Any],
        shots: Sequence[ShotRecord] = (),
        video: str | None = None,
    ) -> None:
        self.folder = folder
        self.story = dict(story)
        self.config = dict(config)
        self.shots = list(shots)
        self._video = video

    @classmethod
    def open(cls, folder: str | Path) -> Film:
        """Read a film's manifest.

        Raises:
            FilmError: if there is none, or it cannot be understood.
        """
        path = Path(folder) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA:
                raise FilmError(f"{path}: schema {manifest['schema']} is not known; this version reads {SCHEMA}")
            shots = [ShotRecord.from_dict(shot) for shot in manifest["shots"]]
            return cls(
                Path(folder),
                story=manifest["story"],
                config=manifest["config"],
                shots=shots,
                video=manifest["video"],
            )
        except FileNotFoundError:
            raise FilmError(f"{folder} holds no film: there is no {MANIFEST}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise FilmError(
                f"{path} is damaged ({error}): put it back from a copy, or delete it to begin again"
            ) from None

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether ``folder`` holds a film, finished or not."""
        return (Path(folder) / MANIFEST).is_file()

    @property
    def video(self) -> Path | None:
        """The joined film, once it is finished."""
        return None if self._video is None else self.folder / self._video

    @property
    def config_hash(self) -> str:
        """SHA-256 of the settings, as 16 hexadecimal digits."""
        canonical = json.dumps(self.config, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]

    def save(self) -> None:
        """Write the manifest."""
        manifest = {
            "schema": SCHEMA,
            "title": self.story["title"],
            "video": self._video,
            "seconds": round(sum(sum(shot.seconds.values()) for shot in self.shots), 3),
            "shots": [asdict(shot) for shot in self.shots],
            "config_hash": self.config_hash,
            "config": self.config,
            "story": self.story,
            "versions": library_versions(),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / MANIFEST, text.encode())

    def add(self, record: ShotRecord) -> None:
        """Note that a shot is finished; its files must be on disk."""
        assert record.index == len(self.shots), "shots are finished in order"
        self.shots.append(record)
        self.save()

    def forget_from(self, shot: int) -> None:
        """Drop shot ``shot`` (from 0) and all later ones, records first, then every file of theirs."""
        self.shots, self._video = self.shots[:shot], None
        self.save()
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Delete videos and last frames of shots that the manifest does not name."""
        named = {Path(shot.file).stem for shot in self.shots}
        for path in (self.folder / "shots").glob("*"):
            if path.name.removesuffix(".mp4").removesuffix("_end") not in named:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._video is None:
            (self.folder / "film.mp4").unlink(missing_ok=True)

    def write_shot(self, shot: Shot, frames: np.ndarray, *, repeated: int, fps: int) -> str:
        """Write a shot's video without its first ``repeated`` frames, and its last frames; returns the video's name.

        Args:
            shot: which one.
            frames: uint8 [F, H, W, 3], all that were generated.
            repeated: how many at the beginning repeat the shot before.
            fps: frames per second.
        """
        name = f"shots/{shot.scene:02d}_{shot.number:02d}.mp4"
        end = self._end_folder(name)
        end.mkdir(parents=True, exist_ok=True)
        write_video(self.folder / name, frames[repeated:], fps)
        for number, frame in enumerate(frames[-END_FRAMES:], start=1):
            write_image(end / f"{number}.png", frame)
        return name

    def last_frames(self, shot: int, count: int) -> np.ndarray:
        """The last ``count`` (up to 5) frames of a finished shot as they were generated, uint8 [count, H, W, 3]."""
        assert 1 <= count <= END_FRAMES
        end = self._end_folder(self.shots[shot].file)
        return np.stack([read_image(end / f"{number}.png") for number in range(END_FRAMES - count + 1, END_FRAMES + 1)])

    def join(self) -> Path:
        """Join all shots into ``film.mp4`` and note it in the manifest."""
        join_videos([self.folder / shot.file for shot in self.shots], self.folder / "film.mp4")
        self._video = "film.mp4"
        self.save()
        return self.folder / "film.mp4"

    def _end_folder(self, file: str) -> Path:
        return self.folder / f"{file.removesuffix('.mp4')}_end"


@contextmanager
def film_folder(folder: str | Path, needed_bytes: int) -> Iterator[Path]:
    """A folder that exists, can be written, has room, and is this process's alone until the end of the block.

    The lock is the operating system's, so a killed process leaves none behind.

    Raises:
        FilmError: if one of these is not so.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock.acquire(timeout=0)
    except Timeout:  # before OSError, of which it is one
        raise FilmError(
            f"another process is making the film in {folder}: wait for it or choose another output"
        ) from None
    except OSError as error:
        raise FilmError(
            f"the film's folder {folder} cannot be written ({error.strerror}): choose another output"
        ) from None
    try:
        _check_room(folder, needed_bytes)
        yield folder
    finally:
        lock.release()


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise FilmError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free and the film needs about {needed_bytes / 1e9:.1f} GB: "
            "make room or choose another output"
        )


def estimated_bytes(frames: int, height: int, width: int) -> int:
    """Room that a shot of ``frames`` frames needs: its video, its copy in the film, last frames and keyframes.

    An upper estimate: 0.15 bytes per pixel of video, and lossless pictures uncompressed.
    """
    pixels = height * width
    return int(2 * 0.15 * frames * pixels + (END_FRAMES + 3) * 3 * pixels)


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that have a say in what a film looks like."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs: ``sampler.steps: 8 before, 40 now``."""
    old, new = _flat(before), _flat(after)
    return [
        f"{key}: {old.get(key, 'nothing')!r} before, {new.get(key, 'nothing')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", item) for number, item in enumerate(value, start=1)]
    else:
        return {path: value}
    return {key: leaf for where, item in items for key, leaf in _flat(item, where).items()}
