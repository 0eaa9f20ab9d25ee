"""One run of data preparation: what it works on, what each result depends on, and what was left out."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from storymem.data.captions import Captions
from storymem.data.clips import Clip, Shot, cut_shot, read_clip
from storymem.data.journal import Journal
from storymem.data.masks import Masks
from storymem.data.sealed import NO_LIMIT, digest
from storymem.data.settings import PrepareSettings
from storymem.data.video_folder import VideoFolder
from storymem.io import FileError, check_regular, folder_lock, read_text, text_lines, write_text
from storymem.media.video import READING

_SAMPLE_BYTES = 4096
_LOCK_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A file, video, shot, clip or caption that is not used, and why; ``reason`` begins with words to count by."""

    key: str
    step: str
    reason: str


class Preparation:
    """One run over a training set.

    Args:
        settings: everything.
        found: the folder of the videos.
        output: of the training set.
        captions: of the videos.
        masks: of the videos, if there are any.
    """

    def __init__(
        self,
        settings: PrepareSettings,
        found: VideoFolder,
        output: Path,
        captions: Captions,
        masks: Masks | None = None,
    ) -> None:
        self.settings, self.folder, self.output = settings, found.path, output
        self.videos, self.captions = found.videos, captions
        self.masks = masks or Masks(folder=found.path, videos=found.path, files={})
        self.rejected: dict[str, Rejection] = {}
        self._stamps = {video: _stamp(found.path / video) for video in found.videos}
        for path, reason in found.ignored.items():
            if captions.table is None or path != _below(found.path, captions.table):
                self.reject(path, "find", reason)
        for text in captions.unused:
            self.reject(text, "find", "caption without a video: no video has its name")

    def journal(self, step: str) -> Journal:
        """The journal of a step, written by this worker."""
        return Journal(self.output / "journal", step, self.settings.worker)

    def is_mine(self, key: str) -> bool:
        """Whether this worker is the one to do an item."""
        return int(digest(key), 16) % self.settings.workers == self.settings.worker

    def reject(self, key: str, step: str, reason: str) -> None:
        """Leave an item out."""
        self.rejected[key] = Rejection(key=key, step=step, reason=reason)

    def split_made(self, video: str) -> str:
        """What the shots of a video depend on."""
        return digest(self._stamps[video], self.settings.split.splitter, self.settings.split.threshold)

    def clip_made(self, clip: Clip) -> str:
        """What the frames of a clip depend on."""
        return digest(self._stamps[clip.video], clip.start, clip.fps, asdict(clip.bucket))

    def cache_made(self, clip: Clip) -> str:
        """What the cached tensors of a clip depend on: its frames, and its mask if it has one."""
        mask = self.masks.path(clip.video)
        return self.clip_made(clip) if mask is None else digest(self.clip_made(clip), _stamp(mask))

    def check_made(self, clip: Clip) -> str:
        """What the check of a clip depends on."""
        return digest(self.clip_made(clip), asdict(self.settings.check))

    def shots(self) -> list[Shot]:
        """The shots of all videos. ``ValueError`` if some were not split yet."""
        journal, found, missing = self.journal("split"), [], []
        for video in self.videos:
            record = journal.get(video, self.split_made(video))
            if record is None:
                missing.append(video)
            elif "reason" in record:
                self.reject(video, "split", record["reason"])
            else:
                same = {name: record[name] for name in ("fps", "height", "width")}
                found += [Shot(video=video, start=start, end=end, **same) for start, end in record["shots"]]
        _refuse_unfinished("split", missing)
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
            raise ValueError(f"no clip is left of {len(self.videos)} videos: {self.output / 'rejected.jsonl'} says why")
        used = {id(self.captions.of(clip.video, clip.start, clip.end)) for clip in clips.values()}
        for video in sorted({clip.video for clip in clips.values()}):
            for caption in self.captions.by_video[video]:
                if id(caption) not in used and caption.end < float("inf"):
                    place = f"{video}@{caption.start:g}-{caption.end:g}"
                    self.reject(place, "split", "unused caption: no clip lies in these seconds")
        return clips

    def good_clips(self) -> dict[str, Clip]:
        """The clips that passed the check. ``ValueError`` if some were not checked yet, or none passed."""
        journal, good, missing = self.journal("check"), {}, []
        for id, clip in self.clips.items():
            record = journal.get(id, self.check_made(clip))
            if record is None:
                missing.append(id)
            elif record["reason"] is not None:
                self.reject(id, "check", record["reason"])
            else:
                good[id] = clip
        _refuse_unfinished("check", missing)
        if not good:
            raise ValueError(f"no clip of {len(self.clips)} passed the check: see {self.output / 'rejected.jsonl'}")
        return good

    def caption(self, clip: Clip) -> str:
        """The text that a clip is trained with."""
        caption = self.captions.of(clip.video, clip.start, clip.end)
        assert caption is not None
        return caption.text

    def read(self, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
        """Frames of a clip; see :func:`storymem.data.clips.read_clip`.

        Raises:
            ValueError: also if the video is another than at the beginning of the run.
        """
        frames = read_clip(self.folder, clip, indices)
        status = check_regular(self.folder / clip.video).stat()
        if [status.st_size, status.st_mtime_ns] != self._stamps[clip.video][:2]:
            raise ValueError("changed: the video was written to while it was prepared; run the same command again")
        return frames

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block this worker alone writes what all of them share: groups, indices, ``rejected.jsonl``."""
        with folder_lock(self.output, "writing groups or indices in", name=".shared.lock", wait=_LOCK_SECONDS):
            yield

    def tell_rejected(self) -> None:
        """Write ``rejected.jsonl`` and print how many were left out for what.

        What steps that did not run now have left out is told as well.
        """
        with suppress(ValueError):  # steps that are not done have told so themselves
            self.good_clips()
        path = self.output / "rejected.jsonl"
        with self.writing():
            for before in _rejections(path):
                if before.step in {"group", "cache"}.difference(self.settings.steps):
                    self.rejected.setdefault(before.key, before)
            lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for _, one in sorted(self.rejected.items())]
            write_text(path, "".join(lines))
        counts = Counter(one.reason.partition(":")[0] for one in self.rejected.values())
        if counts:
            listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            print(f"left out: {listed}; see {path}", file=sys.stderr)


def _rejections(path: Path) -> Iterator[Rejection]:
    """What an earlier run left out, as far as the file can be read."""
    try:
        lines = text_lines(read_text(path, limit=NO_LIMIT))
    except (FileNotFoundError, FileError):
        return
    for line in lines:
        with suppress(ValueError, TypeError, RecursionError):  # it is written anew
            row = Rejection(**json.loads(line))
            if all(isinstance(value, str) for value in asdict(row).values()):
                yield row


def _refuse_unfinished(step: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} items are not done by step {step}, {missing[0]} the first of them: run it "
            f"(steps=[{step}]) with the same settings, or wait for the other workers"
        )


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _stamp(path: Path) -> list[int | str]:
    """Changes when a file does, is another, or is read otherwise: size, time, a hash of beginning and end, READING."""
    status = check_regular(path).stat()
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
        file.seek(max(_SAMPLE_BYTES, status.st_size - _SAMPLE_BYTES))
        sample += file.read(_SAMPLE_BYTES)
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(sample).hexdigest()[:16], READING]
