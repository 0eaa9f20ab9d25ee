"""The memory bank of a film, and its files, which survive ``kill -9`` and may be edited by the user.

    memory.json                 {"schema": 2, "keyframes": [...]}, oldest first
    keyframes/<id>.png          the image, lossless
    keyframes/<id>.safetensors  its embedding, and its latent once there is one

Every file is written to a temporary name and renamed, ``memory.json`` last, so it names complete files only.

``memory.json`` may be edited while no program uses the folder:

- delete entries or change their order: the memory is then exactly that. The files stay, so an entry can be put back.
- replace an image: its ``sha256`` (of the pixels) no longer fits, so it is embedded and encoded again, and its quality,
  similarity and source are dropped. The same happens where ``sha256`` is missing.
- add an image: ``{"image": "tam.jpg"}`` is enough, a path in the folder. ``character``, and ``shot`` (from 1, the first
  that may recall it) can be given; ``id`` is made from the file's name.

Such images may have any size. A fitted image is saved under an id of its own, and the user's file stays as it is.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import Field, StringConstraints
from pydantic.dataclasses import dataclass as settings

from storymem.config import STRICT, ConfigError, build_settings
from storymem.io import FileError, naming_full_disk, read_json, write_atomically
from storymem.media.images import encode_png, is_image, read_image
from storymem.memory.keyframes import (
    ID_PATTERN,
    EmbedFrames,
    Keyframe,
    embed_in_batches,
    image_hash,
    reference_id,
    unused_id,
)
from storymem.memory.recall import ComingShot, RecallPolicy, SinkAndRecent
from storymem.weights import read_header

SCHEMA = 2  # in schema 1, shot and frame were counted from 0
MANIFEST = "memory.json"
IMAGES = "keyframes"

FitImage = Callable[[np.ndarray], np.ndarray]
"""An image, uint8 [H, W, 3] -> the same at the size of the film's shots."""


