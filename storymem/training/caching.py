"""The write side of the cache: frozen networks look at every clip once and write down what they see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem.io import write_atomically
from storymem.memory import EmbedFrames, SelectionPolicy, embed_in_batches
from storymem.training.cache import CACHE_FORMAT, CachedClip, LatentCache, Split, bucket_key, text_key
from storymem.training.data_settings import CacheSettings
from storymem.training.fingerprint import fingerprint_name
from storymem.training.shards import ShardWriter, finished_records
from storymem.wan.conditioning import blank_padded, encode_frames, encode_video, latent_mask
from storymem.wan.pipeline import WanMemoryToVideoPipeline

Score = Callable[[np.ndarray], float]
"""The quality of one frame, uint8 [H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class CacheItem:
    """A clip that is to be cached.

    Args:
        id, caption, group, split, bucket: see :class:`storymem.training.cache.CachedClip`.
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
            raise ValueError("no frame passes the quality filter, so it has no keyframes")
        return list(selection.selected)


class Advance(Protocol):
    """Told after every item."""

    def __call__(self, count: int = 1) -> None: ...


class CacheBuilder:
    """Fills one cache folder; what is in it already is not made again.

    Args:
        folder: in which the cache's own folder, named after ``fingerprint``, is made.
        fingerprint: what the cache depends on; see :func:`storymem.training.fingerprint.cache_fingerprint`.
        settings: what is stored.
        text_tokens: L, to which prompt embeds are padded.
        worker: several workers may fill one cache, each with its own number.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str],
        settings: CacheSettings,
        text_tokens: int,
        worker: int = 0,
    ) -> None:
        self.settings, self.text_tokens, self.worker = settings, text_tokens, worker
        stored = f"{settings.dtype}, conditions of {sorted(settings.given)} first frames"
        self.fingerprint = {**fingerprint, "stored": stored}
        self.folder = Path(folder) / fingerprint_name(self.fingerprint)

    def missing_texts(self, captions: Iterable[str]) -> list[str]:
        """Those of ``captions`` and the empty text that have no embeds yet, each once, sorted."""
        done, _ = finished_records(self.folder, "texts")
        return [text for text in sorted({*captions, ""}) if text_key(text) not in done]

    def missing_clips(self, items: Iterable[CacheItem]) -> list[CacheItem]:
        """Those of ``items`` that have no latents yet, or latents of other frames."""
        done, _ = finished_records(self.folder, "clips")
        return [item for item in items if not _is_done(item, done)]

    def add_texts(
        self, captions: Sequence[str], pipe: WanMemoryToVideoPipeline, advance: Advance | None = None
    ) -> None:
        """Encode texts one by one, so that an embedding does not depend on what else is encoded."""
        writer = self._writer("texts")
        for caption in captions:
            embeds, _ = pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
            )
            rows = embeds[0].cpu()
            used = int(rows.abs().sum(dim=1).nonzero().max()) + 1  # what follows is the pipeline's padding
            writer.add(text_key(caption), {"embeds": rows[:used].clone()})
            if advance is not None:
                advance()
        writer.flush()

    def add_clips(
        self,
        items: Iterable[CacheItem],
        pipe: WanMemoryToVideoPipeline,
        keyframes: KeyframeChooser,
        *,
        reject: Callable[[CacheItem, str], None],
        advance: Advance | None = None,
    ) -> None:
        """Encode clips; one that cannot be used is told to ``reject`` with the reason, and the others go on."""
        writer = self._writer("clips")
        for item in items:
            try:
                tensors = self._encode(item, pipe, keyframes)
            except ValueError as error:
                reject(item, str(error))
            else:
                known = {"made": item.made, "bucket": item.bucket, "mask": "mask" in tensors}
                writer.add(item.id, tensors, keyframes=len(tensors["keyframes"]), **known)
            if advance is not None:
                advance()
        writer.flush()

    def add_blanks(self, buckets: Iterable[tuple[int, int, int]], pipe: WanMemoryToVideoPipeline) -> None:
        """The condition of a shot of which nothing is given, once per bucket."""
        done, _ = finished_records(self.folder, "blanks")
        writer = self._writer("blanks")
        for bucket in sorted(set(buckets)):
            if bucket_key(bucket) not in done:
                blank = encode_video(pipe.vae, blank_padded(None, *bucket))[0]
                writer.add(bucket_key(bucket), {"blank": self._stored(blank)})
        writer.flush()

    def finish(self, items: Sequence[CacheItem], *, min_size: int = 1) -> LatentCache:
        """Write the index of the clips that are wanted and there, and open the cache.

        Args:
            items: the training set; those without latents were rejected.
            min_size: groups of which fewer clips are left are left out.

        Raises:
            ValueError: if nothing is left.
        """
        done, clip_hashes = finished_records(self.folder, "clips")
        texts, text_hashes = finished_records(self.folder, "texts")
        blanks, blank_hashes = finished_records(self.folder, "blanks")
        made = [item for item in sorted(items, key=lambda item: item.id) if _is_done(item, done)]
        sizes: dict[int, int] = {}
        for item in made:
            sizes[item.group] = sizes.get(item.group, 0) + 1
        clips = [_cached(item, done[item.id]) for item in made if sizes[item.group] >= min_size]
        if not clips:
            raise ValueError(f"no clip of {len(items)} could be cached: rejected.jsonl says why")
        index = "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips).encode()
        used_texts = {clip.text for clip in clips} | {text_key("")}
        used_shards = {clip.shard for clip in clips} | {texts[key]["shard"] for key in used_texts}
        description = {
            "format": CACHE_FORMAT,
            "fingerprint": self.fingerprint,
            "given": sorted(self.settings.given),
            "text_tokens": self.text_tokens,
            "texts": {key: texts[key]["shard"] for key in sorted(used_texts)},
            "blanks": {key: record["shard"] for key, record in blanks.items()},
            "shards": {k: v for k, v in (clip_hashes | text_hashes).items() if k in used_shards} | blank_hashes,
        }
        return self._write_index(index, description)

    def _write_index(self, index: bytes, description: dict[str, Any]) -> LatentCache:
        """Under a name of its own, so that the one renaming of ``cache.json`` changes everything."""
        sha256 = hashlib.sha256(index).hexdigest()
        description |= {"index": f"index-{sha256[:12]}.jsonl", "index_sha256": sha256}
        write_atomically(self.folder / description["index"], index)
        write_atomically(self.folder / "cache.json", json.dumps(description, indent=1).encode())
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
            latents["mask"] = latent_mask(torch.from_numpy(item.mask()))
        return {name: self._stored(latent) for name, latent in latents.items()}

    def _stored(self, latents: Tensor) -> Tensor:
        stored = latents.cpu().to(getattr(torch, self.settings.dtype))
        if not stored.isfinite().all():
            raise ValueError(f"its latents are not finite in {self.settings.dtype}")
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
) -> LatentCache:
    """The cache of a few clips in one call, without workers and progress; a clip that is broken is an error."""

    def refuse(item: CacheItem, reason: str) -> None:
        raise ValueError(f"{item.id}: {reason}")

    builder = CacheBuilder(folder, fingerprint=fingerprint, settings=settings, text_tokens=text_tokens)
    builder.add_texts(builder.missing_texts(item.caption for item in items), pipe)
    builder.add_clips(builder.missing_clips(items), pipe, keyframes, reject=refuse)
    builder.add_blanks((item.bucket for item in items), pipe)
    return builder.finish(items)


def _is_done(item: CacheItem, done: Mapping[str, Mapping[str, Any]]) -> bool:
    record = done.get(item.id)
    return record is not None and record["made"] == item.made and tuple(record["bucket"]) == item.bucket


def _cached(item: CacheItem, record: Mapping[str, Any]) -> CachedClip:
    return CachedClip(
        id=item.id,
        caption=item.caption,
        group=item.group,
        split=item.split,
        bucket=item.bucket,
        keyframes=record["keyframes"],
        mask=record.get("mask", False),
        shard=record["shard"],
        text=text_key(item.caption),
    )
