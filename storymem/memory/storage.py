"""A memory bank on disk, which survives both ``kill -9`` and its owner's text editor.

    memory.json                 {"schema": 1, "keyframes": [...]}, oldest first
    keyframes/<id>.png          the picture, lossless
    keyframes/<id>.safetensors  its embedding, and its latent once there is one

Every file is written to a temporary name and renamed; a keyframe's own files come first and ``memory.json``
last, and what is on disk already is not written again. Whenever the process dies, ``memory.json`` names only
complete files. An embedding and a latent say with which settings they were made; where these have changed, they are
made anew.

``memory.json`` may be edited while no program uses the folder:

- delete an entry, or change the order: the memory is then exactly that. Files that are no longer named stay,
  so that the entry can be put back.
- replace a picture: its ``sha256`` no longer fits, so its embedding is made anew and its latent, quality,
  similarity and source are dropped. The same happens where ``sha256`` is missing.
- add a picture: ``{"image": "tam.jpg"}`` is enough, a path relative to the folder and in it. ``id`` is then made
  from the file's name; ``character`` and ``shot`` can be given.

Pictures by hand may have any size; they are fitted when they are read. A fitted picture is saved under an id of its
own, and the picture itself stays as it is.

``sha256`` is that of the pixels, not of the file: a PNG compressed better is still the same picture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from storymem.config import nearest
from storymem.io import FileError, check_finite, check_regular, naming_full_disk, read_json, write_atomically
from storymem.media.images import encode_png, read_image
from storymem.memory.keyframes import (
    ID_PATTERN,
    EmbedFrames,
    Keyframe,
    embed_in_batches,
    picture_hash,
    reference_id,
    unused_id,
)

SCHEMA = 1
MANIFEST = "memory.json"
PICTURES = "keyframes"

FitImage = Callable[[np.ndarray], np.ndarray]
"""A picture, uint8 [H, W, 3] -> the same at the size of the film's shots."""

_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "image": (str,),
    "sha256": (str,),
    "shot": (int,),
    "frame": (int,),
    "source": (str,),
    "character": (str,),
    "quality": (int, float),
    "similarity": (int, float),
}
_PROVENANCE = ("shot", "frame", "source", "character")
_VERDICTS = ("quality", "similarity")
_LONGEST = 1000  # characters of a text in memory.json
_LONGEST_ID = 100
_MOST_SHOTS = 10**6
_NOTE = "storymem"  # one, for the order of several is left to chance: sha256 of the tensors, made_with
_REMEDY = f"delete the sha256 of its entry in {MANIFEST}, and the picture is embedded anew"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a saved bank is read.

    Args:
        embed: embeds pictures that were added or replaced by hand; without it they are an error.
        fit: brings such pictures to the size of the shots; None leaves them as they are.
        made_with: what tells the encoders' settings from others; embeddings and latents made with others are made
            anew. None takes them as they are.
        unmarked: with what those were made that do not say it.
    """

    embed: EmbedFrames | None = None
    fit: FitImage | None = None
    made_with: str | None = None
    unmarked: str | None = None


def write_keyframes(
    folder: Path, keyframes: list[Keyframe], *, written: dict[str, Keyframe], manifest: str, made_with: str | None
) -> None:
    """Write a bank's content; no file is deleted.

    Args:
        folder: the film's folder.
        keyframes: the bank's.
        written: those of which the files are known to hold exactly this; brought up to date.
        manifest: the name that ``memory.json`` gets.
        made_with: see `Reading`.
    """
    with naming_full_disk(folder):
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    known = {entry["id"]: entry for entry in read_entries(folder)}
    changed = [keyframe for keyframe in keyframes if not _is_written(folder, keyframe, written)]
    missing = {k.id for k in changed if not _has_picture(folder, _entry(k), known.get(k.id))}
    # An id that comes back with another picture: take it out of the manifest before its file changes.
    changing = {id for id in missing & known.keys() if known[id]["image"] == png_name(id)}
    if changing:
        _write_manifest(folder / MANIFEST, [entry for entry in known.values() if entry["id"] not in changing])
    for keyframe in changed:
        if keyframe.id in missing:
            write_atomically(folder / png_name(keyframe.id), encode_png(keyframe.image))
        _write_if_new(folder / tensors_name(keyframe.id), _tensors(keyframe, made_with))
        written[keyframe.id] = keyframe
    _write_manifest(folder / manifest, [_entry(keyframe) for keyframe in keyframes])


def remove_keyframes(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Delete the files of these entries, except of pictures that a person added or changed."""
    for entry in entries:
        ours = entry.get("frame") is not None or entry.get("source") is not None
        if ours and "sha256" in entry and _has_picture(folder, {**entry, "image": png_name(entry["id"])}, None):
            for name in keyframe_files(entry["id"]):
                (folder / name).unlink(missing_ok=True)


