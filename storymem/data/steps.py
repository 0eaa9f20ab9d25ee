"""The five steps of preparing data."""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from storymem.data.cache import CachedClip, LatentCache, blank_key, cache_fingerprint, text_key, write_cache
from storymem.data.clips import Clip, fault_of, load_splitter, shots_between, spread, video_times
from storymem.data.encoding import encode_clip, encode_text, load_chooser, load_embedder, scorer_identity, stored
from storymem.data.grouping import Grouping, group_clips
from storymem.data.manifest import ShardWriter, TensorManifest, digest
from storymem.data.prepare import Preparation, refuse_unfinished
from storymem.io import NotFiniteError, check_room
from storymem.memory import embed_in_batches
from storymem.memory.keyframes import normalised
from storymem.wan.conditioning import blank_padded, encode_video
from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import check_runtime, release_memory

_LOG_SECONDS = 10.0

T = TypeVar("T")


def run_steps(run: Preparation) -> LatentCache | None:
    """The steps that the settings name, in their order; the cache if that is one of them and finished."""
    steps: dict[str, Callable[[Preparation], Any]] = {
        "split": split_videos,
        "check": check_clips,
        "embed": embed_clips,
        "group": group,
    }
    for name, step in steps.items():
        if name in run.settings.steps:
            step(run)
    return cache_clips(run) if "cache" in run.settings.steps else None


# --- split, check -----------------------------------------------------------------------------------------------------


def split_videos(run: Preparation) -> None:
    """Find the shots of every video."""
    find_cuts = load_splitter(run.settings.split, str(check_runtime(run.settings.runtime.placement)))
    with run.manifest("split") as manifest:
        todo = [video for video in run.videos if manifest.get(video, run.split_inputs(video)) is None]
        for video in _progress("split", filter(run.is_mine, todo), len(run.videos), len(todo)):
            path, inputs = run.folder / video, run.split_inputs(video)
            try:
                source = video_times(path)
                shots = shots_between(find_cuts(path), source)
            except ValueError as error:
                manifest.add(video, inputs, reason=str(error))
            else:
                shape = {"fps": source.fps, "height": source.height, "width": source.width}
                manifest.add(video, inputs, shots=shots, notes=source.notes, **shape)
        found = [manifest.get(video, run.split_inputs(video)) or {} for video in run.videos]
    notes = Counter(note.partition(":")[0] for record in found for note in record.get("notes", ()))
    converted = "".join(f", {count} {note}" for note, count in notes.most_common())
    shots_found = sum(len(record.get("shots", ())) for record in found)
    _report("split", f"{shots_found} shots in {len(run.videos)} videos{converted}")


def check_clips(run: Preparation) -> None:
    """Decode every clip whole, once, and check some of its frames."""
    settings = run.settings.check
    with run.manifest("check") as manifest:
        todo = [id for id, clip in run.clips.items() if manifest.get(id, run.check_inputs(clip)) is None]
        for id in _progress("check", filter(run.is_mine, todo), len(run.clips), len(todo)):
            clip = run.clips[id]
            try:
                reason = fault_of(run.read(clip, spread(settings.frames, clip.bucket.frames)), settings)
            except ValueError as error:
                reason = str(error)
            manifest.add(id, run.check_inputs(clip), reason=reason)
        records = [manifest.get(id, run.check_inputs(clip)) for id, clip in run.clips.items()]
    good = sum(record is not None and record["reason"] is None for record in records)
    buckets = Counter(str(clip.bucket) for clip in run.clips.values())
    listed = ", ".join(f"{count} {bucket}" for bucket, count in sorted(buckets.items()))
    _report("check", f"{good} of {len(run.clips)} clips are good; before the check {listed}")


# --- embed, group -----------------------------------------------------------------------------------------------------