class MemoryBank:
    """The keyframes of one film, oldest first.

    Nothing leaves the bank when its capacity is exceeded: the capacity belongs to the recall policy, so that any shot
    can be regenerated. A new keyframe is compared with all that are known to its shot.

    Args:
        keyframes: the first content.
        policy: which keyframes a shot is given; sink and recent by default.
        made_with: identifies the networks behind embeddings and latents; saved with them.

    Attributes:
        edited: of a bank that was loaded, keyframes that the user has added or replaced: id -> what was done. The shot
            loop also lists here images of the user that no take has recalled.
    """

    def __init__(
        self, keyframes: Iterable[Keyframe] = (), *, policy: RecallPolicy | None = None, made_with: str | None = None
    ) -> None:
        self.policy: RecallPolicy = policy if policy is not None else SinkAndRecent()
        self.made_with = made_with
        self.edited: dict[str, str] = {}
        self._keyframes: dict[str, Keyframe] = {}
        self._written: dict[Path, Keyframe] = {}  # keyframes whose files hold exactly this, by the image's path
        self.add(keyframes)

    def __len__(self) -> int:
        return len(self._keyframes)

    def __iter__(self) -> Iterator[Keyframe]:
        return iter(self._keyframes.values())

    def __contains__(self, id: object) -> bool:
        return id in self._keyframes

    def __getitem__(self, id: str) -> Keyframe:
        return self._keyframes[id]

    @property
    def embeddings(self) -> np.ndarray:
        """float32 [M, D] in the bank's order; [0, 0] while the bank is empty."""
        return np.stack([keyframe.embedding for keyframe in self]) if self._keyframes else np.zeros((0, 0), np.float32)

    def add(self, keyframes: Iterable[Keyframe]) -> None:
        """Add keyframes as the newest. ``ValueError`` for an id that the bank has already."""
        for keyframe in keyframes:
            if keyframe.id in self:
                raise ValueError(f"keyframe {keyframe.id} is in the memory already: remove it first")
            self._keyframes[keyframe.id] = keyframe

    def replace(self, keyframe: Keyframe) -> None:
        """Put a keyframe in the place of the one with its id, for example with its latent. ``KeyError``."""
        if keyframe.id not in self:
            raise KeyError(keyframe.id)
        self._keyframes[keyframe.id] = keyframe

    def put_frames(self, shot: int, keyframes: Iterable[Keyframe]) -> list[Keyframe]:
        """Have ``keyframes`` in the place of the frames of shot ``shot`` (from 1), which are returned."""
        gone = [keyframe for keyframe in self if keyframe.shot == shot and keyframe.frame is not None]
        self._keyframes = {keyframe.id: keyframe for keyframe in with_frames(list(self), shot, keyframes)}
        return gone

    def known_to(self, shot: int | None) -> list[Keyframe]:
        """See :func:`known_to`."""
        return known_to(shot, self)

    def recall(self, shot: ComingShot | None = None) -> list[Keyframe]:
        """The keyframes that a shot is given, of those known to it: pinned ones, then the others, oldest first.

        The policy gets the pinned ones as the oldest, so that they are its sink. Those that it leaves out replace the
        oldest of its others.

        Raises:
            ValueError: if the policy breaks its contract; see :class:`RecallPolicy`.
        """
        shot = shot or ComingShot()
        known = self.known_to(shot.number)
        pinned = [keyframe for keyframe in known if keyframe.pinned][: self.policy.capacity]
        known = [*pinned, *(keyframe for keyframe in known if keyframe not in pinned)]
        recalled = self.policy.recall(known, shot)
        ids = {keyframe.id for keyframe in recalled}
        if len(recalled) > self.policy.capacity or [k for k in known if k.id in ids] != list(recalled):
            raise ValueError(
                f"{self.policy} recalled {[keyframe.id for keyframe in recalled]}: it must return at most "
                f"{self.policy.capacity} (its capacity) of the given keyframes, in their order, each once"
            )
        others = [keyframe for keyframe in recalled if keyframe not in pinned]
        return [*pinned, *others[max(0, len(pinned) + len(others) - self.policy.capacity) :]]

    def files(self) -> list[str]:
        """The files of the saved bank, relative to the film's folder, without ``memory.json``."""
        return [name for id in self._keyframes for name in keyframe_files(id)]

    def save(self, folder: str | Path, *, manifest: str | None = MANIFEST) -> None:
        """Write the bank into a film's folder. Files that are there already are not written again; none is deleted.

        Another image has another id in the same folder, so ``memory.json`` never names a file while that changes.

        Args:
            folder: the film's folder.
            manifest: another name for ``memory.json``, which then stays as it is; None: write the other files only.
        """
        from storymem.memory.tensors import tensors_of  # loads torch

        folder = Path(folder)
        with naming_full_disk(folder):
            (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for keyframe in self:
            image, tensors = (folder / name for name in keyframe_files(keyframe.id))
            if self._written.get(image) is keyframe and image.exists() and tensors.exists():
                continue
            if not holds_image(image, keyframe.sha256):
                write_atomically(image, encode_png(keyframe.image))
            _write_if_new(tensors, tensors_of(keyframe, self.made_with))
            self._written[image] = keyframe
        if manifest is not None:
            write_entries(folder / manifest, map(Entry.of, self))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        entries: Sequence[Entry] | None = None,
        embed: EmbedFrames | None = None,
        policy: RecallPolicy | None = None,
        fit: FitImage | None = None,
        made_with: str | None = None,
    ) -> MemoryBank:
        """Read what :meth:`save` wrote, edited by the user or not.

        Args:
            folder: the film's folder.
            entries: which keyframes; those of ``memory.json`` by default.
            embed: embeds images that were added or replaced; without it they are an error.
            policy: as in the constructor.
            fit: brings such images to the size of the shots.
            made_with: as in the constructor; what was made with other networks is embedded again and loses its latent.
                None takes everything as it is.

        Raises:
            ValueError: naming the file that is missing, damaged or not understood.
        """
        from storymem.memory.tensors import EMBED_AGAIN  # loads torch

        folder = Path(folder)
        if entries is None and (entries := read_entries(folder)) is None:
            raise FileError(f"{folder / MANIFEST} does not exist: there is no saved memory in this folder")
        taken = {entry.id for entry in entries} | ids_on_disk(folder)
        reader = _Reader(folder=folder, embed=embed, fit=fit, made_with=made_with, taken=taken)
        bank = cls([reader.keyframe(entry) for entry in entries], policy=policy, made_with=made_with)
        sizes = Counter(len(keyframe.embedding) for keyframe in bank)
        for keyframe in bank:
            if len(keyframe.embedding) != (usual := sizes.most_common(1)[0][0]):
                raise FileError(
                    f"{folder / keyframe_files(keyframe.id)[1]} holds an embedding of {len(keyframe.embedding)} "
                    f"numbers, others have {usual}: {EMBED_AGAIN}"
                )
        bank.edited = reader.edited
        return bank


