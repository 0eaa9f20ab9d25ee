"""Settings of ``prepare_data.yaml``: where clips come from and what becomes of them; loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.training.settings import refuse_generation_settings
from storymem.wan.settings import Dtype, ModelSettings, RuntimeSettings

Step = Literal["split", "check", "embed", "group", "cache"]
STEPS: tuple[Step, ...] = ("split", "check", "embed", "group", "cache")
_MOST_FRAMES, _LONGEST_SIDE, _MOST_PIXELS, _MOST = 1025, 8192, 10**9, 100_000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Bucket:
    """One size that clips are brought to: frames (4n + 1), height and width (multiples of 16) in pixels."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 5 or self.frames % 4 != 1:
            below = max(5, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(
                f"frames must be 4n + 1 and at least 5, not {self.frames}: the nearest are {below} and {below + 4}"
            )
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, not {getattr(self, name)}")
        check_bounds(self, frames=(5, _MOST_FRAMES), height=(16, _LONGEST_SIDE), width=(16, _LONGEST_SIDE))
        if (pixels := self.frames * self.height * self.width) > _MOST_PIXELS:
            raise ValueError(f"frames, height and width make {pixels:,} pixels; a clip has {_MOST_PIXELS:,} or fewer")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """The sizes of a training set.

    Args:
        buckets: a shot goes to the longest bucket that it fills, and among those of that length to the one nearest
            to it in aspect ratio.
        fps: of all clips; the rate at which the video model works.
    """

    buckets: tuple[Bucket, ...]
    fps: float

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets must name at least one size: frames, height and width")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets names a size twice")
        if self.fps <= 0:
            raise ValueError(f"fps must be above 0, not {self.fps}")
        check_bounds(self, fps=(0, 240))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SplitSettings:
    """How long videos become clips.

    Args:
        splitter: "transnetv2" finds hard cuts and most transitions; "scenedetect" is light and finds hard cuts;
            "none": every video is one shot already.
        threshold: of the splitter: TransNetV2's probability of a cut (0.5), or scenedetect's change of content
            (27.0); None: these.
        margin: seconds left out on both sides of a cut, where transitions linger.
        clips_per_shot: most clips taken of one shot, one after the other.
    """

    splitter: Literal["transnetv2", "scenedetect", "none"] = "none"
    threshold: float | None = None
    margin: float = 0.0
    clips_per_shot: int = 1

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}")
        if self.threshold is not None:
            check_bounds(self, threshold=(0, 255))
        check_bounds(self, margin=(0, 3600), clips_per_shot=(1, _MOST))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckSettings:
    """Which clips are refused.

    Args:
        frames: how many frames of a clip are looked at, spread evenly, first and last among them.
        black: a clip is black if none of these has a mean brightness above this (0..255; -1: none is).
        frozen: a clip is frozen if no two neighbours of these differ by more on average (0..255; -1: none is).
    """

    frames: int = 8
    black: float = 12.0
    frozen: float = 0.5

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise ValueError(f"frames must be 2 or more, not {self.frames}: a frozen clip shows in two frames")
        check_bounds(self, frames=(2, _MOST_FRAMES), black=(-1, 255), frozen=(-1, 255))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupSettings:
    """Which clips are alike. Similarity is the cosine of mean CLIP embeddings.

    Args:
        frames: how many frames of a clip are embedded, spread evenly.
        within: None: any clips may come together; "folder", "video": only clips of one folder, or of one long video,
            where that is known to show the same people and places (a folder for each film, say). Near-duplicates
            are then looked for there alone.
        similarity: every two clips of a group are at least this similar.
        near_duplicate: of two clips at least this similar only one is used at all; above 1 all are.
        min_size: clips that find fewer companions are left out; 1 keeps them, in groups of their own.
        max_size: of a group.
        neighbours: how many of its most similar clips a clip can be grouped with.
        search: "exact"; "faiss" (approximate, for large sets); "auto": faiss from 20,000 clips on, if installed.
        valid_fraction: share of the groups held out for validation.
    """

    frames: int = 4
    within: Literal["folder", "video"] | None = None
    similarity: float = 0.75
    near_duplicate: float = 0.97
    min_size: int = 2
    max_size: int = 16
    neighbours: int = 64
    search: Literal["auto", "exact", "faiss"] = "auto"
    valid_fraction: float = 0.02

    def __post_init__(self) -> None:
        check_bounds(self, frames=(1, _MOST_FRAMES), near_duplicate=(-1, 2), max_size=(1, _MOST), neighbours=(1, _MOST))
        if not -1 <= self.similarity < self.near_duplicate:
            raise ValueError(
                f"similarity={self.similarity} must lie between -1 and near_duplicate={self.near_duplicate}: "
                "clips of a group are alike, but not the same"
            )
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size={self.min_size} must lie between 1 and max_size={self.max_size}")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"valid_fraction must be at least 0 and below 1, not {self.valid_fraction}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheSettings:
    """What is stored of a clip.

    Args:
        given: for which numbers of first frames conditions are stored: 1 for MI2V, 5 for MM2V.
        dtype: in which latents are stored; text embeddings keep the text encoder's own.
        shard_mb: size at which a file is full.
    """

    given: tuple[Literal[1, 5], ...] = (1, 5)
    dtype: Dtype = "float16"
    shard_mb: float = 128

    def __post_init__(self) -> None:
        if self.shard_mb <= 0:
            raise ValueError(f"shard_mb must be above 0, not {self.shard_mb}")
        check_bounds(self, shard_mb=(0, _MOST))
        if len(set(self.given)) < len(self.given):
            raise ValueError(f"given names a number twice: {list(self.given)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScorerSettings:
    """The image encoder that groups clips and chooses keyframes, and the quality filter of keyframes."""

    clip: dict[str, Any]
    quality: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareSettings:
    """Everything ``scripts/prepare_data.py`` can be told.

    Args:
        videos: a folder; all videos in it and below.
        output: a folder for the training set.
        captions: a ``.jsonl`` or ``.csv`` file; None: ``captions.jsonl`` or ``captions.csv`` in ``videos`` if there is
            one, and ``.txt`` files beside the videos.
        masks: a folder with a video of the path and name of each that has a mask, light where the subject is, which
            ``objective.mask_weight`` of a training can count more; None: there are no masks.
        memory: as in generation; of it the selector chooses the candidate keyframes.
        sampler: comes with the model's file; it has no say here.
        steps: which steps run; the others' results must be there.
        workers: how many processes share the work, each started with its own ``worker``; ``group`` is for one.
        worker: which of them this is, from 0.
    """

    videos: UserPath
    output: UserPath
    data: DataSettings
    model: ModelSettings
    scorer: ScorerSettings
    memory: dict[str, Any]
    cache: CacheSettings = field(default_factory=CacheSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    check: CheckSettings = field(default_factory=CheckSettings)
    group: GroupSettings = field(default_factory=GroupSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    sampler: dict[str, Any] = field(default_factory=dict)
    captions: UserPath | None = None
    masks: UserPath | None = None
    steps: tuple[Step, ...] = STEPS
    workers: int = 1
    worker: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"steps must name at least one of {', '.join(STEPS)}")
        check_bounds(self, workers=(1, _MOST))
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"worker={self.worker} must lie between 0 and workers - 1 = {self.workers - 1}")
        refuse_generation_settings(self.runtime, "data preparation")
        if self.runtime.spread:
            raise ValueError(
                "runtime.context_parallel, guidance_parallel and shard_weights are for generation; several processes "
                "prepare data beside each other by workers and worker"
            )
        if "selector" not in self.memory:
            raise ValueError("memory has no selector: write memory=storymem")
        if self.data.fps != self.model.video.fps:
            raise ValueError(
                f"data.fps={self.data.fps:g}, but the model {self.model.name} makes {self.model.video.fps} frames a "
                "second: choose data=480p, data=720p or data=toy to go with model="
            )
