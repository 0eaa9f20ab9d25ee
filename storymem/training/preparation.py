"""One run of data preparation: what it works on, what each result depends on, and what was left out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from storymem.io import write_atomically
from storymem.training.captions import Captions
from storymem.training.clips import Clip, Shot, cut_shot, read_clip
from storymem.training.data_settings import PrepareSettings
from storymem.training.journal import Journal, digest
from storymem.training.masks import Masks


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A video, shot or clip that is not used, and why; ``reason`` begins with a word to count by."""

    key: str
    step: str
    reason: str


class Preparation:
    """One run over a training set.

    Args:
        settings: everything.
        folder: of the videos.
        output: of the training set.
        videos: paths below ``folder``.
        captions: of the videos.
        masks: of the videos, if there are any.
    """

    def __init__(
        self,
        settings: PrepareSettings,
        folder: Path,
        output: Path,
        videos: Sequence[str],
        captions: Captions,
        masks: Masks | None = None,
    ) -> None:
        self.settings, self.folder, self.output = settings, folder, output
        self.videos, self.captions = videos, captions
        self.masks = masks or Masks(folder=folder, videos=folder, files={})
        self.rejected: dict[str, Rejection] = {}
        self._stamps = {video: _stamp(folder / video) for video in videos}

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
        text = self.captions.of(clip.video, clip.start, clip.end)
        assert text is not None
        return text

    def read(self, clip: Clip, indices: Sequence[int] | None = None) -> np.ndarray:
        """Frames of a clip; see :func:`storymem.training.clips.read_clip`."""
        return read_clip(self.folder, clip, indices)

    def tell_rejected(self) -> None:
        """Write ``rejected.jsonl`` and print how many were left out for what.

        What steps that did not run now have left out is told as well.
        """
        with suppress(ValueError):  # steps that are not done have told so themselves
            self.good_clips()
        path = self.output / "rejected.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            before = Rejection(**json.loads(line))
            if before.step in {"group", "cache"}.difference(self.settings.steps):
                self.rejected.setdefault(before.key, before)
        lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for _, one in sorted(self.rejected.items())]
        write_atomically(path, "".join(lines).encode())
        counts = Counter(one.reason.partition(":")[0] for one in self.rejected.values())
        if counts:
            listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            print(f"left out: {listed}; see {path}", file=sys.stderr)


def _refuse_unfinished(step: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} items are not done by step {step}, {missing[0]} the first of them: run it "
            f"(steps=[{step}]) with the same settings, or wait for the other workers"
        )


def _stamp(path: Path) -> list[int]:
    """Changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
