"""A film's folder: takes, the memory, and a manifest from which the film can be resumed, changed or checked.

    film.json                    the story, all takes with their settings, and which one each shot shows
    film.mp4                     the chosen takes joined; continued shots do not repeat frames
    storyboard.html              the film as a page: see :mod:`storymem.film.storyboard`
    shots/01_02/take_003.mp4     scene 1, shot 2, the third that was made of it
    shots/01_02/take_003_end/    its last frames without loss, from which the next shot can continue
    memory.json, keyframes/      see :mod:`storymem.memory.bank`

The files of a take get names that no file has. It is part of the film when ``film.json`` is renamed over the previous
one; until then the film is what it was, and a process that is killed loses at most the take it was making. Only
:meth:`Film.clean` deletes takes, and of these only files that are as they were written.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from storymem.config import first_of
from storymem.film.joining import join_film
from storymem.film.manifest import (
    FOLDERS,
    MANIFEST,
    MEMORY,
    PAGE,
    REPLACED,
    SCHEMA,
    VIDEO,
    FilmError,
    Manifest,
    Take,
    config_hash,
    end_names,
    film_folder,
    new_slots,
    scripts,
)
from storymem.film.matching import arranged, match
from storymem.film.reading import read_manifest
from storymem.film.settings import END_FRAMES, GIVEN_FRAMES, Mode
from storymem.film.storyboard import storyboard
from storymem.io import FileError, hash_file, naming_full_disk, remove_leftovers, set_aside, write_json, write_text
from storymem.media.images import read_image, write_image
from storymem.media.video import iter_frames, read_video, write_video
from storymem.memory import MemoryBank
from storymem.memory.bank import Entry, KeyframeRecord, holds_image, intact, keyframe_files, read_entries, write_entries

logger = logging.getLogger(__name__)

_NEXT_MEMORY = ".memory.json.next"  # written before the manifest with its hash, renamed after it


class Film(Manifest):
    """A film on disk, finished or not. Warnings are logged.

    Args:
        folder: where it lies.
        story: see :func:`storymem.film.resume.story_record`.
        config: the settings that it is made with, plain JSON types.
        more: other fields of :class:`Manifest`.

    Attributes:
        before: the manifest that was opened, None for a new film; changes of story and settings are made beside it.
    """

    before: Manifest | None = None

    def __init__(self, folder: Path, *, story: Mapping[str, Any], config: Mapping[str, Any], **more: Any) -> None:
        super().__init__(story=dict(story), config=dict(config), **{"slots": new_slots(story), **more})
        self.folder = folder
        self._saved: dict[str, Any] | None = None  # what film.json holds now, perhaps in an older schema

    @classmethod
    def open(cls, folder: str | Path) -> Film:
        """Read a film's manifest; nothing in the folder changes. ``FilmError`` as :func:`read_manifest`."""
        manifest, saved = read_manifest(Path(folder))
        film = cls(Path(folder), **{**vars(manifest), "writing": []})
        film.before, film._saved = manifest, saved
        return film

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether ``folder`` holds a film, finished or not."""
        return os.path.lexists(Path(folder) / MANIFEST)

    @property
    def video(self) -> Path | None:
        """The joined film, once there is a take; shots without one are cards in it."""
        return None if self.joined is None else self.folder / self.joined

    @property
    def is_older(self) -> bool:
        """Whether an older version wrote the film, which is converted when it is written."""
        return self._saved is not None and self._saved["schema"] < SCHEMA

    @property
    def has_memory(self) -> bool:
        """Whether a memory was saved with the film."""
        return os.path.lexists(self.folder / MEMORY)

    @property
    def lacks_memory(self) -> bool:
        """Whether ``memory.json`` is missing. Films whose shots were generated together need none."""
        return not self.has_memory and any(take.candidates != () for take in self.shots)

    @property
    def memory_changed(self) -> bool:
        """Whether ``memory.json`` is not as it was written."""
        path = self.folder / MEMORY
        return self.memory_sha256 is not None and path.is_file() and hash_file(path) != self.memory_sha256

    def save(self) -> None:
        """Write the manifest."""
        self._write(self.to_json())

    def _write(self, manifest: dict[str, Any]) -> None:
        write_json(self.folder / MANIFEST, manifest)
        self._saved = manifest

    # Changes. On disk the story and settings are those of `before` until `add` or `commit`

    def use_story(self, story: Mapping[str, Any]) -> None:
        """Use another version of the story; its shots keep the takes that they have, see :func:`match`."""
        self.slots = match(self.slots, self.takes, self.story, story)
        self.story = dict(story)
        place = {slot.folder: number for number, slot in enumerate(self.slots, start=1)}
        now = scripts(story)
        for number, take in enumerate(self.takes):
            if (shot := place.get(take.folder)) is not None:
                script = now[shot - 1]
                self.takes[number] = replace(take, shot=shot, scene=script.scene, number=script.number)

    def use_config(self, config: Mapping[str, Any]) -> None:
        """Use other settings for the takes to come."""
        self.configs[self.config_hash] = self.config
        self.config = dict(config)

    def show(self, index: int, number: int) -> None:
        """Have a shot (index from 0) show its take ``number``, and the memory hold what that take adds.

        Raises:
            FilmError: if there is no such take.
        """
        takes = [take.take for take in self.takes_of(index)]
        if number not in takes:
            known = f"it has {', '.join(map(str, takes))}" if takes else f"it has none: shot={index + 1} makes one"
            raise FilmError(f"shot {index + 1} has no take {number}; {known}")
        was = list(self.slots)
        self.slots[index] = replace(self.slots[index], take=number, again=False)
        if (entries := read_entries(self.folder)) is not None:
            write_entries(self.folder / _NEXT_MEMORY, arranged(self, was, entries))
        self._commit()

    def commit(self, memory: MemoryBank) -> None:
        """Save the film and its memory, without a new take."""
        memory.save(self.folder, manifest=_NEXT_MEMORY)
        self._commit()

    def edit_memory(self, entries: Sequence[Entry], edit: str, images: Mapping[str, np.ndarray]) -> None:
        """Save other ``entries`` of the memory, and new images by their (unused) names; ``edit`` is what was done."""
        self._write({**(self._saved or {}), "writing": [*images, _NEXT_MEMORY]})
        for name, image in images.items():
            write_image(self.folder / name, image)
        write_entries(self.folder / _NEXT_MEMORY, entries)
        self.memory_sha256 = hash_file(self.folder / _NEXT_MEMORY)
        self.edits.append(edit)
        self.save()
        self._put_memory()

    def _commit(self) -> None:
        self.joined = None
        if (self.folder / _NEXT_MEMORY).is_file():
            self.memory_sha256 = hash_file(self.folder / _NEXT_MEMORY)
        self.save()
        self._put_memory()

    # Takes

    def write_take(
        self,
        index: int,
        frames: np.ndarray,
        *,
        mode: Mode,
        seed: int,
        fps: int,
        config: Mapping[str, Any] | None = None,
        memory: MemoryBank | None = None,
        besides: MemoryBank | None = None,
    ) -> Take:
        """Write a take's video, its last frames, and keyframes; they take effect with :meth:`add`.

        Args:
            index: of the shot, from 0.
            frames: uint8 [F, H, W, 3], all that were generated. Those that repeat the previous shot are left out of the
                video.
            mode, seed: see :class:`Take`.
            fps: frames per second.
            config: its settings, if they are not those of the film.
            memory: the memory of the film with this take, if its shot shows it.
            besides: other keyframes that are written.

        Returns:
            Its record, still without what it has to do with the memory.
        """
        number, name = self._free_name(index)
        repeated = GIVEN_FRAMES[mode]
        ends = end_names(name)[-len(frames) :]
        banks = {_NEXT_MEMORY: memory, None: besides}
        images = [one for bank in banks.values() for one in ([] if bank is None else bank.files())]
        writing = [name, *ends, *(one for one in images if not (self.folder / one).exists()), _NEXT_MEMORY]
        self._write({**(self.to_json() if self._saved is None else self._saved), "writing": writing})
        try:
            with naming_full_disk(self.folder / name):
                (self.folder / ends[0]).parent.mkdir(parents=True, exist_ok=True)
            write_video(self.folder / name, frames[repeated:], fps)
            for end, frame in zip(ends, frames[-END_FRAMES:], strict=True):
                write_image(self.folder / end, frame)
            for manifest, bank in banks.items():
                if bank is not None:
                    bank.save(self.folder, manifest=manifest)
        except BaseException:  # for example a full disk: free the room
            for one in writing:
                self._remove(one)
            raise
        script, slot = scripts(self.story)[index], self.slots[index]
        before = self.take_of(index - 1) if repeated else None
        made_with = self.config if config is None else dict(config)
        self.configs[config_hash(made_with)] = made_with
        return Take(
            shot=index + 1,
            scene=script.scene,
            number=script.number,
            folder=slot.folder,
            take=number,
            script=script.content,
            mode=mode,
            seed=seed,
            frames=len(frames) - repeated,
            repeated=repeated,
            file=name,
            config_hash=config_hash(made_with),
            follows=None if before is None else before.sha256.get(before.file),
            sha256=self._hashes(name),
        )

    def add(self, take: Take, *, chosen: bool = True, left: Sequence[KeyframeRecord] | None = None) -> None:
        """Add a take that :meth:`write_take` wrote.

        Args:
            take: with what it recalled and what it adds to the memory.
            chosen: whether its shot shows it from now on.
            left: what the take that the shot showed before had in the memory.
        """
        self.takes.append(take)
        before = self.take_of(take.index)
        if before is not None and left is not None:
            self.takes[self.takes.index(before)] = replace(before, keyframes=tuple(left))
        if chosen:
            self.slots[take.index] = replace(self.slots[take.index], take=take.take, again=False)
        self._commit()

    def last_frames(self, shot: int, count: int) -> np.ndarray:
        """The last ``count`` (up to 5) frames of a shot's chosen take (index from 0), uint8 [count, H, W, 3].

        They are as they were generated, or those of the video that the user put in its place.

        Raises:
            FilmError: if there is no take, a file is missing or damaged, or such a video is too short.
        """
        assert 1 <= count <= END_FRAMES
        record = self.take_of(shot)
        if record is None:
            raise FilmError(
                f"shot {shot + 2} continues shot {shot + 1}, which has no take: make it first, shot={shot + 1}"
            )
        names = end_names(record.file)[-count:]
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
                f"make another take of that shot first, with shot={record.shot}"
            ) from None
        for name in names:
            if record.sha256.get(name) not in (None, hash_file(self.folder / name)):
                logger.warning(
                    "%s was changed since it was written: the next shot continues from it", self.folder / name
                )
        return np.stack(images)

    def check(self, besides: Sequence[int] = ()) -> None:
        """Compare the videos of chosen takes with the manifest; one that the user changed is accepted with a warning.

        Shots (from 0) in ``besides`` are not checked, since they get another take.

        Raises:
            FilmError: if a video is missing or cannot be decoded.
        """
        known = {take.sha256[take.file]: take for take in self.shots if take.file in take.sha256}
        for record in self.shots:
            path = self.folder / record.file
            cure = f"put it back, or make another take of this shot with shot={record.shot}"
            if record.index in besides:
                continue
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
            hashes, generated = {record.file: digest}, record.generated_sha256 or record.sha256.get(record.file)
            if digest == record.generated_sha256:
                hashes, generated = self._hashes(record.file), None
                logger.warning(f"{path} is the video again that was generated for {record.label}")
            else:
                other = f", but that of {known[digest].label}" if digest in known else ""
                logger.warning(
                    f"{path} is not the video that was generated for {record.label}{other}: "
                    f"its {frames} frames are used instead of {record.frames}"
                )
            changed = replace(record, frames=frames, sha256=hashes, generated_sha256=generated)
            self.takes[self.takes.index(record)] = changed
            self.joined = None

    def other_videos(self) -> dict[str, str]:
        """File of a take -> what it is, for those that are not the videos that were generated. Nothing changes."""
        found = {}
        for take in self.takes:
            if not (self.folder / take.file).is_file():
                found[take.file] = "missing"
            elif not self._has(take.file, take.sha256.get(take.file)):
                found[take.file] = "replaced by the user, not yet in film.mp4"
            elif take.is_replaced:
                found[take.file] = REPLACED
        return found

    def lost(self) -> str | None:
        """The files of the memory and of shots' last frames that cannot be read, in a sentence; None if all can."""
        needed = [name for take in self.shots for name in take.sha256 if name != take.file]
        for entry in read_entries(self.folder) or ():
            needed += [entry.image, *keyframe_files(entry.id)[1:]] if entry.sha256 else [entry.image]
        gone = [name for name in needed if not intact(self.folder / name)]
        cure = "put them back: shots that need them cannot be made"
        return f"missing or damaged: {first_of(gone, 4)}; {cure}" if gone else None

    def clean(self) -> list[Take]:
        """Delete the takes that no shot shows, and what only they added to the memory; returns them.

        Files that the user changed stay, and images of keyframes that the page shows.
        """
        chosen, gone = self.shots, self.not_shown
        shown = {id for take in chosen for id in (*take.memory, *(k.id for k in take.keyframes))}
        shown |= {entry.id for entry in read_entries(self.folder) or ()}
        files = {name: digest for take in gone for name, digest in take.sha256.items() if not take.is_replaced}
        unchanged = [name for name, digest in files.items() if self._has(name, digest)]
        for keyframe in (keyframe for take in gone for keyframe in take.keyframes):
            image, tensors = keyframe_files(keyframe.id)
            if keyframe.id not in shown and holds_image(self.folder / image, keyframe.sha256):
                unchanged += [image, tensors]
        for take in gone:
            self.deleted_seeds[take.folder] = sorted({*self.deleted_seeds.get(take.folder, ()), take.seed})
        self.takes = chosen
        self._write({**self.to_json(), "writing": unchanged})
        self.remove_unfinished()
        return gone

    def remove_unfinished(self) -> None:
        """Delete what a killed process was writing, put in place what it had finished; the folder must be locked."""
        writing = (self._saved or {}).get("writing", ())
        named = {name for take in self.takes for name in (take.file, *take.sha256)}
        for name in writing:
            if name not in named:
                self._remove(name)
        self._put_memory()
        for name in {*FOLDERS, *(str(Path(name).parent) for name in writing)}:
            if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                remove_leftovers(self.folder / name)
                _remove_if_empty(self.folder / name)
        if writing:
            self.save()

    # The film as a whole

    def refresh(self) -> None:
        """Join the takes if needed, and write the page."""
        written = {PAGE: self.folder / f".{PAGE}.partial"}
        write_text(written[PAGE], storyboard(self, self.folder))
        if self.shots and not (self.joined and self._has(VIDEO, self.made.get(VIDEO))):
            written[VIDEO] = self.folder / f".{VIDEO}.joined.partial"
            join_film(self, self.folder, written[VIDEO])
            self.joined = "film.mp4"
        for name, path in written.items():
            self._announce(name, hash_file(path))
        if {**self.to_json(), "versions": None} != {**(self._saved or {}), "versions": None}:
            self.save()
        for name, path in written.items():
            path.replace(self.folder / name)

    def _announce(self, name: str, digest: str) -> None:
        """Note that a file of the film gets other content; one that the user changed gets another name."""
        path = self.folder / name
        if path.is_file() and (old := hash_file(path)) != digest:
            if old in (self.made.get(name), self.made_before.get(name)):
                self.made_before = {**self.made_before, name: old}
            else:
                set_aside(path)
        self.made = {**self.made, name: digest}

    def _has(self, name: str, digest: str | None) -> bool:
        path = self.folder / name
        return path.is_file() and hash_file(path) == digest

    def _hashes(self, file: str) -> dict[str, str]:
        names = [file, *end_names(file)]
        return {name: hash_file(self.folder / name) for name in names if (self.folder / name).is_file()}

    def _free_name(self, index: int) -> tuple[int, str]:
        """The number of the next take of a shot, and the name of its video."""
        folder, taken = self.slots[index].folder, {take.file for take in self.takes}
        for number in count(max((take.take for take in self.takes_of(index)), default=0) + 1):
            name = f"shots/{folder}/take_{number:03d}.mp4"
            paths = (self.folder / name, self.folder / end_names(name)[0])
            if name not in taken and not any(os.path.lexists(path) for path in paths):
                return number, name
        raise AssertionError

    def _put_memory(self) -> None:
        following = self.folder / _NEXT_MEMORY
        if following.is_file() and hash_file(following) == self.memory_sha256:
            following.replace(self.folder / MEMORY)
        following.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        """Delete a file of a take or of the memory; no symbolic link on the way to it is followed."""
        if Path(name).parts[0] not in FOLDERS and name != _NEXT_MEMORY:
            return
        path = self.folder / name
        without_links = Path(os.path.realpath(self.folder)) / Path(name).parent
        if Path(os.path.realpath(path.parent)) == without_links and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
            _remove_if_empty(path.parent)


