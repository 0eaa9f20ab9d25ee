"""The cache of a training set: the outputs of frozen networks for its clips, computed once.

A cache is a folder with ``cache.json``, an index (a line of JSON per clip) and safetensors shards. It carries a
fingerprint of the VAE, the text encoder and the size of the clips; another fingerprint is another folder, so latents
of different networks are never mixed. Stored of a clip: latents of the whole clip, of each candidate keyframe encoded
alone, and of the blank-padded videos that condition it, and its mask if it has one; of a caption: its prompt embeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from storymem.data.manifest import NO_LIMIT, Manifest, read_checked, write_checked
from storymem.data.settings import DataSettings
from storymem.io import (
    FileError,
    check_regular,
    hash_file,
    hash_json,
    parse_json,
    read_bytes,
    text_lines,
    write_atomically,
)
from storymem.wan.places import component_path
from storymem.wan.settings import ModelSettings
from storymem.wan.spec import SPECS, ModelSpec
from storymem.weights import sample_hash

Split = Literal["train", "valid"]
CACHE_FORMAT = 3
OPEN_SHARDS = 64  # open files must not grow with the number of clips
_AGAIN = "run prepare_data again with the same settings, which recomputes it"


def cache_fingerprint(model: ModelSettings, data: DataSettings) -> dict[str, str]:
    """What a cache depends on: ``vae``, ``text_encoder`` and ``size``.

    Published weights count by their files, random ones by their configuration and seed. The dtype in which networks
    run does not count: it changes latents by rounding only.

    Raises:
        MissingWeights: if the model's weights are not on this machine.
    """
    network = model.network
    if model.weights is None:
        vae = hash_json({"config": network.vae, "seed": model.seed})[:12]
        text = hash_json({"config": network.text_encoder, "seed": model.seed})[:12]
    else:
        vae = sample_hash(component_path(model, "vae"))
        text = sample_hash(*(component_path(model, name) for name in ("text_encoder", "tokenizer")))
    return {
        "vae": vae,
        "text_encoder": f"{text}, {network.text_tokens} tokens",
        "size": ", ".join(sorted(str(bucket) for bucket in data.buckets)) + f" at {data.fps:g} fps",
    }


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedClip:
    """What a cache knows of one clip without reading tensors.

    Args:
        id: unique in its training set, and the same whenever the set is prepared.
        caption: the text it is trained with.
        group: clips of one group are alike; one gives memory to another.
        split: of the whole group; valid groups are never trained on.
        bucket: (frames F = 4n + 1, height, width) in pixels.
        keyframes: K >= 1, the number of its candidate keyframes.
        shard: the file of its tensors.
        mask: whether it has one.
    """

    id: str
    caption: str
    group: int
    split: Split
    bucket: tuple[int, int, int]
    keyframes: int
    shard: str
    mask: bool


class LatentCache:
    """A finished cache, read clip by clip; by several threads if wanted.

    All tensors come out as float32 on the CPU. Letters: T = (F - 1) / 4 + 1 latent frames, h and w the latents'
    height and width, L text tokens of width D.

    Attributes:
        folder: of the cache.
        fingerprint: what it was made with, see :func:`cache_fingerprint`.
        clips: all clips, ordered by id.
        spec: the base model whose VAE made the latents.
        given_kinds: the numbers of first frames, beside 0, for which :meth:`given` has an answer.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], clips: tuple[CachedClip, ...]) -> None:
        self.folder, self.clips = folder, clips
        self.fingerprint: dict[str, str] = dict(description["fingerprint"])
        self.given_kinds: tuple[int, ...] = tuple(description["given"])
        self.spec: ModelSpec = next(spec for spec in SPECS if spec.name == description["base"])
        self._text_tokens: int = description["text_tokens"]
        self._shared: dict[str, str] = description["shared"]
        self._hashes: dict[str, str] = {shard: sha256 for shard, (_, sha256) in description["shards"].items()}
        self._intact: set[str] = set()
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: Mapping[str, str] | None = None) -> LatentCache:
        """Open a cache, or the one in the output folder of ``prepare_data`` that fits.

        Args:
            folder: holds ``cache.json``; or ``cache/<fingerprint>/cache.json``, one or several.
            fingerprint: what the cache must have been made with, from :func:`cache_fingerprint`; None: anything.

        Raises:
            ValueError: if there is no finished cache; if another VAE, text encoder or size made it, with the
                differences; if there are several and no fingerprint chooses one; or, naming the file, if anything is
                missing or damaged (the content of a shard is compared when it is first read).
        """
        found = {path.parent: _read_description(path) for path in _descriptions(Path(folder))}
        if not found:
            raise ValueError(
                f"there is no finished cache in {folder}: make it with storymem prepare videos=FOLDER output={folder}"
            )
        differing: dict[Path, list[str]] = {}
        for path, description in found.items():
            for name, value in (fingerprint or {}).items():
                if (has := description["fingerprint"].get(name, "unknown")) != value:
                    line = f"  {path}: another {name.replace('_', ' ')} ({has}, not {value})"
                    differing.setdefault(path, []).append(line)
        fitting = [path for path in found if path not in differing]
        if not fitting:
            lines = "\n".join(line for lines in differing.values() for line in lines)
            raise ValueError(
                f"no cache in {folder} was made with what is to be trained:\n{lines}\nRun prepare_data with the model "
                "and data of the training, which makes a new cache beside the old one"
            )
        if len(fitting) > 1:
            names = ", ".join(path.name for path in fitting)
            raise ValueError(f"{folder} holds several caches: name one of {names}")
        description = found[fitting[0]]
        clips = _read_index(fitting[0], description)
        _check_complete(fitting[0], description, clips)
        return cls(fitting[0], description, clips)

    def __len__(self) -> int:
        return len(self.clips)

    def video(self, index: int) -> Tensor:
        """Normalised latents of clip ``index``, [z, T, h, w]."""
        return self._of_clip(index, "video")

    def keyframes(self, index: int) -> Tensor:
        """Latents of its candidate keyframes, each encoded alone, in the clip's order: [K, z, 1, h, w]."""
        return self._of_clip(index, "keyframes")

    def given(self, index: int, frames: int) -> Tensor:
        """Latents of the blank-padded video that conditions it, [z, T, h, w].

        Args:
            index: the clip.
            frames: how many first frames of the clip that video shows: 0 (blank; one per bucket), 1 or 5.

        Raises:
            ValueError: if the cache was made without this kind.
        """
        if frames == 0:
            return self._shared_tensor(blank_key(self.clips[index].bucket), "blank")
        if frames not in self.given_kinds:
            kinds = sorted({*self.given_kinds, frames})
            raise ValueError(
                f"{self.folder} holds no conditioning latents of {frames} first frames: run prepare_data with "
                f"cache.given={kinds}"
            )
        return self._of_clip(index, f"given_{frames}")

    def mask(self, index: int) -> Tensor:
        """Where its subject is, [T, h, w] in 0..1; 0 everywhere if it has no mask."""
        clip = self.clips[index]
        if clip.mask:
            return self._of_clip(index, "mask")
        frames, height, width = clip.bucket
        return torch.zeros(self.spec.latent_frames(frames), *self.spec.latent_size(height, width))

    def text(self, index: int) -> Tensor:
        """Prompt embeds of its caption, [L, D], zeros after the caption's end, as the pipeline makes them."""
        return self._text(self.clips[index].caption)

    def empty_text(self) -> Tensor:
        """Prompt embeds of the empty text, [L, D], for text dropout."""
        return self._text("")

    def groups(self, split: Split) -> dict[int, list[int]]:
        """Group -> the indices of its clips, ascending, for the groups of one split."""
        members: dict[int, list[int]] = {}
        for index, clip in enumerate(self.clips):
            if clip.split == split:
                members.setdefault(clip.group, []).append(index)
        return members

    def cure(self, index: int) -> str:
        """What to do if tensors of clip ``index`` are not what they should be, for messages."""
        clip = self.clips[index]
        shards = (clip.shard, self._shared[text_key(clip.caption)], self._shared[blank_key(clip.bucket)])
        files = " and ".join(str(self._path(shard)) for shard in dict.fromkeys(shards))
        return f"delete {files}, and {_AGAIN}"

    def _text(self, caption: str) -> Tensor:
        rows = self._shared_tensor(text_key(caption), "embeds")
        return torch.cat([rows, rows.new_zeros(self._text_tokens - len(rows), rows.shape[1])])

    def _of_clip(self, index: int, name: str) -> Tensor:
        clip = self.clips[index]
        return self._opened(clip.shard).get_tensor(f"{clip.id}/{name}").float()

    def _shared_tensor(self, key: str, name: str) -> Tensor:
        return self._opened(self._shared[key]).get_tensor(f"{key}/{name}").float()

    def _open(self, shard: str) -> Any:
        """A shard, whose content is compared when it is opened for the first time."""
        path = self._path(shard)
        if shard not in self._intact:
            if not path.is_file():
                raise FileError(f"{path} is missing: {_AGAIN}")
            if hash_file(check_regular(path)) != self._hashes[shard]:
                raise FileError(f"{path} is damaged: its sha256 differs from the recorded one. Delete it and {_AGAIN}")
            self._intact.add(shard)
        return safe_open(path, framework="pt")

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.safetensors"


