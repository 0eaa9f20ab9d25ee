"""The steps of preparing data before the cache, over one manifest.

A step computes a record for each item, a video or a clip. A record with a ``reason`` leaves its item out of the later
steps. It counts for a digest of all that it depends on: so a run that was killed resumes where it stopped, and what a
changed setting or video affects is recomputed, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from hydra.utils import instantiate
from tqdm import tqdm

from storymem.data.clips import (
    Clip,
    Shot,
    cut_shot,
    fault_of,
    load_splitter,
    read_clip,
    shots_between,
    spread,
    video_times,
)
from storymem.data.grouping import Grouping, group_clips
from storymem.data.manifest import NO_LIMIT, Manifest, digest
from storymem.data.settings import PrepareSettings, Step
from storymem.data.videos import Caption, Captions, VideoFolder
from storymem.io import (
    FileError,
    NotFiniteError,
    check_finite,
    check_regular,
    folder_lock,
    parse_json,
    read_text,
    text_lines,
    write_text,
)
from storymem.media.video import READING
from storymem.memory import EmbedFrames, embed_in_batches
from storymem.memory.keyframes import normalised
from storymem.scorers import scorer_weights, with_defaults
from storymem.scorers.scorer import as_images
from storymem.wan.runtime import check_runtime
from storymem.weights import Weights, locate, sample_hash

_SAMPLE_BYTES = 4096
_LOCK_SECONDS = 600.0
_LOG_SECONDS = 10.0
SCORER_CAUSES = "its weights are damaged, or too large for its dtype"

T = TypeVar("T")


class Preparation:
    """One run over a training set; ``masks``: video -> its mask, for those that have one."""

    def __init__(
        self, settings: PrepareSettings, found: VideoFolder, captions: Captions, masks: Mapping[str, Path]
    ) -> None:
        self.settings, self.output = settings, Path(settings.output)
        self.folder, self.videos, self.captions, self.masks = found.path, found.videos, captions, masks
        self._rejected: dict[str, tuple[str, str]] = {}  # file, video, shot, clip or caption -> step and reason
        self._stamps = {video: stamp(found.path / video) for video in found.videos}
        for path, reason in found.ignored.items():
            if captions.table is None or found.path / path != captions.table:
                self.reject(path, "find", reason)
        for text in captions.unused:
            self.reject(text, "find", "caption without a video: no video has its name")

    # --- split, check -------------------------------------------------------------------------------------------------

    def split(self) -> None:
        """Find the shots of every video."""
        find_cuts = load_splitter(self.settings.split, str(self.device))

        def shots_of(video: str) -> dict[str, Any]:
            info = video_times(self.folder / video)
            shots = shots_between(find_cuts(self.folder / video), info)
            return {"shots": shots, "notes": info.notes, "fps": info.fps, "height": info.height, "width": info.width}

        records = self._work("split", self._split_inputs(), shots_of).values()
        notes = Counter(note.partition(":")[0] for record in records for note in record["notes"])
        converted = "".join(f", {count} {note}" for note, count in notes.most_common())
        report("split", f"{sum(len(r['shots']) for r in records)} shots in {len(self.videos)} videos{converted}")

    def _split_inputs(self) -> dict[str, str]:
        split = self.settings.split
        return {video: digest(stamp, split.splitter, split.threshold) for video, stamp in self._stamps.items()}

    @cached_property
    def clips(self) -> dict[str, Clip]:
        """All clips that the shots give and that have captions, by id. ``ValueError`` if some were not split yet."""
        clips, used = dict[str, Clip](), set[tuple[str, Caption]]()
        for shot in self._shots():
            try:
                cut = cut_shot(shot, self.settings.data, self.settings.split)
            except ValueError as error:
                self.reject(f"{shot.video}@{shot.start:.3f}", "split", str(error))
                continue
            for clip in cut:
                if (caption := self.captions.of(clip.video, clip.start, clip.end)) is None:
                    self.reject(clip.id, "split", "no caption")
                else:
                    clips[clip.id] = clip
                    used.add((clip.video, caption))
        if not clips:
            raise ValueError(f"no clip is left of {len(self.videos)} videos: {self._rejections} has the reasons")
        for video in {video for video, _ in used}:
            for caption in self.captions.by_video[video]:
                if (video, caption) not in used and caption.end < float("inf"):
                    place = f"{video}@{caption.start:g}-{caption.end:g}"
                    self.reject(place, "split", "unused caption: no clip lies in these seconds")
        return clips

    def _shots(self) -> Iterator[Shot]:
        for video, record in self._records("split", self._split_inputs()).items():
            source = {name: record[name] for name in ("fps", "height", "width")}
            for start, end in record["shots"]:
                yield Shot(video=video, start=start, end=end, **source)

    def check(self) -> None:
        """Decode every clip whole, once, and check some of its frames."""
        settings, clips = self.settings.check, self.clips

        def fault(id: str) -> dict[str, Any]:
            frames = self.read(clips[id], spread(settings.frames, clips[id].bucket.frames))
            return {"reason": fault_of(frames, settings)}

        good = self._work("check", self._check_inputs(), fault)
        buckets = Counter(str(clip.bucket) for clip in clips.values())
        listed = ", ".join(f"{count} {bucket}" for bucket, count in sorted(buckets.items()))
        report("check", f"{len(good)} of {len(clips)} clips are good; before the check {listed}")

    def _check_inputs(self) -> dict[str, str]:
        settings = asdict(self.settings.check)
        return {id: digest(self.clip_inputs(clip), settings) for id, clip in self.clips.items()}

    @cached_property
    def good_clips(self) -> dict[str, Clip]:
        """The clips that passed the check, by id. ``ValueError`` if some were not checked yet, or none passed."""
        good = {id: self.clips[id] for id in self._records("check", self._check_inputs())}
        if not good:
            raise ValueError(f"no clip of {len(self.clips)} passed the check: see {self._rejections}")
        return good

    # --- embed, group -------------------------------------------------------------------------------------------------

    def embed(self) -> None:
        """Compute the mean CLIP embedding of several frames of every clip."""
        clips, embedder = self.good_clips, cache(lambda: load_embedder(self.settings))

        def embedding(id: str) -> dict[str, Any]:
            frames = self.read(clips[id], spread(self.settings.group.frames, clips[id].bucket.frames))
            row = embed_in_batches(frames, embedder()).mean(axis=0, dtype=np.float32)
            return {"embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()}

        self._work("embed", self._embed_inputs, embedding)
        report("embed", f"{len(clips)} clips")

    @cached_property
    def _embed_inputs(self) -> dict[str, str]:
        network = digest(scorer_identity(self.settings.scorer.clip), self.settings.group.frames)
        return {id: digest(self.clip_inputs(clip), network) for id, clip in self.good_clips.items()}

    def group(self) -> None:
        """Group the clips that are alike."""
        sizes = Counter(Counter(self.grouping.group.values()).values())
        held_out = f"{self.grouping.split.count('valid')} of {len(self.grouping.split)} held out"
        listed = ", ".join(f"{count} of size {size}" for size, count in sorted(sizes.items()))
        report("group", f"{len(self.grouping.group)} clips in groups ({held_out}): {listed}")

    @cached_property
    def grouping(self) -> Grouping:
        """The groups: computed, or read if nothing has changed since then. What they leave out is rejected.

        ``ValueError`` if they must be computed and ``group`` is not among the steps.
        """
        ids, settings = sorted(self.good_clips), self.settings.group
        inputs = digest(vars(settings), [self._embed_inputs[id] for id in ids], ids)
        with self._manifest("group") as manifest:
            record = manifest.get("groups", inputs)
            if record is not None:
                grouping = Grouping(**{name: record[name] for name in ("group", "split", "duplicates", "alone")})
            elif "group" in self.settings.steps:
                grouping = self._compute_groups()
                manifest.add("groups", inputs, **vars(grouping))
            else:
                raise ValueError(
                    "clips or settings have changed since step group was last run, or its result is damaged: run it "
                    "again (steps=[group,cache])"
                )
        for id, original in grouping.duplicates.items():
            self.reject(id, "group", f"near-duplicate: of {original}")
        for id in grouping.alone:
            self.reject(id, "group", "alone: too few clips are like it")
        return grouping

    def _compute_groups(self) -> Grouping:
        records = self._records("embed", self._embed_inputs)
        if not records:
            raise ValueError(f"no clip could be embedded: see {self._rejections}")
        clips = [self.good_clips[id] for id in records]
        rows = [np.frombuffer(base64.b64decode(record["embedding"]), "<f4") for record in records.values()]
        places = {
            None: ["" for _ in clips],
            "folder": [str(PurePosixPath(clip.video).parent) for clip in clips],
            "video": [clip.video for clip in clips],
        }
        return group_clips(
            list(records),
            normalised(np.stack(rows)),
            self.settings.group,
            sizes=[clip.bucket.shape[1:] for clip in clips],
            places=places[self.settings.group.within],
            device=self.device,
        )

    # --- items and records --------------------------------------------------------------------------------------------

    def read(self, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
        """Frames of a clip, see :func:`storymem.data.clips.read_clip`; ``ValueError`` too if its video has changed."""
        frames = read_clip(self.folder / clip.video, clip, indices)
        status = check_regular(self.folder / clip.video).stat()
        if [status.st_size, status.st_mtime_ns] != self._stamps[clip.video][:2]:
            raise ValueError("changed: the video was written to while it was prepared; run the same command again")
        return frames

    def reject(self, key: str, step: str, reason: str) -> None:
        """Leave an item out; ``reason`` begins with words to count by and a colon."""
        self._rejected[key] = step, reason

    @property
    def device(self) -> torch.device:
        """Where networks run."""
        return check_runtime(self.settings.runtime.placement)

    def locked(self) -> AbstractContextManager[Path]:
        """Inside the block this worker alone writes the files that all of them share."""
        return folder_lock(self.output, "writing the index of", name=".shared.lock", wait=_LOCK_SECONDS)

    @property
    def _rejections(self) -> Path:
        return self.output / "rejected.jsonl"

    def caption(self, clip: Clip) -> str:
        """The text that a clip is trained with."""
        caption = self.captions.of(clip.video, clip.start, clip.end)
        assert caption is not None
        return caption.text

    def clip_inputs(self, clip: Clip) -> str:
        """A digest of what the frames of a clip depend on."""
        return digest(self._stamps[clip.video], clip.start, clip.fps, asdict(clip.bucket))

    def is_mine(self, key: str) -> bool:
        """Whether an item is for this worker."""
        return int(digest(key), 16) % self.settings.workers == self.settings.worker

    def _manifest(self, step: Step) -> Manifest:
        """The manifest of a step, which this worker writes; it has the records of all workers at this moment."""
        return Manifest(self.output / "manifest", step, self.settings.worker)

    def _work(
        self, step: Step, inputs: Mapping[str, str], compute: Callable[[str], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Add the records that are missing of this worker's items (item -> digest of its inputs); those of all so far.

        A ``ValueError`` of ``compute`` is the reason to leave an item out.
        """
        with self._manifest(step) as manifest:
            todo = [key for key in inputs if manifest.get(key, inputs[key]) is None]
            for key in progress(step, filter(self.is_mine, todo), len(inputs), len(todo)):
                manifest.add(key, inputs[key], **or_reason(key, partial(compute, key)))
            return self._accepted(step, inputs, manifest)

    def _records(self, step: Step, inputs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The records of all items that a step has not rejected. ``ValueError`` if it has not finished."""
        manifest = self._manifest(step)
        if missing := [key for key in inputs if manifest.get(key, inputs[key]) is None]:
            raise ValueError(
                f"step {step} has not finished {len(missing)} items, the first is {missing[0]}: run it "
                f"(steps=[{step}]) with the same settings, or wait for the other workers"
            )
        return self._accepted(step, inputs, manifest)

    def _accepted(self, step: Step, inputs: Mapping[str, str], manifest: Manifest) -> dict[str, dict[str, Any]]:
        accepted = {}
        for key in inputs:
            record = manifest.get(key, inputs[key]) or {}
            if record.get("reason") is not None:
                self.reject(key, step, record["reason"])
            elif record:
                accepted[key] = record
        return accepted

    def write_rejected(self) -> None:
        """Write ``rejected.jsonl`` and print how many items were left out for which reason.

        What earlier steps left out stays, and so does what later steps left out in an earlier run.
        """
        with suppress(ValueError):  # steps that are not finished have raised it themselves
            self.good_clips  # noqa: B018  rejects
        with self.locked():
            later = {"group", "cache"}.difference(self.settings.steps)
            before = {key: (step, reason) for key, step, reason in _read_rejected(self._rejections) if step in later}
            rejected = before | self._rejected
            rows = [{"key": key, "step": step, "reason": reason} for key, (step, reason) in sorted(rejected.items())]
            write_text(self._rejections, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        counts = Counter(reason.partition(":")[0] for _, reason in rejected.values())
        if counts:
            listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            print(f"left out: {listed}; see {self._rejections}", file=sys.stderr)


def _read_rejected(path: Path) -> Iterator[tuple[str, str, str]]:
    """(key, step, reason) of an earlier run, as far as the file can be read: it is rewritten."""
    with suppress(FileNotFoundError, FileError):
        for line in text_lines(read_text(path, limit=NO_LIMIT)):
            with suppress(ValueError, TypeError, KeyError):
                row = parse_json(line, str(path))
                values = row["key"], row["step"], row["reason"]
                if all(isinstance(value, str) for value in values):
                    yield values


def stamp(path: Path) -> list[int | str]:
    """Differs if a file has changed or is read differently: size, time, a hash of beginning and end, READING."""
    status = check_regular(path).stat()
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
        file.seek(max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES))
        sample += file.read(_SAMPLE_BYTES)
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(sample).hexdigest()[:16], READING]


def scorer_identity(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a scorer's numbers: its settings with defaults, except for where it runs, and its weights."""
    places = [locate(weights) for weights in scorer_weights(scorer)]
    if "folder" in scorer:
        places.append(Weights(name="scorer", source=str(scorer["folder"])).path)
    settings = {name: value for name, value in with_defaults(scorer).items() if name != "dtype"}
    return settings | {"weights": sample_hash(*places)}


def load_embedder(settings: PrepareSettings) -> EmbedFrames:
    """CLIP on the device of ``runtime``, for uint8 frames."""
    scorer = instantiate(settings.scorer.clip).to(check_runtime(settings.runtime.placement))

    def embed(frames: np.ndarray) -> np.ndarray:
        rows = scorer.embed_images(as_images(frames)).numpy()
        check_finite(rows, "the embeddings by scorer.clip", SCORER_CAUSES)
        return rows

    return embed


def or_reason(key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` returns, or its ``ValueError`` as a reason; NaN from a network ends the run."""
    try:
        return compute()
    except NotFiniteError as error:  # then no item can be trusted
        raise NotFiniteError(f"{key}: {error}") from error
    except ValueError as error:
        return {"reason": str(error)}


def progress(step: str, items: Iterable[T], total: int, todo: int) -> Iterator[T]:
    """``items`` with a bar in a terminal; elsewhere a line now and then, if it takes long."""
    interval = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    bar = tqdm(items, step, total, initial=total - todo, delay=interval, mininterval=interval, file=sys.stderr)
    return iter(bar)


def report(step: str, summary: str) -> None:
    print(f"{step}: {summary}", file=sys.stderr, flush=True)
