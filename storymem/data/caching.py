"""The write side of the cache: frozen networks look at every clip once and write down what they see."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from storymem.data.cache import CACHE_FORMAT, CachedClip, LatentCache, Split, bucket_key, text_key
from storymem.data.fingerprint import fingerprint_name
from storymem.data.sealed import write_sealed
from storymem.data.settings import CacheSettings
from storymem.data.shards import Finished, ShardWriter, finished, remove_damaged
from storymem.io import NotFiniteError, check_finite, check_room, write_atomically
from storymem.memory import EmbedFrames, SelectionPolicy, embed_in_batches
from storymem.wan.conditioning import blank_padded, encode_frames, encode_video, latent_mask
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.spec import A14B, ModelSpec

Score = Callable[[np.ndarray], float]
"""The quality of one frame, uint8 [H, W, 3]."""

_CAUSES = "its weights are damaged, or too large for their dtype: write model.dtype=float32 model.vae_dtype=float32"


@dataclass(frozen=True, kw_only=True)
class CacheItem:
    """A clip that is to be cached.

    Args:
        id, caption, group, split, bucket: see :class:`storymem.data.cache.CachedClip`.
        frames: gives uint8 [F, H, W, 3] of the bucket's shape, or raises ``ValueError`` for a clip that is broken.
        mask: gives float32 [F, H, W] in 0..1, 1 where the subject is, or raises as well; None: the clip has none.
        made: a digest of all that the frames depend on; another digest is another clip.
    """

    id: str
    caption: str
    group: int
    split: Split
    bucket: tuple[int, int, int]
    frames: Callable[[], np.ndarray]
    mask: Callable[[], np.ndarray] | None = None
    made: str = ""


@dataclass(frozen=True, kw_only=True)
class KeyframeChooser:
    """How candidate keyframes are chosen: as in generation, from a clip of its own with an empty memory bank.

    Args:
        embed: frames -> CLIP embeddings.
        selector: the policy that a film uses.
        score: quality of a frame; None: every frame is good.
        threshold: lowest quality that passes.
    """

    embed: EmbedFrames
    selector: SelectionPolicy
    score: Score | None = None
    threshold: float | None = None

    def choose(self, frames: np.ndarray) -> list[int]:
        """Frame indices. ``ValueError`` if no frame is good enough."""
        score = self.score
        selection = self.selector.select(
            embed_in_batches(frames, self.embed),
            bank=np.zeros((0, 0), np.float32),
            quality=None if score is None else (lambda index: score(frames[index])),
            quality_threshold=None if score is None else self.threshold,
        )
        if not selection.selected:
            best = max(selection.quality.values(), default=float("nan"))
            raise ValueError(
                f"quality: no frame reaches the threshold {self.threshold}, the best has {best:.2f}: no keyframes"
            )
        return list(selection.selected)


class Advance(Protocol):
    """Told after every item."""

    def __call__(self, count: int = 1) -> None: ...


class CacheBuilder:
    """Fills one cache folder; what is in it already is not made again.

    Args:
        folder: in which the cache's own folder, named after ``fingerprint``, is made.
        fingerprint: what the cache depends on; see :func:`storymem.data.fingerprint.cache_fingerprint`.
        settings: what is stored.
        text_tokens: L, to which prompt embeds are padded.
        spec: the base model.
        worker: several workers may fill one cache, each with its own number.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str],
        settings: CacheSettings,
        text_tokens: int,
        spec: ModelSpec = A14B,
        worker: int = 0,
    ) -> None:
        self.settings, self.text_tokens, self.spec, self.worker = settings, text_tokens, spec, worker
        stored = f"{settings.dtype}, conditions of {sorted(settings.given)} first frames"
        self.fingerprint = {**fingerprint, "stored": stored}
        self.folder = Path(folder) / fingerprint_name(self.fingerprint)

    def missing_texts(self, captions: Iterable[str]) -> list[str]:
        """Those of ``captions`` and the empty text that have no embeds yet, each once, sorted."""
        done = finished(self.folder, "texts")
        return [text for text in sorted({*captions, ""}) if done.get(text_key(text)) is None]

    def missing_clips(self, items: Iterable[CacheItem]) -> list[CacheItem]:
        """Those of ``items`` that have no latents yet, or latents of other frames."""
        done = finished(self.folder, "clips")
        return [item for item in items if _record(item, done) is None]

    def missing_blanks(self, items: Iterable[CacheItem]) -> list[tuple[int, int, int]]:
        """The buckets of ``items`` of which the blank video has no latents yet, each once, sorted."""
        done = finished(self.folder, "blanks")
        return [bucket for bucket in sorted({item.bucket for item in items}) if done.get(bucket_key(bucket)) is None]

    def damaged(self) -> list[str]:
        """The shards that are not what was written; :meth:`finish` deletes them."""
        return [name for kind in ("clips", "texts", "blanks") for name in finished(self.folder, kind).damaged]

    def text_tokens_of(self, captions: Iterable[str]) -> dict[str, int]:
        """How many tokens each of ``captions`` that is encoded has; the text encoder sees ``text_tokens`` of them."""
        done = finished(self.folder, "texts")
        records = {text: done.get(text_key(text)) for text in captions}
        return {text: record["tokens"] for text, record in records.items() if record is not None}

    def check_room(self, items: Iterable[CacheItem]) -> None:
        """``FileError`` if the disk has less room than the latents of ``items`` need."""
        values = sum(
            self.spec.latent_channels
            * self.spec.latent_frames(frames)
            * math.prod(self.spec.latent_size(height, width))
            for frames, height, width in (item.bucket for item in items)
        )
        size = values * (1 + len(self.settings.given)) * getattr(torch, self.settings.dtype).itemsize
        check_room(self.folder, size, "the cache")

    def add_texts(
        self, captions: Sequence[str], pipe: WanMemoryToVideoPipeline, advance: Advance | None = None
    ) -> None:
        """Encode texts one by one, so that an embedding does not depend on what else is encoded.

        Raises:
            NotFiniteError: for NaN or infinity out of the text encoder, naming the caption.
        """
        with self._writer("texts") as writer:
            for caption in captions:
                embeds, _ = pipe.encode_prompt(
                    caption, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
                )
                rows = embeds[0].cpu()
                check_finite(rows, f"the text encoder's output for the caption {caption[:80]!r}", _CAUSES)
                used = max(rows.abs().sum(dim=1).nonzero().flatten().tolist(), default=0) + 1  # then padding follows
                tokens = len(pipe.tokenizer(prompt_clean(caption), verbose=False).input_ids)
                writer.add(text_key(caption), {"embeds": rows[:used].clone()}, tokens=tokens)
                if advance is not None:
                    advance()

    def add_clips(
        self,
        items: Iterable[CacheItem],
        pipe: WanMemoryToVideoPipeline,
        keyframes: KeyframeChooser,
        *,
        reject: Callable[[CacheItem, str], None],
        advance: Advance | None = None,
    ) -> None:
        """Encode clips; one that cannot be used is told to ``reject`` with the reason, and the others go on.

        Raises:
            NotFiniteError: for NaN or infinity out of a network, naming the clip: no clip can be trusted then. The
                clips before it are written.
        """
        with self._writer("clips") as writer:
            for item in items:
                try:
                    tensors = self._encode(item, pipe, keyframes)
                except NotFiniteError as error:
                    raise NotFiniteError(f"{item.id}: {error}") from error
                except ValueError as error:
                    reject(item, str(error))
                else:
                    known = {"keyframes": len(tensors["keyframes"]), "mask": "mask" in tensors}
                    writer.add(item.id, tensors, made=item.made, bucket=item.bucket, **known)
                if advance is not None:
                    advance()

    def add_blanks(self, buckets: Iterable[tuple[int, int, int]], pipe: WanMemoryToVideoPipeline) -> None:
        """The condition of a shot of which nothing is given, once per bucket."""
        with self._writer("blanks") as writer:
            for bucket in buckets:
                blank = encode_video(pipe.vae, blank_padded(None, *bucket))[0]
                writer.add(bucket_key(bucket), {"blank": self._stored(blank, "the latents of the blank video")})

    def finish(self, items: Sequence[CacheItem], *, min_size: int = 1) -> LatentCache:
        """Write the index of the clips that are wanted and there, and open the cache, which checks that all is there.

        Args:
            items: the training set; those without latents were rejected.
            min_size: groups of which fewer clips are left are left out.

        Raises:
            ValueError: if nothing is left, or texts or blank videos are missing.
        """
        done, texts, blanks = (finished(self.folder, kind) for kind in ("clips", "texts", "blanks"))
        made = {item.id: record for item in items if (record := _record(item, done)) is not None}
        sizes = Counter(item.group for item in items if item.id in made)
        clips = [
            _cached(item, made[item.id])
            for item in sorted(items, key=lambda item: item.id)
            if item.id in made and sizes[item.group] >= min_size
        ]
        if not clips:
            raise ValueError(
                f"no clip of {len(items)} is left in a group of {min_size} or more: group.min_size=1 keeps clips that "
                "have no companions"
            )
        index = "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips).encode()
        text_shards = _shards_of(texts, {clip.text for clip in clips} | {text_key("")})
        blank_shards = _shards_of(blanks, {bucket_key(clip.bucket) for clip in clips})
        hashes = {**done.hashes, **texts.hashes, **blanks.hashes}
        used = sorted({clip.shard for clip in clips} | {*text_shards.values(), *blank_shards.values()})
        description = {
            "format": CACHE_FORMAT,
            "base": self.spec.name,
            "fingerprint": self.fingerprint,
            "given": sorted(self.settings.given),
            "text_tokens": self.text_tokens,
            "texts": text_shards,
            "blanks": blank_shards,
            "shards": {shard: hashes[shard] for shard in used},
            "bytes": {shard: (self.folder / f"{shard}.safetensors").stat().st_size for shard in used},
        }
        cache = self._write_index(index, description)
        remove_damaged(self.folder, done, texts, blanks)
        return cache

    def _write_index(self, index: bytes, description: dict[str, Any]) -> LatentCache:
        """Under a name of its own, so that the one renaming of ``cache.json`` changes everything."""
        sha256 = hashlib.sha256(index).hexdigest()
        description |= {"index": f"index-{sha256[:12]}.jsonl", "index_sha256": sha256}
        write_atomically(self.folder / description["index"], index)
        write_sealed(self.folder / "cache.json", description, indent=1)
        for old in self.folder.glob("index-*.jsonl"):
            if old.name != description["index"]:
                old.unlink()
        return LatentCache.open(self.folder)

    def _encode(self, item: CacheItem, pipe: WanMemoryToVideoPipeline, keyframes: KeyframeChooser) -> dict[str, Tensor]:
        frames = item.frames()
        assert frames.shape == (*item.bucket, 3), f"{item.id}: {frames.shape} is not of bucket {item.bucket}"
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
        chosen = keyframes.choose(frames)
        latents = {
            "video": encode_video(pipe.vae, pixels[None])[0],
            "keyframes": encode_frames(pipe.vae, pixels[:, chosen].transpose(0, 1)),
        }
        for given in sorted(self.settings.given):
            latents[f"given_{given}"] = encode_video(pipe.vae, blank_padded(pixels[:, :given], *item.bucket))[0]
        if item.mask is not None:
            latents["mask"] = latent_mask(torch.from_numpy(item.mask()), self.spec)
        return {name: self._stored(latent, f"the latents {name!r}") for name, latent in latents.items()}

    def _stored(self, latents: Tensor, what: str) -> Tensor:
        check_finite(latents, f"{what} out of the VAE", _CAUSES)
        stored = latents.cpu().to(getattr(torch, self.settings.dtype))
        check_finite(stored, f"{what} in {self.settings.dtype}", "write cache.dtype=float32, which holds them")
        return stored

    def _writer(self, what: str) -> ShardWriter:
        return ShardWriter(self.folder, f"{what}-w{self.worker:03d}", round(self.settings.shard_mb * 2**20))