def blank_key(bucket: tuple[int, int, int]) -> str:
    """The key of a blank video: ``(17, 64, 96)`` -> ``"blank 17x64x96"``."""
    return "blank " + "x".join(map(str, bucket))


def text_key(caption: str) -> str:
    """The key of a caption's embeds."""
    return f"text {hashlib.sha256(caption.encode()).hexdigest()[:32]}"


def _descriptions(folder: Path) -> list[Path]:
    if (folder / "cache.json").is_file():
        return [folder / "cache.json"]
    return sorted(folder.glob("*/cache.json")) or sorted(folder.glob("cache/*/cache.json"))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = read_checked(path)
    except FileError as error:
        raise FileError(f"{error}: {_AGAIN}") from None
    if description["format"] != CACHE_FORMAT:
        raise FileError(f"{path} is of an older version: prepare the data again, in another output folder")
    return description


def _read_index(folder: Path, description: Mapping[str, Any]) -> tuple[CachedClip, ...]:
    path = folder / description["index"]
    content = read_bytes(path, limit=NO_LIMIT) if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != description["index_sha256"]:
        raise FileError(f"{path} is missing or damaged: {_AGAIN}")
    lines = (parse_json(line, str(path)) for line in text_lines(content.decode()))
    return tuple(CachedClip(**line | {"bucket": tuple(line["bucket"])}) for line in lines)


