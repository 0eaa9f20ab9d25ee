"""A film's folder: shots, last frames, memory, and a manifest from which the film can be taken up again or checked.

    film.json              what was told, with what, and what came of it: the truth about which shots are finished
    film.mp4               all shots joined; continued shots do not repeat frames
    storyboard.html        the film as a page: see :mod:`storymem.film.storyboard`
    shots/01_02.mp4        scene 1, shot 2; 01_02_take2.mp4 where that name was taken
    shots/01_02_end/1.png  its last frames without loss, from which the next shot can go on
    memory.json, keyframes/  see :mod:`storymem.memory.storage`

A shot's files get names that no file has, and renaming ``film.json`` over the one before is the moment at which the
shot is finished. Until then the film is what it was; a process that is killed loses at most the shot it was making.
Files of earlier takes are deleted when the film is whole again. Only files that the manifest names are ever deleted,
and only if they still are what was written.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from storymem.film.manifest import (
    FOLDERS,
    MANIFEST,
    MEMORY,
    PAGE,
    SCHEMA,
    VIDEO,
    FilmError,
    Manifest,
    ShotRecord,
    read_manifest,
)
from storymem.io import hash_file, hash_json, naming_full_disk, remove_leftovers, write_json
from storymem.media.images import fit_image, read_image, write_image
from storymem.media.video import VideoInfo, iter_frames, join_videos, probe, read_video, write_video
from storymem.story import Shot

if TYPE_CHECKING:
    from storymem.memory import Keyframe, MemoryBank

END_FRAMES = 5
_NEXT_MEMORY = ".memory.json.next"  # written before the manifest that says so, renamed after it
_LIBRARIES = ("storymem", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "av")

Say = Callable[[str], None]
"""Takes one line for the person who makes the film."""


class Film:
    """A film on disk, finished or in the making.

    Args:
        folder: where it lies.
        story: ``Story.to_dict()`` of what is told.
        config: the settings that it is made with, plain JSON types.
        shots: records of its finished shots, in order.
    """

    def __init__(
        self, folder: Path, *, story: Mapping[str, Any], config: Mapping[str, Any], shots: Sequence[ShotRecord] = ()
    ) -> None:
        self.folder = folder
        self.story = dict(story)
        self.config = dict(config)
        self.shots = list(shots)
        self._video: Literal["film.mp4"] | None = None
        self._made: dict[str, str] = {}
        self._replaced: dict[str, str] = {}
        self._memory: str | None = None
        self._dropped: dict[str, str | None] = {}  # keyframes of shots that are made again
        self._saved: dict[str, Any] | None = None  # what film.json holds now

    @classmethod
    def open(cls, folder: str | Path) -> Film:
        """Read a film's manifest; nothing in the folder changes.

        Raises:
            FilmError: if there is none, or it cannot be understood.
        """
        manifest, saved = read_manifest(Path(folder))
        film = cls(Path(folder), story=manifest.story, config=manifest.config, shots=manifest.shots)
        film._video, film._made, film._replaced = manifest.video, manifest.made, manifest.replaced
        film._memory, film._saved = manifest.memory_sha256, saved
        return film

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether ``folder`` holds a film, finished or not."""
        return os.path.lexists(Path(folder) / MANIFEST)

    @property
    def video(self) -> Path | None:
        """The joined film, once it is finished."""
        return None if self._video is None else self.folder / self._video

    @property
    def config_hash(self) -> str:
        """SHA-256 of the settings, as 16 hexadecimal digits."""
        return hash_json(self.config)[:16]

    @property
    def has_memory(self) -> bool:
        """Whether a memory was saved with the film."""
        return os.path.lexists(self.folder / MEMORY)

    def missing_memory(self) -> list[Path]:
        """Files of the memory that the last finished shot left and that are not there."""
        if self._memory is None:
            return []
        if not self.has_memory:
            return [self.folder / MEMORY]
        from storymem.memory.storage import read_entries  # with torch

        pictures = [self.folder / entry["image"] for entry in read_entries(self.folder)]
        return [path for path in pictures if not path.exists()]

    @property
    def memory_changed(self) -> bool:
        """Whether ``memory.json`` is another than the last finished shot left."""
        path = self.folder / MEMORY
        return self._memory is not None and path.is_file() and hash_file(path) != self._memory

    def save(self) -> None:
        """Write the manifest."""
        self._write(self._manifest())

    def _manifest(self) -> dict[str, Any]:
        state = Manifest(
            video=self._video,
            shots=tuple(self.shots),
            made=self._made,
            memory_sha256=self._memory,
            replaced=self._replaced,
            config=self.config,
            story=self.story,
        )
        return {
            "schema": SCHEMA,
            "title": self.story["title"],
            "seconds": round(sum(sum(shot.seconds.values()) for shot in self.shots), 3),
            "config_hash": self.config_hash,
            "versions": library_versions(),
            **asdict(state),
        }

    def _write(self, manifest: dict[str, Any]) -> None:
        write_json(self.folder / MANIFEST, manifest)
        self._saved = manifest

    def add(self, record: ShotRecord) -> None:
        """Note that a shot is finished; its files must be on disk."""
        assert record.index == len(self.shots), "shots are finished in order"
        self.shots.append(replace(record, sha256=self._hashes(record.file)))
        self._video = None
        if (self.folder / _NEXT_MEMORY).is_file():
            self._memory = hash_file(self.folder / _NEXT_MEMORY)
        self.save()
        self._take_over_memory()

    def forget_from(self, shot: int) -> None:
        """Drop shot ``shot`` (from 0) and all later ones; on disk they stay until other shots are finished."""
        for record in self.shots[shot:]:
            if not record.is_by_hand:
                self._replaced |= record.sha256 or self._hashes(record.file)
            self._replaced.setdefault(record.file, "")  # a name that is not free
            self._dropped |= {keyframe.id: keyframe.sha256 for keyframe in record.keyframes}
        if shot < len(self.shots):
            self.shots, self._video = self.shots[:shot], None

    def keep_memory(self, bank: MemoryBank, gone: Iterable[Keyframe]) -> None:
        """Say what the memory is once another shot is finished; files of keyframes that are gone are deleted then.

        Args:
            bank: what is remembered.
            gone: what no longer is. Pictures that a person changed stay on disk.
        """
        from storymem.memory import keyframe_files  # loads torch

        named = {id for shot in self.shots for id in (*shot.memory, *(k.id for k in shot.keyframes))}
        for keyframe in gone:
            if keyframe.id not in named and self._dropped.get(keyframe.id) in (None, keyframe.sha256):
                paths = {name: self.folder / name for name in keyframe_files(keyframe.id)}
                self._replaced |= {name: hash_file(path) for name, path in paths.items() if path.is_file()}
        for name in bank.files():
            self._replaced.pop(name, None)

    def remove_unfinished(self) -> None:
        """Delete what a killed process was writing; take over what it had finished. Call it under the folder's lock."""
        writing = (self._saved or {}).get("writing", ())
        named = {name for shot in self.shots for name in (shot.file, *shot.sha256)}
        for name in writing:
            if name not in named:
                self._remove(name)
        self._take_over_memory()
        for name in {*FOLDERS, *(str(Path(name).parent) for name in writing)}:
            if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                remove_leftovers(self.folder / name)
                _remove_if_empty_end(self.folder / name)
        if self._video and not self._made:  # as written by versions that kept no hashes
            self._adopt()
        if writing:
            self.save()

    def check(self, say: Say = lambda line: None) -> None:
        """Read all shots' files and compare them with the manifest. A video that a person changed is accepted.

        Args:
            say: is told of each file that is not what was written.

        Raises:
            FilmError: if a shot's video is missing or cannot be decoded.
        """
        known = {shot.sha256[shot.file]: shot for shot in self.shots if shot.file in shot.sha256}
        for place, record in enumerate(self.shots):
            path = self.folder / record.file
            again = f"put it back, or make this shot and all later ones again with resume=from_shot:{record.index + 1}"
            if not path.is_file():
                raise FilmError(f"{path}, the video of {record.label}, is missing: {again}")
            digest = hash_file(path)
            if record.sha256.get(record.file) == digest:
                continue
            try:
                frames = sum(1 for _ in iter_frames(path))
            except ValueError as error:
                raise FilmError(f"{error}: {again}") from None
            if not frames:
                raise FilmError(f"{path} holds no frames: {again}")
            if not record.sha256 and frames == record.frames:
                self.shots[place] = replace(record, sha256=self._hashes(record.file))
                continue
            other = f", but that of {known[digest].label}" if digest in known else ""
            say(
                f"{path} is not the video that was made as {record.label}{other}: "
                f"its {frames} frames take the place of {record.frames}"
            )
            self.shots[place] = replace(record, frames=frames, sha256={record.file: digest})
            self._video = None

    def _adopt(self) -> None:
        try:
            whole = probe(self.folder / VIDEO).frames == sum(shot.frames for shot in self.shots)
        except (ValueError, FileNotFoundError):
            whole = False
        found = [name for name in (PAGE, *([VIDEO] if whole else [])) if (self.folder / name).is_file()]
        self._made = {name: hash_file(self.folder / name) for name in found}

    def write_shot(
        self, shot: Shot, frames: np.ndarray, *, repeated: int, fps: int, memory: MemoryBank | None = None
    ) -> str:
        """Write a shot's video without its first ``repeated`` frames, its last frames, and the memory after it.

        All of this counts once :meth:`add` is called.

        Args:
            shot: which one.
            frames: uint8 [F, H, W, 3], all that were generated.
            repeated: how many at the beginning repeat the shot before.
            fps: frames per second.
            memory: the bank with what the shot added.

        Returns:
            The video's name in the film's folder.
        """
        name = self._free_name(f"shots/{shot.scene:02d}_{shot.number:02d}")
        ends = _end_names(name)[-len(frames) :]
        pictures = [] if memory is None else [one for one in memory.files() if not (self.folder / one).exists()]
        writing = [name, *ends, *pictures, _NEXT_MEMORY]
        self._write({**(self._saved or self._manifest()), "writing": writing})
        try:
            with naming_full_disk(self.folder / name):
                (self.folder / ends[0]).parent.mkdir(parents=True, exist_ok=True)
            write_video(self.folder / name, frames[repeated:], fps)
            for end, frame in zip(ends, frames[-END_FRAMES:], strict=True):
                write_image(self.folder / end, frame)
            if memory is not None:
                memory.save(self.folder, manifest=_NEXT_MEMORY)
        except BaseException:  # a disk that is full, say: give the room back
            for one in writing:
                self._remove(one)
            raise
        return name

    def last_frames(self, shot: int, count: int, say: Say = lambda line: None) -> np.ndarray:
        """The last ``count`` (up to 5) frames of a finished shot, uint8 [count, H, W, 3].

        They are as they were generated; of a video that a person put in the place of a shot's, they are that video's.

        Args:
            shot: from 0.
            count: how many.
            say: is told of pictures that were changed since they were written.

        Raises:
            FilmError: if a file is missing or damaged, or such a video is too short.
        """
        assert 1 <= count <= END_FRAMES
        record = self.shots[shot]
        names = _end_names(record.file)[-count:]
        try:
            if record.is_by_hand:
                last = range(record.frames - count, record.frames)
                return read_video(self.folder / record.file, list(last))
            pictures = [read_image(self.folder / name) for name in names]
            for name, picture in zip(names, pictures, strict=True):
                if picture.shape != pictures[0].shape:
                    raise FilmError(f"{self.folder / name} has another size than {names[0]}")
        except (ValueError, FileNotFoundError) as error:
            raise FilmError(
                f"the next shot cannot go on from {record.label} ({error}): "
                f"make that shot again too, with resume=from_shot:{shot + 1}"
            ) from None
        for name in names:
            if record.sha256.get(name) not in (None, hash_file(self.folder / name)):
                say(f"{self.folder / name} was changed since it was written: the next shot goes on from it as it is")
        return np.stack(pictures)

    def join(self, say: Say = lambda line: None) -> Path:
        """Join all shots into ``film.mp4`` and note it in the manifest.

        Args:
            say: is told of videos by hand that were fitted or encoded again, and of a ``film.mp4`` that was changed.
        """
        joined = self.folder / f".{VIDEO}.joined.partial"
        fitted: list[Path] = []
        try:
            parts = [self._part(shot, fitted, say) for shot in self.shots]
            for line in join_videos(parts, joined):
                if not any(str(path) in line for path in fitted):
                    say(line.replace(joined.name, VIDEO))
        finally:
            for path in fitted:
                path.unlink(missing_ok=True)
        self.put(VIDEO, joined, say)
        self._video = "film.mp4"
        self.save()
        return self.folder / VIDEO

    @cached_property
    def _generated(self) -> VideoInfo:
        """Size and rate of the shots: those of the first one that no person replaced."""
        records = [record for record in self.shots if not record.is_by_hand] or self.shots
        return probe(self.folder / records[0].file)

    def _part(self, record: ShotRecord, fitted: list[Path], say: Say) -> Path:
        """A shot's video at the size and rate of the others."""
        path, like = self.folder / record.file, self._generated
        info = probe(path)
        if (info.height, info.width) == (like.height, like.width) and abs(info.fps - like.fps) < 0.01 * like.fps:
            return path
        was, now = (f"{one.width}x{one.height} at {one.fps:g} frames per second" for one in (info, like))
        say(f"{path} is {was}: fitted to {now} for {VIDEO}")
        fitted.append(self.folder / f".{path.name}.fitted.partial")
        write_video(fitted[-1], _fitted(path, info, like), like.fps)
        return fitted[-1]

    @property
    def is_joined(self) -> bool:
        """Whether ``film.mp4`` is there as it was joined of these shots."""
        path = self.folder / VIDEO
        return self._video is not None and path.is_file() and hash_file(path) == self._made.get(VIDEO)

    def put(self, name: str, made: Path, say: Say = lambda line: None) -> None:
        """Give a finished file its name; one of that name that a person changed is kept under another name."""
        path = self.folder / name
        digest = hash_file(made)
        if path.is_file() and hash_file(path) not in (digest, self._made.get(name)):
            aside = next(p for n in count(1) if not os.path.lexists(p := path.with_stem(f"{path.stem}_{n}")))
            path.rename(aside)
            say(f"{path} was changed since it was made: it is now {aside.name}, and {name} is made again")
        made.replace(path)
        self._made = {**self._made, name: digest}

    def remove_replaced(self) -> None:
        """Delete the files of earlier takes, now that the film is whole, and save the manifest if it has changed."""
        named = {name for shot in self.shots for name in (shot.file, *shot.sha256)}
        for name, digest in self._replaced.items():
            if name not in named and (self.folder / name).is_file() and hash_file(self.folder / name) == digest:
                self._remove(name)
            _remove_if_empty_end((self.folder / name).parent)  # killed before that, in the run before
        self._replaced = {}
        now = json.loads(json.dumps(self._manifest()))
        if {**now, "versions": None} != {**(self._saved or {}), "versions": None}:
            self.save()

    def _hashes(self, file: str) -> dict[str, str]:
        names = [file, *_end_names(file)]
        return {name: hash_file(self.folder / name) for name in names if (self.folder / name).is_file()}

    def _free_name(self, stem: str) -> str:
        taken = {shot.file for shot in self.shots} | self._replaced.keys()
        stems = (stem if take == 1 else f"{stem}_take{take}" for take in count(1))
        names = (f"{stem}.mp4" for stem in stems)
        return next(
            name
            for name in names
            if name not in taken
            and not os.path.lexists(self.folder / name)
            and not os.path.lexists(self.folder / _end_names(name)[0])
        )

    def _take_over_memory(self) -> None:
        following = self.folder / _NEXT_MEMORY
        if following.is_file() and hash_file(following) == self._memory:
            following.replace(self.folder / MEMORY)
        following.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        """Delete a file of a shot or of the memory; no symbolic link on the way to it is followed."""
        if Path(name).parts[0] not in FOLDERS and name != _NEXT_MEMORY:
            return
        path = self.folder / name
        without_links = Path(os.path.realpath(self.folder)) / Path(name).parent
        if Path(os.path.realpath(path.parent)) == without_links and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
            _remove_if_empty_end(path.parent)