def build_cache(
    folder: str | Path,
    items: Sequence[CacheItem],
    pipe: WanMemoryToVideoPipeline,
    keyframes: KeyframeChooser,
    *,
    fingerprint: Mapping[str, str],
    settings: CacheSettings,
    text_tokens: int,
    spec: ModelSpec = A14B,
) -> LatentCache:
    """The cache of a few clips in one call, without workers and progress; a clip that is broken is an error."""

    def refuse(item: CacheItem, reason: str) -> None:
        raise ValueError(f"{item.id}: {reason}")

    builder = CacheBuilder(folder, fingerprint=fingerprint, settings=settings, text_tokens=text_tokens, spec=spec)
    builder.add_texts(builder.missing_texts(item.caption for item in items), pipe)
    builder.add_clips(builder.missing_clips(items), pipe, keyframes, reject=refuse)
    builder.add_blanks(builder.missing_blanks(items), pipe)
    return builder.finish(items)


def _record(item: CacheItem, done: Finished) -> dict[str, Any] | None:
    record = done.get(item.id, item.made)
    return record if record is not None and tuple(record["bucket"]) == item.bucket else None


def _shards_of(done: Finished, keys: Iterable[str]) -> dict[str, str]:
    """Key -> shard, for those of ``keys`` that are there; opening the cache tells of the others."""
    records = {key: done.get(key) for key in sorted(keys)}
    return {key: record["shard"] for key, record in records.items() if record is not None}


def _cached(item: CacheItem, record: Mapping[str, Any]) -> CachedClip:
    return CachedClip(
        id=item.id,
        caption=item.caption,
        group=item.group,
        split=item.split,
        bucket=item.bucket,
        keyframes=record["keyframes"],
        mask=record["mask"],
        shard=record["shard"],
        text=text_key(item.caption),
    )
