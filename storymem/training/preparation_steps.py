"""The five steps of preparing data, each a function of a :class:`~storymem.training.preparation.Preparation`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from hydra.utils import instantiate

from storymem.io import write_atomically
from storymem.memory import EmbedFrames, embed_in_batches
from storymem.memory.keyframes import normalised
from storymem.training.cache import LatentCache
from storymem.training.caching import CacheBuilder, CacheItem, KeyframeChooser
from storymem.training.clips import Clip, fault_of, spread, video_times
from storymem.training.fingerprint import cache_fingerprint
from storymem.training.grouping import Grouping, group_clips
from storymem.training.journal import digest
from storymem.training.preparation import Preparation
from storymem.training.shards import ShardReader, ShardWriter, finished_records
from storymem.training.splitting import load_splitter, shots_between
from storymem.training.step_progress import StepProgress
from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import check_runtime, release_memory

_EMBEDDING_SHARD_BYTES = 2**24


def split_videos(data: Preparation) -> None:
    """Find the shots of every video."""
    settings = data.settings.split
    find_cuts = load_splitter(settings, str(check_runtime(data.settings.runtime)))
    with data.journal("split") as journal:
        todo = [video for video in data.videos if journal.get(video, data.split_made(video)) is None]
        progress = StepProgress("split", total=len(data.videos), finished=len(data.videos) - len(todo))
        for video in filter(data.is_mine, todo):
            path, made = data.folder / video, data.split_made(video)
            try:
                source = video_times(path)
                shots = shots_between(find_cuts(path), len(source.times))
            except ValueError as error:
                journal.add(video, made, reason=str(error))
            else:
                bounds = [*source.times, source.times[-1] + 1 / source.fps]
                seconds = [(round(bounds[start], 6), round(bounds[end], 6)) for start, end in shots]
                shape = {"fps": source.fps, "height": source.height, "width": source.width}
                journal.add(video, made, shots=seconds, **shape)
            progress.advance()
        found = [journal.get(video, data.split_made(video)) for video in data.videos]
    shots_found = sum(len(record.get("shots", ())) for record in found if record is not None)
    progress.end(f"{shots_found} shots in {len(data.videos)} videos")


def check_clips(data: Preparation) -> None:
    """Decode every clip whole, once, and look at some of its frames."""
    settings = data.settings.check
    with data.journal("check") as journal:
        todo = [id for id, clip in data.clips.items() if journal.get(id, data.check_made(clip)) is None]
        progress = StepProgress("check", total=len(data.clips), finished=len(data.clips) - len(todo))
        for id in filter(data.is_mine, todo):
            clip = data.clips[id]
            try:
                reason = fault_of(data.read(clip, spread(settings.frames, clip.bucket.frames)), settings)
            except ValueError as error:
                reason = str(error)
            journal.add(id, data.check_made(clip), reason=reason)
            progress.advance()
        records = [journal.get(id, data.check_made(clip)) for id, clip in data.clips.items()]
    good = sum(record is not None and record["reason"] is None for record in records)
    buckets = Counter(str(clip.bucket) for clip in data.clips.values())
    listed = ", ".join(f"{count} {bucket}" for bucket, count in sorted(buckets.items()))
    progress.end(f"{good} of {len(data.clips)} clips are good; before the check {listed}")


def embed_clips(data: Preparation) -> None:
    """Embed several frames of every clip."""
    clips, folder = data.good_clips(), _embeddings_folder(data)
    done, _ = finished_records(folder, "frames")
    todo = [id for id, clip in clips.items() if not _is_embedded(data, clip, done)]
    progress = StepProgress("embed", total=len(clips), finished=len(clips) - len(todo))
    if mine := [id for id in todo if data.is_mine(id)]:
        embed = _embedder(data)
        writer = ShardWriter(folder, f"frames-w{data.settings.worker:03d}", _EMBEDDING_SHARD_BYTES)
        for id in mine:
            clip = clips[id]
            frames = data.read(clip, spread(data.settings.group.frames, clip.bucket.frames))
            rows = torch.from_numpy(embed_in_batches(frames, embed))
            writer.add(id, {"frames": rows}, made=data.clip_made(clip))
            progress.advance()
        writer.flush()
    progress.end(f"{len(clips)} clips")


def group(data: Preparation) -> None:
    """Group the clips that are alike."""
    grouping = _grouping(data)
    sizes = Counter(Counter(grouping.group.values()).values())
    StepProgress("group", total=len(grouping.group)).end(
        f"{len(grouping.group)} clips in groups ({grouping.split.count('valid')} of {len(grouping.split)} held out): "
        + ", ".join(f"{count} of size {size}" for size, count in sorted(sizes.items()))
    )


def _grouping(data: Preparation) -> Grouping:
    """The groups: made, or read if nothing has changed since they were made."""
    clips = data.good_clips()
    ids = sorted(clips)
    path = data.output / "groups.json"
    made = digest(
        vars(data.settings.group), _embeddings_folder(data).name, [data.clip_made(clips[id]) for id in ids], ids
    )
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if written.get("made") != made:
        _refuse_without("group", data)
        device = check_runtime(data.settings.runtime)
        sizes = [(clips[id].bucket.height, clips[id].bucket.width) for id in ids]
        places = _places([clips[id] for id in ids], data.settings.group.within)
        embeddings = _embeddings(data, clips, ids)
        grouping = group_clips(ids, embeddings, data.settings.group, sizes=sizes, places=places, device=device)
        written = {"made": made, **vars(grouping)}
        write_atomically(path, json.dumps(written, ensure_ascii=False).encode())
    grouping = Grouping(**{name: value for name, value in written.items() if name != "made"})
    for id, original in grouping.duplicates.items():
        data.reject(id, "group", f"near-duplicate: of {original}")
    for id in grouping.alone:
        data.reject(id, "group", "alone: too few clips are like it")
    return grouping


def _places(clips: list[Clip], within: Literal["folder", "video"] | None) -> list[str] | None:
    """What the clips of a group must have in common besides their looks."""
    if within is None:
        return None
    return [clip.video if within == "video" else str(PurePosixPath(clip.video).parent) for clip in clips]


def cache_clips(data: Preparation) -> LatentCache | None:
    """Encode texts, then clips, group by group; None if other workers are not finished."""
    settings, clips, grouping = data.settings, data.good_clips(), _grouping(data)
    items = [_item(data, clips[id], grouping) for id in sorted(grouping.group, key=lambda id: (grouping.group[id], id))]
    keyframes = digest(settings.memory["selector"], _identity(settings.scorer.clip), settings.scorer.quality)
    builder = CacheBuilder(
        data.output / "cache",
        fingerprint=cache_fingerprint(settings.model, settings.data) | {"keyframes": keyframes},
        settings=settings.cache,
        text_tokens=settings.model.network.text_tokens,
        worker=settings.worker,
    )
    _cache_texts(data, builder, [item.caption for item in items])
    _cache_latents(data, builder, items)
    with data.journal("cache") as journal:  # opened now: other workers have written theirs meanwhile
        refused = {item.id for item in items if journal.get(item.id, _refusal_made(builder, item)) is not None}
    left = len(builder.missing_clips(item for item in items if item.id not in refused))
    left += len(builder.missing_texts(item.caption for item in items))
    progress = StepProgress("cache", total=len(items))
    if left:
        progress.end(f"{left} texts and clips are left to other workers; the last to end makes the index")
        return None
    cache = builder.finish(items, min_size=settings.group.min_size)
    size = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    progress.end(f"{len(cache)} clips, {size / 1e6:.0f} MB in {cache.folder}")
    return cache


def _cache_texts(data: Preparation, builder: CacheBuilder, captions: list[str]) -> None:
    missing = [text for text in builder.missing_texts(captions) if text == "" or data.is_mine(text)]
    if not missing:
        return
    pipe = load_pipeline(data.settings.model, runtime=data.settings.runtime, text_encoder=True, experts=False)
    progress = StepProgress("texts", total=len(missing))
    builder.add_texts(missing, pipe, progress.advance)
    progress.end(f"{len(missing)} distinct texts")
    pipe.remove_all_hooks()
    del pipe
    release_memory()


def _cache_latents(data: Preparation, builder: CacheBuilder, items: list[CacheItem]) -> None:
    missing, refused = builder.missing_clips(items), []
    with data.journal("cache") as journal:
        for item in items:
            record = journal.get(item.id, _refusal_made(builder, item))
            if record is not None:
                data.reject(item.id, "cache", record["reason"])
                refused.append(item.id)
        # Whole groups, so that what is read together lies together.
        mine = [it for it in missing if it.id not in refused and data.is_mine(f"group {it.group}")]
        progress = StepProgress("latents", total=len(items), finished=len(items) - len(missing))
        if mine:
            pipe = load_pipeline(data.settings.model, runtime=data.settings.runtime, text_encoder=False, experts=False)

            def reject(item: CacheItem, reason: str) -> None:
                journal.add(item.id, _refusal_made(builder, item), reason=reason)
                data.reject(item.id, "cache", reason)

            builder.add_clips(mine, pipe, _chooser(data), reject=reject, advance=progress.advance)
            builder.add_blanks({item.bucket for item in items}, pipe)
        progress.end(f"{len(mine)} clips encoded")


def _item(data: Preparation, clip: Clip, grouping: Grouping) -> CacheItem:
    number = grouping.group[clip.id]
    return CacheItem(
        id=clip.id,
        caption=data.caption(clip),
        group=number,
        split=grouping.split[number],
        bucket=(clip.bucket.frames, clip.bucket.height, clip.bucket.width),
        frames=lambda: data.read(clip),
        mask=(lambda: data.masks.read(clip)) if clip.video in data.masks.files else None,
        made=data.cache_made(clip),
    )


def _refusal_made(builder: CacheBuilder, item: CacheItem) -> str:
    return digest(item.made, builder.folder.name)


def _embedder(data: Preparation) -> EmbedFrames:
    """CLIP on the device of ``runtime``, from uint8 frames."""
    scorer = instantiate(data.settings.scorer.clip).to(check_runtime(data.settings.runtime))

    def embed(frames: np.ndarray) -> np.ndarray:
        return scorer.embed_images(_pixels(frames)).numpy()

    return embed


def _chooser(data: Preparation) -> KeyframeChooser:
    quality = instantiate(data.settings.scorer.quality).to(check_runtime(data.settings.runtime))
    return KeyframeChooser(
        embed=_embedder(data),
        selector=instantiate(data.settings.memory["selector"]),
        score=lambda frame: float(quality.score(_pixels(frame[None]))[0]),
        threshold=quality.threshold,
    )


def _pixels(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def _identity(scorer: dict[str, Any]) -> dict[str, Any]:
    """What of a scorer's configuration decides its embeddings."""
    return {name: value for name, value in scorer.items() if name not in ("device", "dtype", "batch_size")}


