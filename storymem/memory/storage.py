"""A memory bank on disk, which survives both ``kill -9`` and its owner's text editor.

    memory.json                 {"schema": 1, "keyframes": [...]}, oldest first
    keyframes/<id>.png          the picture, lossless
    keyframes/<id>.safetensors  its embedding, and its latent once there is one

Every file is written to a temporary name and renamed; a keyframe's own files come first and ``memory.json``
last, and what is on disk already is not written again. Whenever the process dies, ``memory.json`` names only
complete files.

``memory.json`` may be edited while no program uses the folder:

- delete an entry, or change the order: the memory is then exactly that. Files that are no longer named stay,
  so that the entry can be put back.
- replace a picture: its ``sha256`` no longer fits, so its embedding is made anew and its latent, quality and
  similarity are dropped. The same happens where ``sha256`` is missing.
- add a picture: ``{"image": "tam.jpg"}`` is enough, a path relative to the folder. ``id`` is then made from
  the file's name; ``character`` and ``shot`` can be given.

``sha256`` is that of the pixels, not of the file: a PNG compressed better is still the same picture.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from storymem.images import encode_png, read_image
from storymem.io import write_atomically
from storymem.memory.keyframes import ID_PATTERN, EmbedFrames, Keyframe, embed_in_batches, reference_id

SCHEMA = 1
MANIFEST = "memory.json"
PICTURES = "keyframes"

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


def write_keyframes(folder: Path, keyframes: list[Keyframe]) -> None:
    """Write a bank's content; files of keyframes that it no longer holds are removed at the end."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    entries = [_entry(keyframe) for keyframe in keyframes]
    listed = _read_manifest(folder) if (folder / MANIFEST).exists() else []
    known = {entry["id"]: entry for entry in listed}
    missing = {entry["id"] for entry in entries if not _has_picture(folder, entry, known.get(entry["id"]))}
    # An id that comes back with another picture: take it out of the manifest before its file changes.
    changing = {id for id in missing & known.keys() if known[id]["image"] == _png_name(id)}
    if changing:
        _write_manifest(folder, [entry for entry in listed if entry["id"] not in changing])
    for keyframe in keyframes:
        if keyframe.id in missing:
            write_atomically(folder / _png_name(keyframe.id), encode_png(keyframe.image))
        _write_if_new(_tensors_path(folder, keyframe.id), _tensors(keyframe))
    _write_manifest(folder, entries)
    for id in known.keys() - {keyframe.id for keyframe in keyframes}:
        (folder / _png_name(id)).unlink(missing_ok=True)
        _tensors_path(folder, id).unlink(missing_ok=True)


