"""A film's folder: shots, last frames, memory, and a manifest from which the film can be resumed or checked.

    film.json              the story, the settings and the finished shots
    film.mp4               all shots joined; continued shots do not repeat frames
    storyboard.html        the film as a page: see :mod:`storymem.film.storyboard`
    shots/01_02.mp4        scene 1, shot 2; 01_02_take2.mp4 where that name was taken
    shots/01_02_end/1.png  its last frames without loss, from which the next shot can continue
    memory.json, keyframes/  see :mod:`storymem.memory.bank`

The files of a shot get names that no file has. It is finished when ``film.json`` is renamed over the previous one; till
then the film is what it was, and a process that is killed loses at most the shot it was making. Files of earlier takes
are deleted when the film is complete again. Only files that the manifest names are deleted, if they are as written.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
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
from storymem.io import hash_file, hash_json, naming_full_disk, remove_leftovers, write_json, write_text
from storymem.media.images import fit_image, read_image, write_image
from storymem.media.video import VideoInfo, iter_frames, join_videos, probe, read_video, write_video
from storymem.story import Shot

if TYPE_CHECKING:
    from storymem.memory import Keyframe, MemoryBank

logger = logging.getLogger(__name__)

END_FRAMES = 5
_NEXT_MEMORY = ".memory.json.next"  # written before the manifest with its hash, renamed after it
_LIBRARIES = ("storymem", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "av")


class Film:
    """A film on disk, finished or not. Warnings are logged.

    Args:
        folder: where it lies.
        story: see :func:`storymem.film.resume.story_record`.
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
        self._dropped: dict[str, str | None] = {}  # keyframes of shots that are regenerated: id -> sha256
        self._saved: dict[str, Any] | None = None  # what film.json holds now

    @classmethod
    def open(cls, folder: str | Path) -> Film:
        """Read a film's manifest; nothing in the folder changes. ``FilmError`` as :func:`read_manifest`."""
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

    @property
    def memory_changed(self) -> bool:
        """Whether ``memory.json`` is not what the last finished shot left."""
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

    # Shots

    def write_shot(
        self, shot: Shot, frames: np.ndarray, *, repeated: int, fps: int, memory: MemoryBank | None = None
    ) -> str:
        """Write a shot's video, its last frames, and the memory after it; they take effect with :meth:`add`.

        Args:
            shot: which one.
            frames: uint8 [F, H, W, 3], all that were generated.
            repeated: how many at the beginning repeat the previous shot; the video leaves them out.
            fps: frames per second.
            memory: the bank with what the shot added.

        Returns:
            The video's name in the film's folder.
        """
        name = self._free_name(f"shots/{shot.scene:02d}_{shot.number:02d}")
        ends = _end_names(name)[-len(frames) :]
        images = [] if memory is None else [one for one in memory.files() if not (self.folder / one).exists()]
        writing = [name, *ends, *images, _NEXT_MEMORY]
        self._write({**(self._manifest() if self._saved is None else self._saved), "writing": writing})
        try:
            with naming_full_disk(self.folder / name):
                (self.folder / ends[0]).parent.mkdir(parents=True, exist_ok=True)
            write_video(self.folder / name, frames[repeated:], fps)
            for end, frame in zip(ends, frames[-END_FRAMES:], strict=True):
                write_image(self.folder / end, frame)
            if memory is not None:
                memory.save(self.folder, manifest=_NEXT_MEMORY)
        except BaseException:  # for example a full disk: free the room
            for one in writing:
                self._remove(one)
            raise
        return name

    def add(self, record: ShotRecord) -> None:
        """Add a finished shot, whose files are on disk."""
        assert record.index == len(self.shots), "shots are finished in order"
        self.shots.append(replace(record, sha256=self._hashes(record.file)))
        self._video = None
        if (self.folder / _NEXT_MEMORY).is_file():
            self._memory = hash_file(self.folder / _NEXT_MEMORY)
        self.save()
        self._put_memory()

    def last_frames(self, shot: int, count: int) -> np.ndarray:
        """The last ``count`` (up to 5) frames of a finished shot (index from 0), uint8 [count, H, W, 3].

        They are as they were generated, or those of the video that the user put in its place.

        Raises:
            FilmError: if a file is missing or damaged, or such a video is too short.
        """
        assert 1 <= count <= END_FRAMES
        record = self.shots[shot]
        names = _end_names(record.file)[-count:]
        try:
            if record.is_replaced:
                return read_video(self.folder / record.file, list(range(record.frames - count, record.frames)))
            images = [read_image(self.folder / name) for name in names]
            for name, image in zip(names, images, strict=True):
                if image.shape != images[0].shape:
                    raise FilmError(f"{self.folder / name} has another size than {names[0]}")
        except (ValueError, FileNotFoundError) as error:
            raise FilmError(
                f"the next shot cannot continue from {record.label} ({error}): "
                f"regenerate that shot too, with resume=from_shot:{record.shot}"
            ) from None
        for name in names:
            if record.sha256.get(name) not in (None, hash_file(self.folder / name)):
                logger.warning(
                    "%s was changed since it was written: the next shot continues from it", self.folder / name
                )
        return np.stack(images)

    def check(self) -> None:
        """Compare the videos of all shots with the manifest. A video that the user changed is accepted with a warning.

        Raises:
            FilmError: if a video is missing or cannot be decoded.
        """
        known = {shot.sha256[shot.file]: shot for shot in self.shots if shot.file in shot.sha256}
        for place, record in enumerate(self.shots):
            path = self.folder / record.file
            cure = f"put it back, or regenerate this shot and all later ones with resume=from_shot:{record.shot}"
            if not path.is_file():
                raise FilmError(f"{path}, the video of {record.label}, is missing: {cure}")
            digest = hash_file(path)
            if record.sha256.get(record.file) == digest:
                continue
            try:
                frames = sum(1 for _ in iter_frames(path))
            except ValueError as error:
                raise FilmError(f"{error}: {cure}") from None
            if not frames:
                raise FilmError(f"{path} holds no frames: {cure}")
            other = f", but that of {known[digest].label}" if digest in known else ""
            logger.warning(
                f"{path} is not the video that was generated for {record.label}{other}: "
                f"its {frames} frames are used instead of {record.frames}"
            )
            self.shots[place] = replace(record, frames=frames, sha256={record.file: digest})
            self._video = None

    # Regenerating shots

    def drop_from(self, shot: int) -> None:
        """Drop shot ``shot`` (index from 0) and later ones; on disk they stay until other shots are finished."""
        for record in self.shots[shot:]:
            if not record.is_replaced:
                self._replaced |= record.sha256
            self._replaced.setdefault(record.file, "")  # a name that is not free
            self._dropped |= {keyframe.id: keyframe.sha256 for keyframe in record.keyframes}
        if shot < len(self.shots):
            self.shots, self._video = self.shots[:shot], None

    def keep_memory(self, bank: MemoryBank, gone: Iterable[Keyframe]) -> None:
        """Have the files of keyframes that are ``gone`` from the ``bank`` deleted once the film is complete.

        Images that the user changed stay, and those that the page shows.
        """
        from storymem.memory.bank import keyframe_files  # loads torch

        shown = {id for shot in self.shots for id in (*shot.memory, *(k.id for k in shot.keyframes))}
        for keyframe in gone:
            if keyframe.id not in shown and self._dropped.get(keyframe.id) in (None, keyframe.sha256):
                paths = {name: self.folder / name for name in keyframe_files(keyframe.id)}
                self._replaced |= {name: hash_file(path) for name, path in paths.items() if path.is_file()}
        for name in bank.files():
            self._replaced.pop(name, None)

    def remove_unfinished(self) -> None:
        """Delete what a killed process was writing, put in place what it had finished; the folder must be locked."""
        writing = (self._saved or {}).get("writing", ())
        named = self._named()
        for name in writing:
            if name not in named:
                self._remove(name)
        self._put_memory()
        for name in {*FOLDERS, *(str(Path(name).parent) for name in writing)}:
            if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                remove_leftovers(self.folder / name)
                _remove_if_empty_end(self.folder / name)
        if writing:
            self.save()

    # The complete film

    def finish(self, page: str) -> None:
        """Join the shots if need be, write the page, and delete earlier takes.

        Args:
            page: the text of ``storyboard.html``, where ``film.mp4`` lies beside it.
        """
        for path in self._missing_memory():
            logger.warning(f"{path} is missing: the film is complete, but shots cannot be regenerated; put it back")
        if not (self._video and self._is_as_made(VIDEO)):
            self._join()
        written = self.folder / f".{PAGE}.partial"
        write_text(written, page)
        self._put(PAGE, written)
        self._remove_replaced()

    def _missing_memory(self) -> list[Path]:
        """Files of the memory that the last finished shot left and that are not there."""
        if self._memory is None:
            return []
        if not self.has_memory:
            return [self.folder / MEMORY]
        from storymem.memory.bank import read_entries  # loads torch

        images = [self.folder / entry.image for entry in read_entries(self.folder)]
        return [path for path in images if not path.exists()]

    def _is_as_made(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and hash_file(path) == self._made.get(name)

    def _join(self) -> None:
        joined = self.folder / f".{VIDEO}.joined.partial"
        own = [record for record in self.shots if not record.is_replaced] or self.shots
        like = probe(self.folder / own[0].file)
        fitted: list[Path] = []
        try:
            parts = [self._part(record, like, fitted) for record in self.shots]
            for note in join_videos(parts, joined):
                if not any(str(path) in note for path in fitted):
                    logger.warning(note.replace(joined.name, VIDEO))
        finally:
            for path in fitted:
                path.unlink(missing_ok=True)
        self._put(VIDEO, joined)
        self._video = "film.mp4"
        self.save()

    def _part(self, record: ShotRecord, like: VideoInfo, fitted: list[Path]) -> Path:
        """A shot's video, or a copy that is fitted to the size and rate of the others and added to ``fitted``."""
        path = self.folder / record.file
        info = probe(path)
        if (info.height, info.width) == (like.height, like.width) and abs(info.fps - like.fps) < 0.01 * like.fps:
            return path
        was, now = (f"{one.width}x{one.height} at {one.fps:g} frames per second" for one in (info, like))
        logger.warning(f"{path} is {was}: fitted to {now} for {VIDEO}")
        fitted.append(self.folder / f".{path.name}.fitted.partial")
        write_video(fitted[-1], _fitted(path, info, like), like.fps)
        return fitted[-1]

    def _put(self, name: str, made: Path) -> None:
        """Give a complete file its name; a file of that name that the user changed gets another name."""
        path = self.folder / name
        digest = hash_file(made)
        if path.is_file() and hash_file(path) not in (digest, self._made.get(name)):
            aside = next(p for n in count(1) if not os.path.lexists(p := path.with_stem(f"{path.stem}_{n}")))
            path.rename(aside)
            logger.warning(
                f"{path} was changed since it was written: it is now {aside.name}, and {name} is written again"
            )
        made.replace(path)
        self._made = {**self._made, name: digest}

    def _remove_replaced(self) -> None:
        """Delete the files of earlier takes, and save the manifest if it has changed."""
        named = self._named()
        for name, digest in self._replaced.items():
            if name not in named and (self.folder / name).is_file() and hash_file(self.folder / name) == digest:
                self._remove(name)
            _remove_if_empty_end((self.folder / name).parent)  # if the previous run was killed before that
        self._replaced = {}
        now = json.loads(json.dumps(self._manifest()))
        if {**now, "versions": None} != {**(self._saved or {}), "versions": None}:
            self.save()

    def _named(self) -> set[str]:
        return {name for shot in self.shots for name in (shot.file, *shot.sha256)}

    def _hashes(self, file: str) -> dict[str, str]:
        names = [file, *_end_names(file)]
        return {name: hash_file(self.folder / name) for name in names if (self.folder / name).is_file()}

    def _free_name(self, stem: str) -> str:
        taken = {shot.file for shot in self.shots} | self._replaced.keys()
        stems = (stem if take == 1 else f"{stem}_take{take}" for take in count(1))
        for name in (f"{stem}.mp4" for stem in stems):
            paths = (self.folder / name, self.folder / _end_names(name)[0])
            if name not in taken and not any(os.path.lexists(path) for path in paths):
                return name
        raise AssertionError

    def _put_memory(self) -> None:
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
        yield from repeat(fit_image(frame, like.height, like.width, "contain"), times_shown[number])


def _end_names(file: str) -> list[str]:
    return [f"{file.removesuffix('.mp4')}_end/{number}.png" for number in range(1, END_FRAMES + 1)]


def _remove_if_empty_end(folder: Path) -> None:
    if folder.name.endswith("_end") and folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def estimated_bytes(frames: int, height: int, width: int) -> int:
    """Upper estimate of the disk space for a shot: its video, its copy in the film, last frames and keyframes.

    0.15 bytes per pixel of video, and lossless images uncompressed.
    """
    pixels = height * width
    return int(2 * 0.15 * frames * pixels + (END_FRAMES + 3) * 3 * pixels)


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
