"""The cache of a training set: everything that frozen networks say about its clips, computed once.

A cache is a folder that holds ``cache.json``, an index (a line of JSON per clip) and safetensors shards. It carries a
fingerprint of the VAE, the text encoder and the size of the clips; another fingerprint is another folder, so latents
of different networks are never mixed. What is stored of a clip: latents of the whole clip, of each candidate keyframe
encoded alone, and of the blank-padded videos that condition it, and its mask if it has one; of a caption: its prompt
embeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from storymem.data.fingerprint import differences
from storymem.data.sealed import NO_LIMIT, read_sealed
from storymem.data.shards import ShardReader, padded
from storymem.io import FileError, parse_json, read_bytes, text_lines
from storymem.wan.spec import SPECS, ModelSpec

Split = Literal["train", "valid"]
CACHE_FORMAT = 2
_AGAIN = "run prepare_data again with the settings that it was made with, and it is made again"


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
        shard: where its tensors lie.
        text: under which key its caption's embeds lie.
        mask: whether it has one.
    """

    id: str
    caption: str
    group: int
    split: Split
    bucket: tuple[int, int, int]
    keyframes: int
    shard: str
    text: str
    mask: bool


class LatentCache:
    """A finished cache, read clip by clip. Made by :func:`storymem.data.caching.build_cache`.

    All tensors come out as float32 on the CPU. Letters: T = (F - 1) / 4 + 1 latent frames, h and w the
    latents' height and width, L text tokens of width D. A cache may be sent to data-loading processes.

    Attributes:
        folder: where it lies.
        fingerprint: what it was made with, in hashes and words.
        clips: all clips, ordered by id.
        spec: the base model whose VAE made the latents.
        given_kinds: the numbers of first frames, beside 0, for which :meth:`given` has an answer.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], clips: tuple[CachedClip, ...]) -> None:
        self.folder = folder
        self.clips = clips
        self.fingerprint: dict[str, str] = dict(description["fingerprint"])
        self.given_kinds: tuple[int, ...] = tuple(description["given"])
        self.spec: ModelSpec = next(spec for spec in SPECS if spec.name == description["base"])
        self._text_tokens: int = description["text_tokens"]
        self._texts: dict[str, str] = description["texts"]
        self._blanks: dict[str, str] = description["blanks"]
        self._shards = ShardReader(folder, description["shards"])

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: Mapping[str, str] | None = None) -> LatentCache:
        """Open a cache, or the one in the output folder of ``prepare_data`` that fits.

        Args:
            folder: holds ``cache.json``; or ``cache/<fingerprint>/cache.json``, one or several.
            fingerprint: what the cache must have been made with, from
                :func:`storymem.data.fingerprint.cache_fingerprint`; None asks nothing.

        Raises:
            ValueError: if there is no finished cache; if another VAE, text encoder or size made it, saying what
                differs; if there are several and no fingerprint says which; or, naming the file, if anything is
                missing or damaged (shards are only looked at here, and compared when they are first read).
        """
        found = {path.parent: _read_description(path) for path in _descriptions(Path(folder))}
        if not found:
            raise ValueError(
                f"there is no finished cache in {folder}: make it with "
                f"python scripts/prepare_data.py videos=FOLDER output={folder}"
            )
        wanted = dict(fingerprint) if fingerprint is not None else None
        fitting = [path for path, it in found.items() if wanted is None or not differences(wanted, it["fingerprint"])]
        if wanted is not None and not fitting:
            lines = [
                f"  {path}: {line}" for path, it in found.items() for line in differences(wanted, it["fingerprint"])
            ]
            raise ValueError(
                f"no cache in {folder} was made with what is to be trained:\n" + "\n".join(lines) + "\nRun "
                "prepare_data with the model and data of the training, and a new cache is made beside the old"
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
        clip = self.clips[index]
        if frames == 0:
            key = bucket_key(clip.bucket)
            return self._shards.read(self._blanks[key], key, "blank").float()
        if frames not in self.given_kinds:
            kinds = sorted({*self.given_kinds, frames})
            raise ValueError(
                f"{self.folder} holds no condition of {frames} first frames: run prepare_data with cache.given={kinds}"
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
        return self._text(self.clips[index].text)

    def empty_text(self) -> Tensor:
        """Prompt embeds of the empty text, [L, D], for text dropout."""
        return self._text(text_key(""))

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
        shards = (clip.shard, self._texts[clip.text], self._blanks[bucket_key(clip.bucket)])
        files = " and ".join(f"{self.folder / shard}.safetensors" for shard in dict.fromkeys(shards))
        return f"delete {files}, and {_AGAIN}"

    def _of_clip(self, index: int, name: str) -> Tensor:
        clip = self.clips[index]
        return self._shards.read(clip.shard, clip.id, name).float()

    def _text(self, key: str) -> Tensor:
        return padded(self._shards.read(self._texts[key], key, "embeds").float(), self._text_tokens)


def bucket_key(bucket: tuple[int, int, int]) -> str:
    """``(17, 64, 96)`` -> ``"17x64x96"``."""
    return "x".join(map(str, bucket))


def text_key(caption: str) -> str:
    """The key of a caption's embeds."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def _descriptions(folder: Path) -> list[Path]:
    if (folder / "cache.json").is_file():
        return [folder / "cache.json"]
    return sorted(folder.glob("*/cache.json")) or sorted(folder.glob("cache/*/cache.json"))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = read_sealed(path)
    except FileError as error:
        raise FileError(f"{error}: {_AGAIN}") from None
    if description["format"] != CACHE_FORMAT:
        raise FileError(f"{path} has format {description['format']}, not {CACHE_FORMAT}: {_AGAIN}")
    return description


def _read_index(folder: Path, description: Mapping[str, Any]) -> tuple[CachedClip, ...]:
    path = folder / description["index"]
    content = read_bytes(path, limit=NO_LIMIT) if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != description["index_sha256"]:
        raise FileError(f"{path} is missing or damaged: {_AGAIN}")
    lines = (parse_json(line, str(path)) for line in text_lines(content.decode()))
    return tuple(CachedClip(**line | {"bucket": tuple(line["bucket"])}) for line in lines)


def _check_complete(folder: Path, description: Mapping[str, Any], clips: Sequence[CachedClip]) -> None:
    """``FileError`` if anything that a training may read is not there."""
    texts, blanks, sizes = description["texts"], description["blanks"], description["bytes"]
    wanted = {clip.text: f"text {clip.text}" for clip in clips} | {text_key(""): "the empty text"}
    missing = [f"{what} is missing" for key, what in wanted.items() if key not in texts]
    buckets = {bucket_key(clip.bucket) for clip in clips}
    missing += [f"the blank video of {bucket} is missing" for bucket in sorted(buckets) if bucket not in blanks]
    used = {clip.shard for clip in clips} | set(texts.values()) | set(blanks.values())
    for shard in sorted(used):
        path = folder / f"{shard}.safetensors"
        if not path.is_file() or path.stat().st_size != sizes.get(shard):
            missing.append(f"{path.name} is {'damaged' if path.is_file() else 'missing'}")
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise FileError(f"{folder} is not complete ({missing[0]}{more}): {_AGAIN}")