def _embeddings_folder(data: Preparation) -> Path:
    return data.output / "embeddings" / digest(_identity(data.settings.scorer.clip), data.settings.group.frames)


def _is_embedded(data: Preparation, clip: Clip, done: dict[str, dict[str, Any]]) -> bool:
    return clip.id in done and done[clip.id]["made"] == data.clip_made(clip)


def _embeddings(data: Preparation, clips: dict[str, Clip], ids: list[str]) -> np.ndarray:
    """float32 [N, D] of unit length: the mean of each clip's frames, in the order of ``ids``."""
    folder = _embeddings_folder(data)
    done, hashes = finished_records(folder, "frames")
    missing = [id for id in ids if not _is_embedded(data, clips[id], done)]
    if missing:
        raise ValueError(
            f"{len(missing)} clips have no embeddings, {missing[0]} the first of them: run steps=[embed] with the same "
            "settings, or wait for the other workers"
        )
    reader = ShardReader(folder, hashes)
    # In the order in which they lie on the disk; a set of 400,000 clips has hundreds of shards.
    rows = {
        id: reader.read(done[id]["shard"], id, "frames").mean(dim=0).numpy()
        for id in sorted(ids, key=lambda id: done[id]["shard"])
    }
    return normalised(np.stack([rows[id] for id in ids]))


def _refuse_without(step: str, data: Preparation) -> None:
    if step not in data.settings.steps:
        raise ValueError(
            f"clips or settings have changed since step {step} was last run: run it again (steps=[{step},cache])"
        )
