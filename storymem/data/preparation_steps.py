"""The five steps of preparing data, each a function of a :class:`~storymem.data.preparation.Preparation`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from hydra.utils import instantiate

from storymem.data.cache import LatentCache
from storymem.data.caching import CacheBuilder, CacheItem, KeyframeChooser
from storymem.data.clips import Clip, fault_of, spread, video_times
from storymem.data.fingerprint import cache_fingerprint
from storymem.data.grouping import Grouping, group_clips
from storymem.data.preparation import Preparation
from storymem.data.sealed import digest, read_sealed, write_sealed
from storymem.data.shards import ShardReader, ShardWriter, finished, remove_damaged
from storymem.data.splitting import load_splitter, shots_between
from storymem.data.step_progress import StepProgress
from storymem.io import FileError, NotFiniteError, check_finite
from storymem.memory import EmbedFrames, embed_in_batches
from storymem.memory.keyframes import normalised
from storymem.scorers import scorer_weights
from storymem.scorers.scorer import as_images
from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import check_runtime, release_memory
from storymem.weights import Weights, locate, sample_hash

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
                shots = shots_between(find_cuts(path), source)
            except ValueError as error:
                journal.add(video, made, reason=str(error))
            else:
                shape = {"fps": source.fps, "height": source.height, "width": source.width}
                journal.add(video, made, shots=shots, notes=source.notes, **shape)
            progress.advance()
        found = [journal.get(video, data.split_made(video)) for video in data.videos]
    shots_found = sum(len(record.get("shots", ())) for record in found if record is not None)
    notes = Counter(note.partition(":")[0] for record in found if record for note in record.get("notes", ()))
    converted = "".join(f", {count} {note}" for note, count in notes.most_common())
    progress.end(f"{shots_found} shots in {len(data.videos)} videos{converted}")


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
    done = finished(folder, "frames")
    _tell_damaged(folder, done.damaged)
    todo = [id for id, clip in clips.items() if done.get(id, data.clip_made(clip)) is None]
    progress = StepProgress("embed", total=len(clips), finished=len(clips) - len(todo))
    if mine := [id for id in todo if data.is_mine(id)]:
        embed = _embedder(data)
        with ShardWriter(folder, f"frames-w{data.settings.worker:03d}", _EMBEDDING_SHARD_BYTES) as writer:
            for id in mine:
                clip = clips[id]
                with _naming(id):
                    frames = data.read(clip, spread(data.settings.group.frames, clip.bucket.frames))
                    rows = torch.from_numpy(embed_in_batches(frames, embed))
                writer.add(id, {"frames": rows}, made=data.clip_made(clip))
                progress.advance()
    if len(mine) == len(todo):
        remove_damaged(folder, done)
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
    written: dict[str, Any] = {}
    try:
        written = read_sealed(path) if path.exists() else {}
    except FileError as error:
        print(f"{error}; groups are made anew by step group", file=sys.stderr)
    if written.get("made") != made:
        _refuse_without("group", data)
        device = check_runtime(data.settings.runtime)
        sizes = [(clips[id].bucket.height, clips[id].bucket.width) for id in ids]
        places = _places([clips[id] for id in ids], data.settings.group.within)
        embeddings = _embeddings(data, clips, ids)
        grouping = group_clips(ids, embeddings, data.settings.group, sizes=sizes, places=places, device=device)
        written = {"made": made, **vars(grouping)}
        with data.writing():
            write_sealed(path, written)
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
    keyframes = digest(settings.memory["selector"], _identity(settings.scorer.clip), _identity(settings.scorer.quality))
    builder = CacheBuilder(
        data.output / "cache",
        fingerprint=cache_fingerprint(settings.model, settings.data) | {"keyframes": keyframes},
        settings=settings.cache,
        text_tokens=settings.model.network.text_tokens,
        spec=settings.model.spec,
        worker=settings.worker,
    )
    _tell_damaged(builder.folder, builder.damaged())
    builder.check_room(builder.missing_clips(items))
    _cache_texts(data, builder, [item.caption for item in items])
    _cache_latents(data, builder, items)
    refused = _refused(data, builder, items)  # read now: other workers have written theirs meanwhile
    left = len(builder.missing_clips(item for item in items if item.id not in refused))
    left += len(builder.missing_texts(item.caption for item in items)) + len(builder.missing_blanks(items))
    progress = StepProgress("cache", total=len(items))
    if left:
        progress.end(f"{left} texts and clips are left to other workers; the last to end makes the index")
        return None
    _tell_refused(data, refused, len(items))
    _tell_cut(builder, items)
    with data.writing():
        cache = builder.finish(items, min_size=settings.group.min_size)
    for id in {item.id for item in items} - refused.keys() - {clip.id for clip in cache.clips}:
        data.reject(id, "cache", "alone: the other clips of its group were left out")
    size = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors") if path.is_file())
    progress.end(f"{len(cache)} clips, {size / 1e6:.0f} MB in {cache.folder}")
    return cache


def _tell_damaged(folder: Path, shards: list[str]) -> None:
    if shards:
        print(
            f"{folder} has {len(shards)} damaged shards, {shards[0]} the first of them: what they hold is made again",
            file=sys.stderr,
        )


def _refused(data: Preparation, builder: CacheBuilder, items: list[CacheItem]) -> dict[str, str]:
    """Clip -> the reason, for those that any worker could not cache."""
    refused = {}
    with data.journal("cache") as journal:
        for item in items:
            if (record := journal.get(item.id, _refusal_made(builder, item))) is not None:
                refused[item.id] = record["reason"]
                data.reject(item.id, "cache", record["reason"])
    return refused


def _tell_refused(data: Preparation, refused: dict[str, str], total: int) -> None:
    """Say what helps if the quality filter refuses clips; ``ValueError`` if no clip is left at all."""
    by_quality = sum(reason.startswith("quality:") for reason in refused.values())
    advice = (
        f"{by_quality} of {total} clips have no frame that passes the quality filter. scorer/quality=none lets every "
        "frame pass; scorer/quality=toy, the default, knows drawn clips of the toy world alone"
    )
    if len(refused) == total:
        first = min(refused)
        told = f"no clip of {total} could be cached; the first, {first}: {refused[first]}"
        raise ValueError(f"{told}\n{advice}" if by_quality else told)
    if by_quality:
        print(advice, file=sys.stderr)


def _tell_cut(builder: CacheBuilder, items: list[CacheItem]) -> None:
    """Say once how many captions are longer than what the text encoder sees."""
    tokens = builder.text_tokens_of(item.caption for item in items)
    cut = [item for item in items if tokens[item.caption] > builder.text_tokens]
    if cut:
        first = min(cut, key=lambda item: item.id)
        print(
            f"the captions of {len(cut)} clips are longer than the {builder.text_tokens} tokens that the text encoder "
            f"reads, and are cut there; the first is that of {first.id}, with {tokens[first.caption]} tokens",
            file=sys.stderr,
        )


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
    missing, refused = builder.missing_clips(items), _refused(data, builder, items)
    # Whole groups, so that what is read together lies together.
    mine = [it for it in missing if it.id not in refused and data.is_mine(f"group {it.group}")]
    blanks = [bucket for bucket in builder.missing_blanks(items) if data.is_mine(f"blank {bucket}")]
    progress = StepProgress("latents", total=len(items), finished=len(items) - len(missing))
    if mine or blanks:
        pipe = load_pipeline(data.settings.model, runtime=data.settings.runtime, text_encoder=False, experts=False)
        builder.add_blanks(blanks, pipe)
    if mine:
        with data.journal("cache") as journal:

            def reject(item: CacheItem, reason: str) -> None:
                journal.add(item.id, _refusal_made(builder, item), reason=reason)

            builder.add_clips(mine, pipe, _chooser(data), reject=reject, advance=progress.advance)
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
        rows = scorer.embed_images(as_images(frames)).numpy()
        check_finite(rows, "the embeddings by scorer.clip", "its weights are damaged, or too large for its dtype")
        return rows

    return embed


def _chooser(data: Preparation) -> KeyframeChooser:
    quality = instantiate(data.settings.scorer.quality).to(check_runtime(data.settings.runtime))

    def score(frame: np.ndarray) -> float:
        scores = quality.score(as_images(frame[None]))
        check_finite(scores, "the score by scorer.quality", "its weights are damaged, or too large for its dtype")
        return float(scores[0])

    return KeyframeChooser(
        embed=_embedder(data),
        selector=instantiate(data.settings.memory["selector"]),
        score=score,
        threshold=quality.threshold,
    )


def _identity(scorer: dict[str, Any]) -> dict[str, Any]:
    """What decides a scorer's numbers: its configuration, but for where it runs, and its weights."""
    places = [locate(weights) for weights in scorer_weights(scorer)]
    if "folder" in scorer:
        places.append(Weights(name="scorer", source=str(scorer["folder"])).path)
    kept = {name: value for name, value in scorer.items() if name not in ("device", "dtype", "batch_size")}
    return {**kept, "weights": sample_hash(*places)}