def read_keyframes(folder: Path, reading: Reading) -> tuple[list[Keyframe], dict[str, str]]:
    """Read a bank's content.

    Returns:
        Keyframes, and of those that were added or replaced by hand: id -> what was done, for people.

    Raises:
        ValueError: naming any file that is missing, corrupt or not understood.
    """
    if not (folder / MANIFEST).exists():
        raise FileError(f"{folder / MANIFEST} does not exist: there is no saved memory in this folder")
    entries = read_entries(folder)
    taken = {entry["id"] for entry in entries} | ids_on_disk(folder)
    keyframes: list[Keyframe] = []
    by_hand: dict[str, str] = {}
    for entry in entries:
        keyframe, done = _read_keyframe(folder, entry, reading, taken)
        taken.add(keyframe.id)
        keyframes.append(keyframe)
        if done:
            by_hand[keyframe.id] = done
    _check_sizes(folder, keyframes)
    return keyframes, by_hand


def ids_on_disk(folder: Path) -> set[str]:
    """Ids after which files in ``keyframes/`` are named, in use or not."""
    return {path.stem for path in (folder / PICTURES).glob("*")}


def _read_keyframe(
    folder: Path, entry: dict[str, Any], reading: Reading, taken: Container[str]
) -> tuple[Keyframe, str | None]:
    """A keyframe, and what was done to it by hand."""
    path = folder / entry["image"]
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise FileError(f"{folder / MANIFEST}: {path} lies outside the film's folder: copy the picture into it")
    image = _read_picture(path)
    provenance = {name: entry.get(name) for name in _PROVENANCE}
    if entry.get("sha256") == picture_hash(image):
        tensors = _read_tensors(folder / tensors_name(entry["id"]), reading)
        embedding = tensors["embedding"].numpy() if tensors else _embedded(path, image, reading)
        verdicts = {name: entry.get(name) for name in _VERDICTS}
        latent = tensors.get("latent")
        return Keyframe(id=entry["id"], image=image, embedding=embedding, latent=latent, **provenance, **verdicts), None
    done = f"is not the picture that {MANIFEST} was written with" if "sha256" in entry else f"was added to {MANIFEST}"
    id, fitted = entry["id"], image
    if reading.fit is not None and (fitted := reading.fit(image)).shape != image.shape:
        done += f", fitted from {image.shape[1]}x{image.shape[0]} to {fitted.shape[1]}x{fitted.shape[0]}"
        if path == folder / png_name(id):  # the fitted picture goes into a file of its own
            id = unused_id(id, taken)
    embedding = _embedded(path, fitted, reading)
    provenance["source"] = None  # it is no longer what the story named
    return Keyframe(id=id, image=fitted, embedding=embedding, **provenance), f"{entry['image']} {done}"


def _embedded(path: Path, image: np.ndarray, reading: Reading) -> np.ndarray:
    if reading.embed is None:
        raise FileError(
            f"{path} was added or replaced by hand (its sha256 in {MANIFEST} is missing or differs) or made with other "
            "settings, and there is no encoder to embed it: load with embed=..., or put the saved picture back"
        )
    return embed_in_batches(image[None], reading.embed)[0]