@contextmanager
def edited_film(folder: str | Path) -> Iterator[Film]:
    """The film in ``folder``, which is locked until the end of the block; ``film.mp4`` and the page then follow it.

    Raises:
        FilmError: if there is no film, and then nothing is locked; see :func:`read_manifest`.
        FileError: if another process has locked it.
    """
    Film.open(folder)
    edits: list[str] | None = None
    try:
        with film_folder(folder):
            film = Film.open(folder)
            film.remove_unfinished()
            edits = list(film.edits)
            yield film
            with naming_full_disk(film.folder / VIDEO):
                film.refresh()
    except (KeyboardInterrupt, FileError) as end:
        if edits is None or Film.open(folder).edits == edits:
            raise  # nothing is changed that must not be changed twice
        rest = f"the change is made, and storymem film {shlex.quote(str(folder))} join does what is left"
        if isinstance(end, FileError):
            raise FileError(f"{rest}: {end}") from end
        end.add_note(rest)
        raise


def _remove_if_empty(folder: Path) -> None:
    """Remove an empty folder of a take's last frames, and then that of the shot's takes."""
    for one in (folder, folder.parent):
        of_takes = one.parent.name == "shots" or one.name.endswith("_end")
        if of_takes and one.is_dir() and not one.is_symlink() and not any(one.iterdir()):
            one.rmdir()
