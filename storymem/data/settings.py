"""Settings of ``prepare_data.yaml``; loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.scorers import ScorerSettings
from storymem.wan.settings import Dtype, ModelSettings, Offload, RuntimeSettings

Step = Literal["split", "check", "embed", "group", "cache"]
STEPS: tuple[Step, ...] = ("split", "check", "embed", "group", "cache")
_FRAMES, _SIDE, _PIXELS, _MOST = (5, 1025), (16, 8192), 10**9, 100_000
_ABOVE_0 = 1e-6


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
        check_bounds(self, frames=_FRAMES, height=_SIDE, width=_SIDE)
        if self.height % 16 or self.width % 16:
            raise ValueError(f"height and width must be multiples of 16, not {self.height} and {self.width}")
        if (pixels := self.frames * self.height * self.width) > _PIXELS:
            raise ValueError(f"frames, height and width make {pixels:,} pixels; a clip has {_PIXELS:,} or fewer")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

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
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets must name one or more sizes (frames, height and width), each once")
        check_bounds(self, fps=(_ABOVE_0, 240))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SplitSettings:
    """How long videos become clips.

    Args:
        splitter: "transnetv2" finds hard cuts and most transitions; "scenedetect" is light and finds hard cuts; both
            need pip install 'storymem[train]'. "none": every video is one shot.
        threshold: of the splitter: TransNetV2's probability of a cut, or scenedetect's change of content; null: 0.5
            and 27.0.
        margin: seconds left out on both sides of a cut, where transitions continue.
        clips_per_shot: most clips taken of one shot, one after the other.
    """

    splitter: Literal["transnetv2", "scenedetect", "none"] = "none"
    threshold: float | None = None
    margin: float = 0.0
    clips_per_shot: int = 1

    def __post_init__(self) -> None:
        check_bounds(self, threshold=(_ABOVE_0, 255), margin=(0, 3600), clips_per_shot=(1, _MOST))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckSettings:
    """Which clips are refused.

    Args:
        frames: how many frames of a clip are checked, spread evenly, first and last among them.
        black: a clip is black if none of these has a mean brightness above this (0..255; -1: none is).
        frozen: a clip is frozen if no two neighbours of these differ by more on average (0..255; -1: none is).
    """

    frames: int = 8
    black: float = 12.0
    frozen: float = 0.5

    def __post_init__(self) -> None:
        check_bounds(self, frames=(2, _FRAMES[1]), black=(-1, 255), frozen=(-1, 255))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupSettings:
    """Which clips are alike. Similarity is the cosine of mean CLIP embeddings.

    Args:
        frames: how many frames of a clip are embedded, spread evenly.
        within: null: any clips may be grouped; "folder", "video": only clips of one folder, or of one long video,
            where that is known to show the same people and places (for example a folder for each film). Near-duplicates
            are then searched for there alone.
        similarity: every two clips of a group are at least this similar.
        near_duplicate: of two clips at least this similar only one is used at all; above 1 all are.
        min_size: clips with fewer companions are left out; 1 keeps them, in groups of their own.
        max_size: of a group.
        neighbours: how many of its most similar clips a clip can be grouped with.
        valid_fraction: share of the groups held out for validation.
    """

    frames: int = 4
    within: Literal["folder", "video"] | None = None
    similarity: float = 0.75
    near_duplicate: float = 0.97
    min_size: int = 2
    max_size: int = 16
    neighbours: int = 64
    valid_fraction: float = 0.02

    def __post_init__(self) -> None:
        check_bounds(self, frames=(1, _FRAMES[1]), near_duplicate=(-1, 2), valid_fraction=(0, 0.999))
        check_bounds(self, max_size=(1, _MOST), neighbours=(1, _MOST))
        if not -1 <= self.similarity < self.near_duplicate:
            raise ValueError(
                f"similarity={self.similarity} must lie between -1 and near_duplicate={self.near_duplicate}: "
                "clips of a group are alike, but not the same"
            )
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size={self.min_size} must lie between 1 and max_size={self.max_size}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheSettings:
    """What is stored of a clip.

    Args:
        given: numbers of first frames whose conditioning latents are stored: 1 for MI2V, 5 for MM2V; each takes as
            much space as the clip's latents.
        dtype: of stored latents; text embeddings keep the text encoder's own.
        shard_mb: size at which a file is full.
    """

    given: tuple[Literal[1, 5], ...] = (1, 5)
    dtype: Dtype = "float16"
    shard_mb: float = 128

    def __post_init__(self) -> None:
        check_bounds(self, shard_mb=(_ABOVE_0, _MOST))
        if len(set(self.given)) < len(self.given):
            raise ValueError(f"given names a number twice: {list(self.given)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodingRuntimeSettings:
    """Where and how the VAE, the text encoder and the scorers run; see :class:`storymem.wan.settings.RuntimeSettings`.

    Args:
        device: "auto" (the accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
        offload: "none" keeps all on the device; "model" moves whole networks there one at a time; "group" streams the
            text encoder block by block; "auto" takes the first that fits.
        vae_tiling: encode in tiles: less VRAM, slower, and faint differences where tiles overlap.
        threads: CPU threads for torch; null leaves torch's choice.
    """

    device: str = "auto"
    offload: Offload = "auto"
    vae_tiling: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self, threads=(1, 4096))

    @property
    def placement(self) -> RuntimeSettings:
        """The same as settings of a pipeline."""
        return RuntimeSettings(**vars(self))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareSettings:
    """Everything ``prepare_data`` can be given.

    Args:
        videos: a folder; all videos in it and in its folders.
        output: a folder for the training set; it is the ``dataset`` of a training.
        captions: a ``.jsonl`` or ``.csv`` file; null: ``captions.jsonl`` or ``captions.csv`` in ``videos`` if there is
            one, and ``.txt`` files beside the videos.
        masks: a folder like ``videos``: of each video that has one a mask of the same path and name, light where the
            subject is, to which ``objective.mask_weight`` of a training can give more weight; null: no masks.
        memory: as in generation; its selector chooses the candidate keyframes.
        sampler: part of the model's configuration file; not used here.
        steps: which steps run, each from where it stopped; the results of those left out must be there.
        workers: how many processes or machines share the work, each started with its own ``worker``; ``group`` is for
            one of them.
        worker: which of them this is, from 0.
    """

    videos: UserPath
    output: UserPath
    data: DataSettings
    model: ModelSettings
    scorer: ScorerSettings
    memory: dict[str, Any]
    sampler: dict[str, Any] = field(default_factory=dict)
    cache: CacheSettings = field(default_factory=CacheSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    check: CheckSettings = field(default_factory=CheckSettings)
    group: GroupSettings = field(default_factory=GroupSettings)
    runtime: EncodingRuntimeSettings = field(default_factory=EncodingRuntimeSettings)
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
        if "selector" not in self.memory:
            raise ValueError("memory has no selector: write memory=storymem")
        if self.data.fps != self.model.video.fps:
            raise ValueError(
                f"data.fps={self.data.fps:g}, but the model {self.model.name} makes {self.model.video.fps} frames a "
                "second: choose data=480p, data=720p or data=toy to go with model="
            )
