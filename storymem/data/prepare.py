"""From a folder of videos with captions to a cached training set, in five steps over one manifest.

    videos ── split ──> shots ── check ──> clips ── embed ──> embeddings ── group ──> groups ── cache ──> LatentCache

Every step records what it finished, item by item, together with a digest of what that depended on. So a run that was
killed resumes where it stopped, and what a changed setting or video affects is recomputed, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from storymem.config import build_settings
from storymem.data.clips import Clip, Shot, cut_shot, read_clip, read_mask
from storymem.data.manifest import NO_LIMIT, Manifest, digest
from storymem.data.settings import PrepareSettings, Step
from storymem.data.videos import Captions, VideoFolder, find_masks, read_captions, scan_videos
from storymem.io import (
    FileError,
    check_regular,
    folder_lock,
    read_text,
    remove_leftovers,
    text_lines,
    write_text,
)
from storymem.media.video import READING
from storymem.stopping import stopping_on_signals
from storymem.wan.sources import check_weights

if TYPE_CHECKING:
    from storymem.data.cache import LatentCache

_SAMPLE_BYTES = 4096
_LOCK_SECONDS = 600.0
_LOCK = re.compile(r"\.worker-(\d+)-of-(\d+)\.lock")


def prepare(config: Mapping[str, Any]) -> LatentCache | None:
    """Run the steps that a composed configuration (plain containers) asks for.

    Returns:
        the cache; None if ``cache`` is not among the steps, or other workers have not finished it.

    Raises:
        ValueError: for settings, captions, masks or videos with which nothing can be prepared.
        MissingWeights: before anything is decoded.
        storymem.stopping.Stopped: after SIGINT, SIGTERM or SIGUSR1; what was finished is recorded.
    """
    settings = build_settings(PrepareSettings, config)
    output = Path(settings.output)
    found = scan_videos(Path(settings.videos), without=[output, *([Path(settings.masks)] if settings.masks else [])])
    captions = read_captions(found, Path(settings.captions) if settings.captions else None)
    if captions.respelled:
        name, video = min(captions.respelled.items())
        print(
            "names in captions that are spelled differently than the videos (accents, spaces): "
            f"{len(captions.respelled)}, such as {name!r} for {video!r}",
            file=sys.stderr,
        )
    masks = find_masks(Path(settings.masks), found) if settings.masks else {}
    _check_weights(settings)
    if (output / "journal").exists():
        raise FileError(f"{output} was prepared by an older version: prepare the data again, in another output folder")
    with stopping_on_signals(), _locked(output, settings):
        from storymem.data.steps import run_steps

        run = Preparation(settings, found, captions, masks)
        try:
            return run_steps(run)
        finally:
            run.write_rejected()


def _check_weights(settings: PrepareSettings) -> None:
    """Raise ``MissingWeights`` if networks that the steps need are not on this machine."""
    from storymem.scorers import scorer_weights
    from storymem.weights import locate

    wanted = []
    if "cache" in settings.steps:
        check_weights(settings.model, text_to_video=False, experts=())
        wanted += scorer_weights(settings.scorer.quality)
    if not {"embed", "cache"}.isdisjoint(settings.steps):
        wanted += scorer_weights(settings.scorer.clip)
    for weights in wanted:
        locate(weights)


@contextmanager
def _locked(output: Path, settings: PrepareSettings) -> Iterator[None]:
    """Inside the block this process is the worker that ``settings`` name, and all workers agree on their number.

    If no other process works on ``output``, what killed ones left is removed first.
    """
    own = f".worker-{settings.worker:03d}-of-{settings.workers:03d}.lock"
    with ExitStack() as locks:
        with folder_lock(output, "beginning to prepare data in", name=".shared.lock", wait=60.0):
            others = [path.name for path in sorted(output.glob(".worker-*.lock")) if path.is_file() and _is_held(path)]
            for name in others:
                match = _LOCK.fullmatch(name)
                if match is not None and (name == own or int(match[2]) != settings.workers):
                    raise FileError(
                        f"another prepare_data works on {output} (workers={int(match[2])} worker={int(match[1])}): to "
                        "share the work, start N with workers=N and worker=0 to N - 1"
                    )
            locks.enter_context(folder_lock(output, "preparing data in", name=own))
            if not others:
                for folder in filter(Path.is_dir, output.glob("cache/*")):
                    remove_leftovers(folder)
        yield


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True


class Preparation:
    """One run over a training set: what it works on, what each record depends on, and what was left out.

    Args:
        settings: everything.
        found: the folder of the videos.
        captions: of the videos.
        masks: video -> its mask, for those that have one.
    """

    def __init__(
        self, settings: PrepareSettings, found: VideoFolder, captions: Captions, masks: Mapping[str, Path]
    ) -> None:
        self.settings, self.output = settings, Path(settings.output)
        self.folder, self.videos, self.captions, self.masks = found.path, found.videos, captions, masks
        self._rejected: dict[str, tuple[str, str]] = {}  # file, video, shot, clip or caption -> step and reason
        self._stamps = {video: _stamp(found.path / video) for video in found.videos}
        for path, reason in found.ignored.items():
            if captions.table is None or found.path / path != captions.table:
                self.reject(path, "find", reason)
        for text in captions.unused:
            self.reject(text, "find", "caption without a video: no video has its name")

    def manifest(self, step: Step) -> Manifest:
        """The manifest of a step, which this worker writes; it has the records of all workers at this moment."""
        return Manifest(self.output / "manifest", step, self.settings.worker)

    def is_mine(self, key: str) -> bool:
        """Whether an item is for this worker."""
        return int(digest(key), 16) % self.settings.workers == self.settings.worker

    def reject(self, key: str, step: str, reason: str) -> None:
        """Leave an item out; ``reason`` begins with words to count by and a colon."""
        self._rejected[key] = step, reason

    # What the records of each step depend on.

    def split_inputs(self, video: str) -> str:
        """Of the shots of a video."""
        return digest(self._stamps[video], self.settings.split.splitter, self.settings.split.threshold)

    def clip_inputs(self, clip: Clip) -> str:
        """Of the frames of a clip."""
        return digest(self._stamps[clip.video], clip.start, clip.fps, asdict(clip.bucket))

    def check_inputs(self, clip: Clip) -> str:
        """Of the check of a clip."""
        return digest(self.clip_inputs(clip), asdict(self.settings.check))

    def cache_inputs(self, clip: Clip) -> str:
        """Of the cached tensors of a clip: its frames, and its mask if it has one."""
        frames, mask = self.clip_inputs(clip), self.masks.get(clip.video)
        return frames if mask is None else digest(frames, _stamp(mask))

    # What the steps have found.

    def shots(self) -> list[Shot]:
        """The shots of all videos. ``ValueError`` if some were not split yet."""
        manifest, found, missing = self.manifest("split"), [], []
        for video in self.videos:
            record = manifest.get(video, self.split_inputs(video))
            if record is None:
                missing.append(video)
            elif "reason" in record:
                self.reject(video, "split", record["reason"])
            else:
                same = {name: record[name] for name in ("fps", "height", "width")}
                found += [Shot(video=video, start=start, end=end, **same) for start, end in record["shots"]]
        refuse_unfinished("split", missing)
        return found

    @cached_property
    def clips(self) -> dict[str, Clip]:
        """All clips that the shots give and that have captions, by id."""
        clips: dict[str, Clip] = {}
        for shot in self.shots():
            try:
                cut = cut_shot(shot, self.settings.data, self.settings.split)
            except ValueError as error:
                self.reject(f"{shot.video}@{shot.start:.3f}", "split", str(error))
                continue
            for clip in cut:
                if self.captions.of(clip.video, clip.start, clip.end) is None:
                    self.reject(clip.id, "split", "no caption")
                else:
                    clips[clip.id] = clip
        if not clips:
            raise ValueError(
                f"no clip is left of {len(self.videos)} videos: {self.output / 'rejected.jsonl'} has the reasons"
            )
        used = {id(self.captions.of(clip.video, clip.start, clip.end)) for clip in clips.values()}
        for video in sorted({clip.video for clip in clips.values()}):
            for caption in self.captions.by_video[video]:
                if id(caption) not in used and caption.end < float("inf"):
                    place = f"{video}@{caption.start:g}-{caption.end:g}"
                    self.reject(place, "split", "unused caption: no clip lies in these seconds")
        return clips

    def good_clips(self) -> dict[str, Clip]:
        """The clips that passed the check. ``ValueError`` if some were not checked yet, or none passed."""
        manifest, good, missing = self.manifest("check"), {}, []
        for id, clip in self.clips.items():
            record = manifest.get(id, self.check_inputs(clip))
            if record is None:
                missing.append(id)
            elif record["reason"] is not None:
                self.reject(id, "check", record["reason"])
            else:
                good[id] = clip
        refuse_unfinished("check", missing)
        if not good:
            raise ValueError(f"no clip of {len(self.clips)} passed the check: see {self.output / 'rejected.jsonl'}")
        return good

    def caption(self, clip: Clip) -> str:
        """The text that a clip is trained with."""
        caption = self.captions.of(clip.video, clip.start, clip.end)
        assert caption is not None
        return caption.text

    def read(self, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
        """Frames of a clip, see :func:`storymem.data.clips.read_clip`; ``ValueError`` too if its video has changed."""
        frames = read_clip(self.folder / clip.video, clip, indices)
        status = check_regular(self.folder / clip.video).stat()
        if [status.st_size, status.st_mtime_ns] != self._stamps[clip.video][:2]:
            raise ValueError("changed: the video was written to while it was prepared; run the same command again")
        return frames

    def read_mask(self, clip: Clip) -> np.ndarray | None:
        """The mask of a clip, see :func:`storymem.data.clips.read_mask`; None if its video has none."""
        mask = self.masks.get(clip.video)
        return None if mask is None else read_mask(mask, self.folder / clip.video, clip)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block this worker alone writes the files that all of them share."""
        with folder_lock(self.output, "writing the index of", name=".shared.lock", wait=_LOCK_SECONDS):
            yield

    def write_rejected(self) -> None:
        """Write ``rejected.jsonl`` and print how many items were left out for which reason.

        What earlier steps left out stays, and so does what later steps left out in an earlier run.
        """
        with suppress(ValueError):  # steps that are not finished have raised it themselves
            self.good_clips()
        path = self.output / "rejected.jsonl"
        with self.locked():
            for key, step, reason in _read_rejected(path):
                if step in {"group", "cache"}.difference(self.settings.steps):
                    self._rejected.setdefault(key, (step, reason))
            rows = [{"key": key, "step": step, "reason": why} for key, (step, why) in sorted(self._rejected.items())]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        counts = Counter(reason.partition(":")[0] for _, reason in self._rejected.values())
        if counts:
            listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            print(f"left out: {listed}; see {path}", file=sys.stderr)


def refuse_unfinished(step: Step, missing: Sequence[str]) -> None:
    """``ValueError`` if a step has left items to do."""
    if missing:
        raise ValueError(
            f"step {step} has not finished {len(missing)} items, the first is {missing[0]}: run it (steps=[{step}]) "
            "with the same settings, or wait for the other workers"
        )


def _read_rejected(path: Path) -> Iterator[tuple[str, str, str]]:
    """(key, step, reason) of an earlier run, as far as the file can be read."""
    try:
        lines = text_lines(read_text(path, limit=NO_LIMIT))
    except (FileNotFoundError, FileError):
        return
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # the file is rewritten
            row = json.loads(line)
            values = row["key"], row["step"], row["reason"]
            if all(isinstance(value, str) for value in values):
                yield values


def _stamp(path: Path) -> list[int | str]:
    """Differs if a file has changed or is read differently: size, time, a hash of beginning and end, READING."""
    status = check_regular(path).stat()
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
        file.seek(max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES))
        sample += file.read(_SAMPLE_BYTES)
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(sample).hexdigest()[:16], READING]