def _fitted(path: Path, info: VideoInfo, like: VideoInfo) -> Iterator[np.ndarray]:
    """The frames of a video at the size and rate of another, each the one that is shown at its time."""
    total = max(1, round((info.times[-1] + 1 / info.fps) * like.fps)) if info.fps else 1
    shown = np.searchsorted(info.times, np.arange(total) / like.fps + 1e-6, side="right") - 1
    times_shown = Counter(shown.tolist())
    for number, frame in enumerate(iter_frames(path)):
        picture = fit_image(frame, like.height, like.width, "contain")
        yield from repeat(picture, times_shown[number])


def _end_names(file: str) -> list[str]:
    return [f"{file.removesuffix('.mp4')}_end/{number}.png" for number in range(1, END_FRAMES + 1)]


def _remove_if_empty_end(folder: Path) -> None:
    if folder.name.endswith("_end") and folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


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
    old, new = flat(before), flat(after)
    return [
        f"{key}: {old.get(key, 'nothing')!r} before, {new.get(key, 'nothing')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value in nested mappings and lists under its path: ``sampler.steps``, ``scenes[2].shots[1].prompt``."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(f"{path}[{number}]", item) for number, item in enumerate(value, start=1)]
    else:
        return {path: value}
    return {key: leaf for where, item in items for key, leaf in flat(item, where).items()}