M = TypeVar("M", bound="Keyframe | Entry")


def known_to(shot: int | None, members: Iterable[M]) -> list[M]:
    """What shot ``shot`` (from 1) may recall: frames of shots before it, and images that are for no later shot.

    All of ``members`` for None.
    """
    return [
        one
        for one in members
        if shot is None or one.shot is None or one.shot < shot or (one.shot == shot and one.frame is None)
    ]


def with_frames(members: Iterable[M], shot: int, frames: Iterable[M]) -> list[M]:
    """``members`` with ``frames`` in the place of the frames of ``shot``: before all that belongs to later shots."""
    others = [one for one in members if one.shot != shot or one.frame is None]
    end = next((n for n, one in enumerate(others) if one.shot is not None and one.shot > shot), len(others))
    return [*others[:end], *frames, *others[end:]]


def keyframe_files(id: str) -> tuple[str, str]:
    """The files of a keyframe's image and tensors, relative to the film's folder."""
    return f"{IMAGES}/{id}.png", f"{IMAGES}/{id}.safetensors"


def ids_on_disk(folder: Path) -> set[str]:
    """Ids that files in ``keyframes/`` have, in use or not."""
    return {path.stem for path in (folder / IMAGES).glob("*")}


Text = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$")]
Place = Annotated[int, Field(ge=0, le=10**6)]


@settings(frozen=True, kw_only=True, config=STRICT)
class KeyframeRecord:
    """A keyframe that a take adds to the memory; see :class:`Keyframe`.

    Args:
        sha256: of its image; see :func:`storymem.memory.keyframes.image_hash`.
    """

    id: Annotated[str, StringConstraints(pattern=f"^{ID_PATTERN}$", max_length=100)]
    sha256: Text | None = None
    frame: Place | None = None
    character: Text | None = None
    quality: float | None = None
    similarity: float | None = None
    pinned: bool = False

    @classmethod
    def of(cls, keyframe: Keyframe | Entry) -> Self:
        """The record of a keyframe, under its own name."""
        return cls(**{name: getattr(keyframe, name) for name in cls.__dataclass_fields__ if name != "image"})


@settings(frozen=True, kw_only=True, config=STRICT)
class Entry(KeyframeRecord):
    """A keyframe in ``memory.json``; see the head of this file. By default its image has its own name."""

    image: Text = ""
    shot: Place | None = None
    source: Text | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", self.image or keyframe_files(self.id)[0])

    @property
    def is_frame(self) -> bool:
        """Whether it is a frame of a shot, under its own name."""
        return self.frame is not None and self.image == keyframe_files(self.id)[0]