def _check_complete(folder: Path, description: Mapping[str, Any], clips: Sequence[CachedClip]) -> None:
    """``FileError`` if anything that a training may read is missing."""
    missing = [f"{key} is missing" for key in _shared_keys(clips) if key not in description["shared"]]
    for shard, (size, _) in sorted(description["shards"].items()):
        path = folder / f"{shard}.safetensors"
        if not path.is_file() or path.stat().st_size != size:
            missing.append(f"{path.name} is {'damaged' if path.is_file() else 'missing'}")
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise FileError(f"{folder} is not complete ({missing[0]}{more}): {_AGAIN}")


# --- writing ----------------------------------------------------------------------------------------------------------


def _shared_keys(clips: Sequence[CachedClip]) -> list[str]:
    """The keys of captions (the empty one too) and blank videos that belong to clips, each once."""
    texts = {text_key(""), *(text_key(clip.caption) for clip in clips)}
    return sorted(texts | {blank_key(clip.bucket) for clip in clips})


def write_cache(
    manifest: Manifest, clips: Sequence[CachedClip], description: Mapping[str, Any], spec: ModelSpec
) -> LatentCache:
    """Write the index of a cache whose tensors are complete, and open it; shards of no use are removed.

    Args:
        manifest: of its tensors, in its folder.
        clips: by id.
        description: ``fingerprint``, ``given`` and ``text_tokens``, see :class:`LatentCache`.
        spec: the base model.
    """
    folder = manifest.folder
    shared = {key: record["shard"] for key in _shared_keys(clips) if (record := manifest.get(key)) is not None}
    known = {record["shard"]: record for record in manifest.records.values() if "shard" in record}
    used = sorted({clip.shard for clip in clips} | set(shared.values()))
    index = "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips).encode()
    sha256 = hashlib.sha256(index).hexdigest()
    index_name = f"index-{sha256[:12]}.jsonl"  # a new name, so that renaming cache.json changes everything at once
    write_atomically(folder / index_name, index)
    content = {
        "format": CACHE_FORMAT,
        "base": spec.name,
        **description,
        "shared": shared,
        "shards": {shard: [known[shard]["bytes"], known[shard]["sha256"]] for shard in used},
        "index": index_name,
        "index_sha256": sha256,
    }
    write_checked(folder / "cache.json", content, indent=1)
    for path in [*folder.glob("index-*.jsonl"), *folder.glob("shard-w*.safetensors")]:
        if path.name != index_name and path.stem not in known and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    return LatentCache.open(folder)