def _check_sizes(folder: Path, keyframes: list[Keyframe]) -> None:
    sizes = Counter(len(keyframe.embedding) for keyframe in keyframes)
    for keyframe in keyframes:
        if len(keyframe.embedding) != (usual := sizes.most_common(1)[0][0]):
            raise FileError(
                f"{folder / tensors_name(keyframe.id)} holds an embedding of {len(keyframe.embedding)} numbers, others "
                f"have {usual}: {_REMEDY}"
            )


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """Entries of ``memory.json``, checked, each with its ``id`` and ``image``; none if there is no such file."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        manifest = read_json(path)
    except FileError as error:
        raise FileError(
            f"{error}; put it back from a copy, or delete it and make all shots again with resume=from_shot:1"
        ) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("keyframes"), list):
        raise FileError(f'{path} must hold {{"schema": {SCHEMA}, "keyframes": [...]}}')
    if manifest.get("schema") != SCHEMA:
        schema = repr(manifest.get("schema"))[:60]
        raise FileError(f"{path} has schema {schema}, this version reads {SCHEMA}: update storymem")
    entries = [
        _checked(entry, f"{path}, keyframe {number}") for number, entry in enumerate(manifest["keyframes"], start=1)
    ]
    taken = {entry["id"] for entry in entries if "id" in entry}
    for entry in entries:
        if "id" not in entry:
            entry["id"] = reference_id(Path(entry["image"]).stem, taken)
            taken.add(entry["id"])
        entry.setdefault("image", png_name(entry["id"]))
    twice = sorted(id for id, count in Counter(entry["id"] for entry in entries).items() if count > 1)
    if twice:
        raise FileError(f"{path}: ids {twice} are used more than once: give each keyframe its own")
    return entries


def _checked(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise FileError(f"{where}: must be an object with at least 'id' or 'image', is {_shown(entry)}")
    for name, value in entry.items():
        if name not in _TYPES:
            raise FileError(f"{where}: unknown key {_shown(name)}{nearest(name, _TYPES)}")
        if value is not None and (not isinstance(value, _TYPES[name]) or isinstance(value, bool)):
            expected = " or ".join(kind.__name__ for kind in _TYPES[name])
            raise FileError(f"{where}: {name} must be {expected} or null, is {_shown(value)}")
        if isinstance(value, str) and ("\0" in value or len(value) > _LONGEST):
            raise FileError(f"{where}: {name} must be text of at most {_LONGEST} characters, is {_shown(value)}")
        if isinstance(value, int) and name in ("shot", "frame") and not 0 <= value <= _MOST_SHOTS:
            raise FileError(f"{where}: {name} must be from 0 to {_MOST_SHOTS}, is {_shown(value)}")
    given = {name: value for name, value in entry.items() if value is not None}
    if "id" not in given and "image" not in given:
        raise FileError(f"{where}: needs an 'id' or an 'image'")
    id = given.get("id", "x")
    if len(id) > _LONGEST_ID or not ID_PATTERN.fullmatch(id):
        raise FileError(
            f"{where}: id {_shown(id)}: use letters, digits, '_', '-' and '.' only, and at most {_LONGEST_ID} of them"
        )
    return given


def _entry(keyframe: Keyframe) -> dict[str, Any]:
    return {
        "id": keyframe.id,
        "image": png_name(keyframe.id),
        "sha256": keyframe.sha256,
        **{name: getattr(keyframe, name) for name in _PROVENANCE + _VERDICTS},
    }


def png_name(id: str) -> str:
    """The file of a keyframe's picture, relative to the film's folder."""
    return f"{PICTURES}/{id}.png"


def tensors_name(id: str) -> str:
    """The file of a keyframe's embedding and latent, relative to the film's folder."""
    return f"{PICTURES}/{id}.safetensors"


def keyframe_files(id: str) -> list[str]:
    """All files of a keyframe, relative to the film's folder."""
    return [png_name(id), tensors_name(id)]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_manifest(path: Path, entries: list[dict[str, Any]]) -> None:
    text = json.dumps({"schema": SCHEMA, "keyframes": entries}, indent=2, ensure_ascii=False, allow_nan=False)
    _write_if_new(path, f"{text}\n".encode())


def _write_if_new(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def _is_written(folder: Path, keyframe: Keyframe, written: dict[str, Keyframe]) -> bool:
    exist = all((folder / name).exists() for name in keyframe_files(keyframe.id))
    return exist and written.get(keyframe.id) is keyframe


def _has_picture(folder: Path, entry: dict[str, Any], known: dict[str, Any] | None) -> bool:
    """Whether the entry's PNG is on disk; the manifest's word is taken for it, else the file is read."""
    path = folder / entry["image"]
    if not path.exists():
        return False
    if known is not None and known["image"] == entry["image"] and known.get("sha256") == entry["sha256"]:
        return True
    try:
        return picture_hash(read_image(path)) == entry["sha256"]
    except ValueError:
        return False


def _read_picture(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except FileNotFoundError:
        raise FileError(f"{path} is missing: put it back, or delete its entry in {MANIFEST}") from None


def _tensors(keyframe: Keyframe, made_with: str | None) -> bytes:
    tensors = {"embedding": torch.from_numpy(keyframe.embedding)}
    if keyframe.latent is not None:
        tensors["latent"] = keyframe.latent.detach().cpu().contiguous()
    return to_safetensors(tensors, {_NOTE: f"{_tensors_hash(tensors)} {made_with or ''}"})


def _tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    contents = (tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _read_tensors(path: Path, reading: Reading) -> dict[str, torch.Tensor]:
    """Embedding and latent; none if they were made with other settings."""
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            digest, _, made_with = (file.metadata() or {}).get(_NOTE, "").partition(" ")
            if reading.made_with not in (None, made_with or reading.unmarked):
                return {}
            tensors = {name: file.get_tensor(name) for name in ("embedding", "latent") if name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileError(f"{path} is missing: put it back, or {_REMEDY}") from None
    except SafetensorError as error:
        raise FileError(f"{path} is corrupt ({error}): {_REMEDY}") from None
    if digest not in ("", _tensors_hash(tensors)):
        raise FileError(f"{path} is damaged: {_REMEDY}")
    embedding, latent = tensors.get("embedding"), tensors.get("latent")
    if embedding is None or embedding.ndim != 1 or embedding.dtype != torch.float32:
        raise FileError(f"{path} holds no embedding: {_REMEDY}")
    if latent is not None and (latent.ndim != 4 or not latent.is_floating_point()):
        raise FileError(f"{path} holds a latent of another shape, {list(latent.shape)}: {_REMEDY}")
    for name, tensor in tensors.items():
        check_finite(tensor, f"the {name} in {path}", _REMEDY)
    return tensors