def _embeddings_folder(data: Preparation) -> Path:
    return data.output / "embeddings" / digest(_identity(data.settings.scorer.clip), data.settings.group.frames)


def _embeddings(data: Preparation, clips: dict[str, Clip], ids: list[str]) -> np.ndarray:
    """float32 [N, D] of unit length: the mean of each clip's frames, in the order of ``ids``."""
    folder = _embeddings_folder(data)
    done = finished(folder, "frames")
    shard_of = {id: record["shard"] for id in ids if (record := done.get(id, data.clip_made(clips[id]))) is not None}
    missing = [id for id in ids if id not in shard_of]
    if missing:
        raise ValueError(
            f"{len(missing)} clips have no embeddings, {missing[0]} the first of them: run steps=[embed] with the same "
            "settings, or wait for the other workers"
        )
    reader = ShardReader(folder, done.hashes)
    # In the order in which they lie on the disk; a set of 400,000 clips has hundreds of shards.
    rows = {
        id: reader.read(shard_of[id], id, "frames").mean(dim=0).numpy()
        for id in sorted(ids, key=lambda id: shard_of[id])
    }
    return normalised(np.stack([rows[id] for id in ids]))


@contextmanager
def _naming(id: str) -> Iterator[None]:
    """Begin the message of what a clip is at fault for with the clip."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{id}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{id}: {error}") from error


def _refuse_without(step: str, data: Preparation) -> None:
    if step not in data.settings.steps:
        raise ValueError(
            f"clips or settings have changed since step {step} was last run: run it again (steps=[{step},cache])"
        )