def embed_clips(run: Preparation) -> None:
    """Compute the mean CLIP embedding of several frames of every clip."""
    clips = run.good_clips()
    inputs = _embedding_inputs(run, clips)
    with run.manifest("embed") as manifest:
        todo = [id for id in clips if manifest.get(id, inputs[id]) is None]
        mine = list(filter(run.is_mine, todo))
        embed = load_embedder(run.settings) if mine else np.asarray
        for id in _progress("embed", mine, len(clips), len(todo)):
            clip = clips[id]
            try:
                frames = run.read(clip, spread(run.settings.group.frames, clip.bucket.frames))
                row = embed_in_batches(frames, embed).mean(axis=0, dtype=np.float32)
            except ValueError as error:
                raise type(error)(f"{id}: {error}") from error
            manifest.add(id, inputs[id], embedding=base64.b64encode(row.astype("<f4").tobytes()).decode())
    _report("embed", f"{len(clips)} clips")


def group(run: Preparation) -> None:
    """Group the clips that are alike."""
    grouping = grouping_of(run)
    sizes = Counter(Counter(grouping.group.values()).values())
    held_out = f"{grouping.split.count('valid')} of {len(grouping.split)} held out"
    listed = ", ".join(f"{count} of size {size}" for size, count in sorted(sizes.items()))
    _report("group", f"{len(grouping.group)} clips in groups ({held_out}): {listed}")


def grouping_of(run: Preparation) -> Grouping:
    """The groups: computed, or read if nothing has changed since then. What they leave out is rejected.

    Raises:
        ValueError: if they must be computed and ``group`` is not among the steps.
    """
    clips = run.good_clips()
    ids = sorted(clips)
    of_clips = _embedding_inputs(run, clips)
    inputs = digest(vars(run.settings.group), [of_clips[id] for id in ids], ids)
    with run.manifest("group") as manifest:
        record = manifest.get("groups", inputs)
        if record is None:
            if "group" not in run.settings.steps:
                raise ValueError(
                    "clips or settings have changed since step group was last run, or its result is damaged: run it "
                    "again (steps=[group,cache])"
                )
            grouping = group_clips(
                ids,
                _embeddings(run, ids, of_clips),
                run.settings.group,
                sizes=[clips[id].bucket.shape[1:] for id in ids],
                places=[_place(run, clips[id]) for id in ids],
                device=check_runtime(run.settings.runtime.placement),
            )
            manifest.add("groups", inputs, **vars(grouping))
        else:
            grouping = Grouping(**{name: record[name] for name in ("group", "split", "duplicates", "alone")})
    for id, original in grouping.duplicates.items():
        run.reject(id, "group", f"near-duplicate: of {original}")
    for id in grouping.alone:
        run.reject(id, "group", "alone: too few clips are like it")
    return grouping


def _place(run: Preparation, clip: Clip) -> str:
    """What the clips of a group must have in common besides their looks."""
    parent = str(PurePosixPath(clip.video).parent)
    return {None: "", "folder": parent, "video": clip.video}[run.settings.group.within]


def _embedding_inputs(run: Preparation, clips: Mapping[str, Clip]) -> dict[str, str]:
    """What the embedding of each clip depends on."""
    network = digest(scorer_identity(run.settings.scorer.clip), run.settings.group.frames)
    return {id: digest(run.clip_inputs(clip), network) for id, clip in clips.items()}


def _embeddings(run: Preparation, ids: list[str], inputs: Mapping[str, str]) -> np.ndarray:
    """float32 [N, D] of unit length, in the order of ``ids``."""
    manifest = run.manifest("embed")
    records = [manifest.get(id, inputs[id]) for id in ids]
    refuse_unfinished("embed", [id for id, record in zip(ids, records, strict=True) if record is None])
    rows = [np.frombuffer(base64.b64decode(record["embedding"]), "<f4") for record in records if record is not None]
    return normalised(np.stack(rows))


# --- cache ------------------------------------------------------------------------------------------------------------


