"""The last step of preparing data: what the frozen networks compute of clips and captions becomes a cache."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from storymem.data.cache import CachedClip, LatentCache, blank_key, cache_fingerprint, text_key, write_cache
from storymem.data.clips import Clip, read_mask
from storymem.data.manifest import Manifest, ShardWriter, digest
from storymem.data.settings import CacheSettings, PrepareSettings
from storymem.data.steps import (
    SCORER_CAUSES,
    Preparation,
    load_embedder,
    or_reason,
    progress,
    report,
    scorer_identity,
    stamp,
)
from storymem.data.texts import NOT_FINITE, encode_text
from storymem.io import check_finite, check_room
from storymem.memory import embed_in_batches
from storymem.scorers import with_defaults
from storymem.scorers.scorer import as_images
from storymem.wan.conditioning import blank_padded, encode_frames, encode_video, latent_mask
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.runtime import check_runtime, release_memory
from storymem.wan.spec import ModelSpec

ChooseKeyframes = Callable[[np.ndarray], list[int]]
"""Frames of a clip, uint8 [F, H, W, 3] -> the indices of its candidate keyframes."""


def load_chooser(settings: PrepareSettings) -> ChooseKeyframes:
    """The choice of keyframes as in generation, from one clip with an empty memory bank.

    It raises ``ValueError`` if no frame passes the quality filter, and ``NotFiniteError`` for NaN from a scorer.
    """
    embed, selector = load_embedder(settings), instantiate(settings.memory["selector"])
    quality = instantiate(settings.scorer.quality).to(check_runtime(settings.runtime.placement))

    def score(frame: np.ndarray) -> float:
        scores = quality.score(as_images(frame[None]))
        check_finite(scores, "the score by scorer.quality", SCORER_CAUSES)
        return float(scores[0])

    def choose(frames: np.ndarray) -> list[int]:
        selection = selector.select(
            embed_in_batches(frames, embed),
            bank=np.zeros((0, 0), np.float32),
            quality=lambda index: score(frames[index]),
            quality_threshold=quality.threshold,
        )
        if not selection.selected:
            best = max(selection.quality.values(), default=float("nan"))
            raise ValueError(
                f"quality: no frame reaches the threshold {quality.threshold}, the best has {best:.2f}: no keyframes"
            )
        return list(selection.selected)

    return choose


def encode_clip(
    pipe: WanMemoryToVideoPipeline,
    choose: ChooseKeyframes,
    frames: np.ndarray,
    mask: np.ndarray | None,
    settings: CacheSettings,
    spec: ModelSpec,
) -> dict[str, Tensor]:
    """Everything that a cache holds of a clip, see :mod:`storymem.data.cache`.

    Args:
        frames: uint8 [F, H, W, 3].
        mask: float32 [F, H, W] in 0..1, 1 where the subject is; None: the clip has none.

    Raises:
        ValueError: if no frame is good enough for a keyframe.
        NotFiniteError: for NaN or infinity from a network.
    """
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    chosen = choose(frames)
    latents = {
        "video": encode_video(pipe.vae, pixels[None])[0],
        "keyframes": encode_frames(pipe.vae, pixels[:, chosen].transpose(0, 1)),
    }
    for given in sorted(settings.given):
        latents[f"given_{given}"] = encode_video(pipe.vae, blank_padded(pixels[:, :given], *frames.shape[:3]))[0]
    if mask is not None:
        latents["mask"] = latent_mask(torch.from_numpy(mask), spec)
    return {name: stored(latent, f"the latents {name!r}", settings) for name, latent in latents.items()}


def stored(latents: Tensor, what: str, settings: CacheSettings) -> Tensor:
    """Latents on the CPU in the dtype of the cache. ``NotFiniteError`` if that has NaN or infinity."""
    check_finite(latents, f"{what} from the VAE", NOT_FINITE)
    narrow = latents.cpu().to(getattr(torch, settings.dtype))
    check_finite(narrow, f"{what} in {settings.dtype}", "write cache.dtype=float32, which can represent them")
    return narrow


# --- the step ---------------------------------------------------------------------------------------------------------


def cache_clips(run: Preparation) -> LatentCache | None:
    """Encode texts, then clips, group by group; None if other workers are not finished."""
    settings, group = run.settings, run.grouping.group
    scorers = [scorer_identity(settings.scorer.clip), scorer_identity(settings.scorer.quality)]
    fingerprint = cache_fingerprint(settings.model, settings.data) | {
        "keyframes": digest(with_defaults(settings.memory["selector"]), *scorers),
        "stored": f"{settings.cache.dtype}, conditioning of {sorted(settings.cache.given)} first frames",
    }
    folder = run.output / "cache" / digest(fingerprint)[:12]
    # What is read together is stored together.
    clips = {id: run.good_clips[id] for id in sorted(group, key=lambda id: (group[id], id))}
    inputs = {id: _inputs(run, clip) for id, clip in clips.items()}
    texts = {text_key(text): text for text in ("", *map(run.caption, clips.values()))}
    blanks = {blank_key(clip.bucket.shape): clip.bucket.shape for clip in clips.values()}
    with Manifest(folder, "tensors", settings.worker) as manifest:
        if manifest.damaged:
            count, first = len(manifest.damaged), manifest.damaged[0]
            print(f"{folder} has {count} damaged shards, the first is {first}: recomputing them", file=sys.stderr)
        todo = [clip for id, clip in clips.items() if manifest.get(id, inputs[id]) is None]
        _check_room(settings, folder, todo)
        with ShardWriter(manifest, settings.worker, round(settings.cache.shard_mb * 2**20)) as writer:
            _encode_texts(run, writer, sorted(text for key, text in texts.items() if manifest.get(key) is None))
            missing = {key: shape for key, shape in sorted(blanks.items()) if manifest.get(key) is None}
            _encode_clips(run, manifest, writer, missing, {clip: inputs[clip.id] for clip in todo})
    manifest = Manifest(folder, "tensors", settings.worker)  # other workers have written theirs meanwhile
    found = {id: manifest.get(id, inputs[id]) for id in clips}
    left = [*found.values(), *map(manifest.get, [*texts, *blanks])].count(None)
    if left:
        report("cache", f"{left} texts and clips are left to other workers; the last to end writes the index")
        return None
    _report_long_captions(run, manifest, clips.values())
    description = {
        "fingerprint": fingerprint,
        "given": sorted(settings.cache.given),
        "text_tokens": settings.model.network.text_tokens,
    }
    usable = _usable(run, {id: record for id, record in found.items() if record is not None})
    with run.locked():
        cache = write_cache(manifest, usable, description, settings.model.spec)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    report("cache", f"{len(cache)} clips, {size / 1e6:.0f} MB in {folder}")
    return cache


def _inputs(run: Preparation, clip: Clip) -> str:
    """What the cached tensors of a clip depend on: its frames, and its mask if it has one."""
    frames, mask = run.clip_inputs(clip), run.masks.get(clip.video)
    return frames if mask is None else digest(frames, stamp(mask))


def _check_room(settings: PrepareSettings, folder: Path, clips: Iterable[Clip]) -> None:
    """``FileError`` if the disk has less space than the latents of ``clips`` need."""
    spec, cache = settings.model.spec, settings.cache
    values = sum(
        spec.latent_channels * spec.latent_frames(frames) * math.prod(spec.latent_size(height, width))
        for frames, height, width in (clip.bucket.shape for clip in clips)
    )
    check_room(folder, values * (1 + len(cache.given)) * getattr(torch, cache.dtype).itemsize, "the cache")


def _encode_texts(run: Preparation, writer: ShardWriter, missing: Iterable[str]) -> None:
    """Encode texts one by one, so that an embedding does not depend on what else is encoded."""
    mine = [text for text in missing if text == "" or run.is_mine(text)]
    if not mine:
        return
    model, runtime = run.settings.model, run.settings.runtime.placement
    pipe = load_pipeline(model, runtime=runtime, text_encoder=True, experts=False)
    for text in progress("texts", mine, len(mine), len(mine)):
        tensors, tokens = encode_text(pipe, text, model.network.text_tokens)
        writer.add(text_key(text), tensors, tokens=tokens)
    writer.flush()
    pipe.remove_all_hooks()
    del pipe
    release_memory()


def _encode_clips(
    run: Preparation,
    manifest: Manifest,
    writer: ShardWriter,
    blanks: Mapping[str, tuple[int, int, int]],
    clips: Mapping[Clip, str],
) -> None:
    """Encode blank videos and clips, each with its inputs; whole groups are for one worker."""
    settings, group = run.settings, run.grouping.group
    my_blanks = {key: shape for key, shape in blanks.items() if run.is_mine(key)}
    mine = [clip for clip in clips if run.is_mine(f"group {group[clip.id]}")]
    if not my_blanks and not mine:
        return
    pipe = load_pipeline(settings.model, runtime=settings.runtime.placement, text_encoder=False, experts=False)
    for key, shape in my_blanks.items():
        blank = encode_video(pipe.vae, blank_padded(None, *shape))[0]
        writer.add(key, {"blank": stored(blank, "the latents of the blank video", settings.cache)})
    if not mine:
        return
    choose = load_chooser(settings)

    def encode(clip: Clip) -> dict[str, Any]:
        frames, path = run.read(clip), run.masks.get(clip.video)
        mask = None if path is None else read_mask(path, run.folder / clip.video, clip)
        return encode_clip(pipe, choose, frames, mask, settings.cache, settings.model.spec)

    for clip in progress("latents", mine, len(group), len(clips)):
        found = or_reason(clip.id, partial(encode, clip))
        if "reason" in found:
            manifest.add(clip.id, clips[clip], **found)
        else:
            known = {"keyframes": len(found["keyframes"]), "mask": "mask" in found}
            writer.add(clip.id, found, inputs=clips[clip], **known)
    report("latents", f"{len(mine)} clips encoded")


def _usable(run: Preparation, records: Mapping[str, dict[str, Any]]) -> list[CachedClip]:
    """The clips of the cache, by id: those that were encoded, in groups that are large enough; others are rejected.

    ``ValueError`` if none is left.
    """
    refused = {id: record["reason"] for id, record in records.items() if "reason" in record}
    for id, reason in refused.items():
        run.reject(id, "cache", reason)
    _report_refused(refused, len(records))
    smallest, grouping = run.settings.group.min_size, run.grouping
    sizes = Counter(grouping.group[id] for id in records if id not in refused)
    clips = []
    for id in sorted(records.keys() - refused.keys()):
        clip, number, record = run.good_clips[id], grouping.group[id], records[id]
        if sizes[number] < smallest:
            run.reject(id, "cache", "alone: the other clips of its group were left out")
            continue
        known: dict[str, Any] = {name: record[name] for name in ("keyframes", "shard", "mask")}
        group: dict[str, Any] = {"group": number, "split": grouping.split[number]}
        clips.append(CachedClip(id=id, caption=run.caption(clip), bucket=clip.bucket.shape, **group, **known))
    if not clips:
        raise ValueError(
            f"no clip of {len(records)} is left in a group of {smallest} or more: group.min_size=1 keeps clips without "
            "companions"
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


def _report_long_captions(run: Preparation, manifest: Manifest, clips: Iterable[Clip]) -> None:
    """Warn of captions that are longer than the text encoder reads."""
    most = run.settings.model.network.text_tokens
    tokens = {clip.id: manifest.records[text_key(run.caption(clip)), ""]["tokens"] for clip in clips}
    long = sorted(id for id, count in tokens.items() if count > most)
    if long:
        print(
            f"the captions of {len(long)} clips are longer than the {most} tokens that the text encoder reads, and are "
            f"cut there; the first is that of {long[0]}, with {tokens[long[0]]} tokens",
            file=sys.stderr,
        )