def read_entries(folder: Path) -> list[Entry] | None:
    """Entries of ``memory.json``, oldest first; None if there is no such file. ``FileError`` for what is not valid."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("keyframes"), list):
            raise FileError(f'{path} must hold {{"schema": {SCHEMA}, "keyframes": [...]}}')
    except FileError as error:
        cure = "put it back from a copy, or delete it: storymem generate writes it from the takes, without your changes"
        raise FileError(f"{error}; {cure}") from None
    if manifest.get("schema") not in (1, SCHEMA):
        schema = repr(manifest.get("schema"))[:60]
        raise FileError(f"{path} has schema {schema}, this version reads 1 and {SCHEMA}: update storymem")
    named = [raw["id"] for raw in manifest["keyframes"] if isinstance(raw, dict) and isinstance(raw.get("id"), str)]
    taken = {*named, *ids_on_disk(folder)}
    entries = []
    for number, raw in enumerate(manifest["keyframes"], start=1):
        entries.append(_entry(raw, f"{path}, keyframe {number}", taken, counts_from=manifest["schema"] - 1))
        taken.add(entries[-1].id)
    if twice := sorted(id for id, times in Counter(entry.id for entry in entries).items() if times > 1):
        raise FileError(f"{path}: ids {twice} are used more than once: give each keyframe its own")
    return entries


def _entry(raw: Any, where: str, taken: set[str], *, counts_from: int) -> Entry:
    given = {name: value for name, value in raw.items() if value is not None} if isinstance(raw, dict) else {}
    if not isinstance(given.get("id", given.get("image")), str):
        raise FileError(f"{where}: must be an object with at least an id or an image, is {repr(raw)[:60]}")
    if "id" not in given:
        given["id"] = reference_id(Path(given["image"]).stem, taken)
    try:
        entry = build_settings(Entry, given)
    except ConfigError as error:
        raise FileError(f"{where}: {'; '.join(line.strip() for line in str(error).splitlines()[1:])}") from None
    places = {name: getattr(entry, name) for name in ("shot", "frame")}
    return (
        entry if counts_from else replace(entry, **{n: place + 1 for n, place in places.items() if place is not None})
    )


@dataclass(kw_only=True)
class _Reader:
    """Reads keyframes; see :meth:`MemoryBank.load`."""

    folder: Path
    embed: EmbedFrames | None
    fit: FitImage | None
    made_with: str | None
    taken: set[str]
    edited: dict[str, str] = field(default_factory=dict)

    def keyframe(self, entry: Entry) -> Keyframe:
        from storymem.memory.tensors import read_tensors  # loads torch

        path = self.folder / entry.image
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            raise FileError(f"{self.folder / MANIFEST}: {path} lies outside the film's folder: copy the image into it")
        try:
            image = read_image(path)
        except FileNotFoundError:
            raise FileError(f"{path} is missing: put it back, or delete its entry in {MANIFEST}") from None
        tensors: dict[str, Any] = {}
        if entry.sha256 == image_hash(image):
            tensors = read_tensors(self.folder / keyframe_files(entry.id)[1], self.made_with)
        else:
            entry, image = self._edited(entry, path, image)
        about = {name: value for name, value in vars(entry).items() if name not in ("image", "sha256")}
        embedding = tensors["embedding"].numpy() if tensors else self._embedding(path, image)
        return Keyframe(**about, image=image, embedding=embedding, latent=tensors.get("latent"))

    def _edited(self, entry: Entry, path: Path, image: np.ndarray) -> tuple[Entry, np.ndarray]:
        """The entry and the fitted image of a keyframe that the user added or whose image the user replaced."""
        done = f"is not the image that {MANIFEST} was written with" if entry.sha256 else f"was added to {MANIFEST}"
        id, fitted = entry.id, image if self.fit is None else self.fit(image)
        if fitted.shape != image.shape:
            done += f", fitted from {image.shape[1]}x{image.shape[0]} to {fitted.shape[1]}x{fitted.shape[0]}"
            if path == self.folder / keyframe_files(id)[0]:
                id = unused_id(id, self.taken)
        self.taken.add(id)
        self.edited[id] = f"{entry.image} {done}"
        return replace(entry, id=id, source=None, quality=None, similarity=None), fitted

    def _embedding(self, path: Path, image: np.ndarray) -> np.ndarray:
        if self.embed is None:
            raise FileError(
                f"{path} was edited (its sha256 in {MANIFEST} is missing or differs) or embedded by other networks, "
                "and there is no encoder to embed it: load with embed=..., or put the saved image back"
            )
        return embed_in_batches(image[None], self.embed)[0]


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write a ``memory.json`` of ``entries``."""
    content = {"schema": SCHEMA, "keyframes": [vars(entry) for entry in entries]}
    _write_if_new(path, f"{json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)}\n".encode())


def _write_if_new(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def intact(path: Path) -> bool:
    """Whether a file of the bank, an image or tensors, is there and whole by its header and checksums."""
    try:
        return bool(read_header(path).shapes) if path.suffix == ".safetensors" else is_image(path)
    except (FileError, FileNotFoundError):
        return False


def holds_image(path: Path, digest: str | None) -> bool:
    """Whether a file is an image with this :func:`image_hash`."""
    try:
        return image_hash(read_image(path)) == digest
    except (ValueError, FileNotFoundError):
        return False