def cache_clips(run: Preparation) -> LatentCache | None:
    """Encode texts, then clips, group by group; None if other workers are not finished."""
    settings, clips, grouping = run.settings, run.good_clips(), grouping_of(run)
    scorers = [scorer_identity(settings.scorer.clip), scorer_identity(settings.scorer.quality)]
    fingerprint = cache_fingerprint(settings.model, settings.data) | {
        "keyframes": digest(settings.memory["selector"], *scorers),
        "stored": f"{settings.cache.dtype}, conditioning of {sorted(settings.cache.given)} first frames",
    }
    folder = run.output / "cache" / digest(fingerprint)[:12]
    ids = sorted(grouping.group, key=lambda id: (grouping.group[id], id))  # what is read together lies together
    wanted = {id: run.cache_inputs(clips[id]) for id in ids}
    texts, buckets = sorted({"", *(run.caption(clips[id]) for id in ids)}), {clips[id].bucket.shape for id in ids}
    with TensorManifest(folder, settings.worker) as manifest:
        if manifest.damaged:
            count, first = len(manifest.damaged), manifest.damaged[0]
            print(f"{folder} has {count} damaged shards, the first is {first}: recomputing them", file=sys.stderr)
        _check_room(run, manifest, [clips[id] for id in ids if manifest.get(id, wanted[id]) is None])
        with ShardWriter(manifest, settings.worker, round(settings.cache.shard_mb * 2**20)) as writer:
            _cache_texts(run, writer, [text for text in texts if manifest.get(text_key(text)) is None])
            blanks = [bucket for bucket in sorted(buckets) if manifest.get(blank_key(bucket)) is None]
            todo = [clips[id] for id in ids if manifest.get(id, wanted[id]) is None]
            _cache_latents(run, manifest, writer, grouping, blanks, todo, len(ids))
    manifest = TensorManifest(folder, settings.worker)  # other workers have written theirs meanwhile
    records = {id: manifest.get(id, wanted[id]) for id in ids}
    shared = [*map(text_key, texts), *map(blank_key, buckets)]
    left = sum(record is None for record in records.values()) + sum(manifest.get(key) is None for key in shared)
    if left:
        _report("cache", f"{left} texts and clips are left to other workers; the last to end writes the index")
        return None
    _report_long_captions(run, manifest, [clips[id] for id in ids])
    cached = _usable(run, {id: record for id, record in records.items() if record is not None}, grouping)
    description = {
        "fingerprint": fingerprint,
        "given": sorted(settings.cache.given),
        "text_tokens": settings.model.network.text_tokens,
    }
    with run.locked():
        cache = write_cache(manifest, cached, description, settings.model.spec)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    _report("cache", f"{len(cache)} clips, {size / 1e6:.0f} MB in {folder}")
    return cache


def _check_room(run: Preparation, manifest: TensorManifest, clips: Iterable[Clip]) -> None:
    """``FileError`` if the disk has less space than the latents of ``clips`` need."""
    spec, cache = run.settings.model.spec, run.settings.cache
    values = sum(
        spec.latent_channels * spec.latent_frames(frames) * math.prod(spec.latent_size(height, width))
        for frames, height, width in (clip.bucket.shape for clip in clips)
    )
    size = values * (1 + len(cache.given)) * getattr(torch, cache.dtype).itemsize
    check_room(manifest.folder, size, "the cache")


def _cache_texts(run: Preparation, writer: ShardWriter, missing: list[str]) -> None:
    """Encode texts one by one, so that an embedding does not depend on what else is encoded."""
    mine = [text for text in missing if text == "" or run.is_mine(text)]
    if not mine:
        return
    model, runtime = run.settings.model, run.settings.runtime.placement
    pipe = load_pipeline(model, runtime=runtime, text_encoder=True, experts=False)
    for text in _progress("texts", mine, len(mine), len(mine)):
        tensors, tokens = encode_text(pipe, text, model.network.text_tokens)
        writer.add(text_key(text), tensors, tokens=tokens)
    writer.flush()
    pipe.remove_all_hooks()
    del pipe
    release_memory()