def read_keyframes(folder: Path, embed: EmbedFrames | None) -> list[Keyframe]:
    """Read a bank's content; ``ValueError`` naming any file that is missing, corrupt or not understood."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder / MANIFEST} does not exist: there is no saved memory in this folder")
    return [_read_keyframe(folder, entry, embed) for entry in _read_manifest(folder)]


def _read_keyframe(folder: Path, entry: dict[str, Any], embed: EmbedFrames | None) -> Keyframe:
    path = folder / entry["image"]
    image = _read_picture(path)
    provenance = {name: entry.get(name) for name in _PROVENANCE}
    if entry.get("sha256") == _digest(image):
        tensors = _read_tensors(_tensors_path(folder, entry["id"]))
        verdicts = {name: entry.get(name) for name in _VERDICTS}
        return Keyframe(
            id=entry["id"],
            image=image,
            embedding=tensors["embedding"].numpy(),
            latent=tensors.get("latent"),
            **provenance,
            **verdicts,
        )
    if embed is None:
        raise ValueError(
            f"{path} was added or replaced by hand (its sha256 in {MANIFEST} is missing or differs), "
            "and there is no encoder to embed it: load with embed=..., or put the saved picture back"
        )
    return Keyframe(id=entry["id"], image=image, embedding=embed_in_batches(image[None], embed)[0], **provenance)


def _read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Entries of ``memory.json``, checked, each with its ``id`` and ``image``."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("keyframes"), list):
        raise ValueError(f'{path} must hold {{"schema": {SCHEMA}, "keyframes": [...]}}')
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}: update storymem")
    entries = [
        _checked(entry, f"{path}, keyframe {number}") for number, entry in enumerate(manifest["keyframes"], start=1)
    ]
    taken = {entry["id"] for entry in entries if "id" in entry}
    for entry in entries:
        if "id" not in entry:
            entry["id"] = reference_id(Path(entry["image"]).stem, taken)
            taken.add(entry["id"])
        entry.setdefault("image", _png_name(entry["id"]))
    twice = sorted(id for id, count in Counter(entry["id"] for entry in entries).items() if count > 1)
    if twice:
        raise ValueError(f"{path}: ids {twice} are used more than once: give each keyframe its own")
    return entries


def _checked(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object with at least 'id' or 'image', is {entry!r}")
    for name, value in entry.items():
        if name not in _TYPES:
            near = difflib.get_close_matches(name, _TYPES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_TYPES)}"
            raise ValueError(f"{where}: unknown key {name!r}; {hint}")
        if value is not None and (not isinstance(value, _TYPES[name]) or isinstance(value, bool)):
            expected = " or ".join(kind.__name__ for kind in _TYPES[name])
            raise ValueError(f"{where}: {name} must be {expected} or null, is {value!r}")
    given = {name: value for name, value in entry.items() if value is not None}
    if "id" not in given and "image" not in given:
        raise ValueError(f"{where}: needs an 'id' or an 'image'")
    if "id" in given and not ID_PATTERN.fullmatch(given["id"]):
        raise ValueError(f"{where}: id {given['id']!r}: use letters, digits, '_', '-' and '.' only")
    return given


def _entry(keyframe: Keyframe) -> dict[str, Any]:
    return {
        "id": keyframe.id,
        "image": _png_name(keyframe.id),
        "sha256": _digest(keyframe.image),
        **{name: getattr(keyframe, name) for name in _PROVENANCE + _VERDICTS},
    }


def _png_name(id: str) -> str:
    return f"{PICTURES}/{id}.png"


def _write_manifest(folder: Path, entries: list[dict[str, Any]]) -> None:
    text = json.dumps({"schema": SCHEMA, "keyframes": entries}, indent=2, ensure_ascii=False) + "\n"
    _write_if_new(folder / MANIFEST, text.encode())


def _write_if_new(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def _has_picture(folder: Path, entry: dict[str, Any], known: dict[str, Any] | None) -> bool:
    """Whether the entry's PNG is on disk; the manifest's word is taken for it, else the file is read."""
    path = folder / entry["image"]
    if not path.exists():
        return False
    if known is not None and known["image"] == entry["image"] and known.get("sha256") == entry["sha256"]:
        return True
    try:
        return _digest(read_image(path)) == entry["sha256"]
    except ValueError:
        return False


def _digest(image: np.ndarray) -> str:
    """sha256 of a picture's size and RGB values."""
    return hashlib.sha256(f"{image.shape[0]}x{image.shape[1]} ".encode() + image.tobytes()).hexdigest()


def _read_picture(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: put it back, or delete its entry in {MANIFEST}") from error


def _tensors_path(folder: Path, id: str) -> Path:
    return folder / PICTURES / f"{id}.safetensors"


def _tensors(keyframe: Keyframe) -> bytes:
    tensors = {"embedding": torch.from_numpy(keyframe.embedding)}
    if keyframe.latent is not None:
        tensors["latent"] = keyframe.latent.detach().cpu().contiguous()
    return to_safetensors(tensors)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    remedy = f"delete the sha256 of its entry in {MANIFEST}, and the picture is embedded anew"
    try:
        tensors = from_safetensors(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: put it back, or {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt ({error}): {remedy}") from error
    if "embedding" not in tensors:
        raise ValueError(f"{path} holds no embedding: {remedy}")
    return tensors