def _cache_latents(
    run: Preparation,
    manifest: TensorManifest,
    writer: ShardWriter,
    grouping: Grouping,
    blanks: list[tuple[int, int, int]],
    clips: list[Clip],
    total: int,
) -> None:
    """Encode blank videos and clips; whole groups are for one worker."""
    settings = run.settings
    my_blanks = [bucket for bucket in blanks if run.is_mine(blank_key(bucket))]
    mine = [clip for clip in clips if run.is_mine(f"group {grouping.group[clip.id]}")]
    if not my_blanks and not mine:
        return
    pipe = load_pipeline(settings.model, runtime=settings.runtime.placement, text_encoder=False, experts=False)
    for bucket in my_blanks:
        blank = encode_video(pipe.vae, blank_padded(None, *bucket))[0]
        writer.add(blank_key(bucket), {"blank": stored(blank, "the latents of the blank video", settings.cache)})
    if not mine:
        return
    chooser = load_chooser(run.settings)
    for clip in _progress("latents", mine, total, len(clips)):
        try:
            frames, mask = run.read(clip), run.read_mask(clip)
            tensors = encode_clip(pipe, chooser, frames, mask, settings.cache, settings.model.spec)
        except NotFiniteError as error:  # then no clip can be trusted
            raise NotFiniteError(f"{clip.id}: {error}") from error
        except ValueError as error:
            manifest.add(clip.id, run.cache_inputs(clip), reason=str(error))
        else:
            known = {"keyframes": len(tensors["keyframes"]), "mask": "mask" in tensors}
            writer.add(clip.id, tensors, inputs=run.cache_inputs(clip), **known)
    _report("latents", f"{len(mine)} clips encoded")


def _usable(run: Preparation, records: Mapping[str, dict[str, Any]], grouping: Grouping) -> list[CachedClip]:
    """The clips of the cache, by id: those that were encoded, in groups that are large enough; others are rejected.

    Raises:
        ValueError: if none is left.
    """
    refused = {id: record["reason"] for id, record in records.items() if "reason" in record}
    for id, reason in refused.items():
        run.reject(id, "cache", reason)
    _report_refused(refused, len(records))
    smallest = run.settings.group.min_size
    sizes = Counter(grouping.group[id] for id in records if id not in refused)
    clips = []
    for id in sorted(records.keys() - refused.keys()):
        clip, number, record = run.clips[id], grouping.group[id], records[id]
        if sizes[number] < smallest:
            run.reject(id, "cache", "alone: the other clips of its group were left out")
            continue
        clips.append(
            CachedClip(
                id=id,
                caption=run.caption(clip),
                group=number,
                split=grouping.split[number],
                bucket=clip.bucket.shape,
                keyframes=record["keyframes"],
                shard=record["shard"],
                mask=record["mask"],
            )
        )
    if not clips:
        raise ValueError(
            f"no clip of {len(records)} is left in a group of {smallest} or more: group.min_size=1 keeps clips that "
            "have no companions"
        )
    return clips


def _report_refused(refused: Mapping[str, str], total: int) -> None:
    """Print what helps if the quality filter refuses clips; ``ValueError`` if no clip is left at all."""
    by_quality = sum(reason.startswith("quality:") for reason in refused.values())
    advice = (
        f"{by_quality} of {total} clips have no frame that passes the quality filter. scorer/quality=none lets every "
        "frame pass; scorer/quality=toy, the default, is for drawn clips of the toy world alone"
    )
    if len(refused) == total:
        first = min(refused)
        message = f"no clip of {total} could be cached; the first, {first}: {refused[first]}"
        raise ValueError(f"{message}\n{advice}" if by_quality else message)
    if by_quality:
        print(advice, file=sys.stderr)


def _report_long_captions(run: Preparation, manifest: TensorManifest, clips: list[Clip]) -> None:
    """Warn of captions that are longer than the text encoder reads."""
    most = run.settings.model.network.text_tokens
    tokens = {clip.id: (manifest.get(text_key(run.caption(clip))) or {"tokens": 0})["tokens"] for clip in clips}
    long = sorted(id for id, count in tokens.items() if count > most)
    if long:
        print(
            f"the captions of {len(long)} clips are longer than the {most} tokens that the text encoder reads, and are "
            f"cut there; the first is that of {long[0]}, with {tokens[long[0]]} tokens",
            file=sys.stderr,
        )


# --- progress ---------------------------------------------------------------------------------------------------------


def _progress(step: str, items: Iterable[T], total: int, todo: int) -> Iterator[T]:
    """``items`` with a bar in a terminal; elsewhere a line now and then, if it takes long."""
    interval = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    bar = tqdm(
        *(items, step),
        total=total,
        initial=total - todo,
        delay=interval,
        mininterval=interval,
        file=sys.stderr,
    )
    return iter(bar)


def _report(step: str, summary: str) -> None:
    print(f"{step}: {summary}", file=sys.stderr, flush=True)
