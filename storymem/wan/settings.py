"""Settings of the video model, as the config groups ``model``, ``sampler`` and ``runtime`` hold them."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from storymem.config import STRICT, UserPath, check_bounds
from storymem.wan.spec import A14B, COMPONENTS, T2V_A14B, TI2V_5B, ModelSpec
from storymem.weights import Weights

Continuity = Literal["none", "mi2v", "mm2v"]
Dtype = Literal["float32", "bfloat16", "float16"]
ContextParallel = Literal["none", "ulysses", "ring"]
Attention = Literal["auto", "flash3", "flash2", "cudnn", "sage", "native"]
StepCache = Literal["none", "first_block", "taylor"]
MemoryMode = Literal["joint", "cached"]
BaseName = Literal["wan2.2-a14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"]
MemoryCache = Literal["device", "cpu", "recompute"]
Offload = Literal["none", "model", "group", "auto"]
Precision = Literal["as_is", "fp8_storage"]

#: Positions on the temporal axis that a network knows, where its configuration does not state it.
POSITIONS = 1024
LONGEST_SIDE, MOST_PIXELS = 8192, 2 * 10**9
_MOST_FRAMES = 4 * (POSITIONS - 1) + 1
MAX_SEED = 2**63 - 1

#: Weights in one file, of which the path is enough.
WeightsFile = Annotated[
    Weights, BeforeValidator(lambda it: {"name": PurePath(it).name, "source": it} if isinstance(it, str) else it)
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoSettings:
    """Size and length of a shot: pixels, frames and frames per second; the base model states which are possible."""

    height: int
    width: int
    frames: int
    fps: int

    def __post_init__(self) -> None:
        check_bounds(self, height=(16, LONGEST_SIDE), width=(16, LONGEST_SIDE), frames=(5, _MOST_FRAMES), fps=(1, 240))
        if self.height * self.width * self.frames > MOST_PIXELS:
            raise ValueError(
                f"height x width x frames is {self.height * self.width * self.frames:,} pixels; a shot has at most "
                f"{MOST_PIXELS:,}: make it smaller or shorter"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkSettings:
    """Shape of the networks: for plans, and to build networks where there are no weights.

    Args:
        transformer: arguments of ``WanTransformer3DModel``, without ``in_channels``, which follows from the task.
        vae: arguments of ``AutoencoderKLWan``; empty: as in the weights, and for plans Wan's.
        text_encoder: arguments of ``UMT5Config``; empty: likewise.
        text_tokens: length to which prompts are padded.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    text_tokens: int = 512

    def __post_init__(self) -> None:
        check_bounds(self, text_tokens=(1, 4096))
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim"):
            value = self.transformer.get(name)
            if type(value) is not int or not 1 <= value <= 1_000_000:
                raise ValueError(f"transformer.{name} must be a whole number from 1 to 1,000,000, not {value!r}")

    @property
    def positions(self) -> int:
        """Temporal positions in the transformer's table, on either side of 0."""
        return self.transformer.get("rope_max_seq_len", POSITIONS)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterSettings:
    """The memory LoRA.

    Args:
        weights: a local folder or a hub repository.
        folders: for each ``continuity`` the sub-folder with its two files; empty if ``weights`` is that folder.
        alpha: for files without it; None: the published 128 in the released layout, else the rank.
        use_rslora: for files without it; None: the published true in the released layout, else false.
        weight: strength of the adapter; 1.0 as trained.
        objective: the system that it must have been trained for: "memory" is StoryMem.
        query: whether its files must hold a KeyframeQuery, which recalls keyframes.
    """

    weights: Weights
    folders: dict[Continuity, str] = field(default_factory=dict)
    alpha: float | None = None
    use_rslora: bool | None = None
    weight: float = 1.0
    objective: str = "memory"
    query: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, alpha=(1e-6, 1e6), weight=(-10, 10))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExtraAdapterSettings:
    """A LoRA beside the memory adapter (style, character, few steps); it may cover any part of the networks.

    Args:
        source: a file or folder, or a hub repository that was downloaded before.
        weight: strength, a factor on the scale that it was trained at.
        expert: which expert it is loaded into.
    """

    source: UserPath
    weight: float = 1.0
    expert: Literal["both", "high_noise", "low_noise"] = "both"

    def __post_init__(self) -> None:
        check_bounds(self, weight=(-10, 10))

    @property
    def weights(self) -> Weights:
        return Weights(name=f"adapter {self.source}", source=self.source)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GgufSettings:
    """The experts as single files: GGUF, or safetensors as published for ComfyUI; the second only where there are two.

    Each is the path of a file, or its :class:`Weights`.
    """

    high_noise: WeightsFile
    low_noise: WeightsFile | None = None

    @property
    def all(self) -> list[Weights]:
        """The files there are."""
        return [weights for weights in (self.high_noise, self.low_noise) if weights is not None]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """A Wan2.2-style video model with memory.

    Args:
        name: for plans and manifests.
        base: the base model; see :mod:`storymem.wan.spec`.
        video: size and length of its shots.
        network: shape of its networks.
        weights: a folder or repository of the image-to-video model, in diffusers' layout or a folder in Wan's original
            one; None: random weights from ``seed``.
        gguf: files for the experts, in place of the transformers in ``weights``.
        vae, text_encoder: files, in place of those in ``weights``. If all are files, only its tokenizer is read.
        text_to_video: weights of the text-to-video model for the first shot; only its transformers are used.
        text_to_video_gguf: files for its transformers, in place of ``text_to_video``.
        has_text_to_video: whether ``first_shot: t2v`` has a model of its own. If not, the memory-to-video model
            generates the first shot from text alone.
        adapter: the memory LoRA; None: the weights themselves know memory, or are random.
        adapters: other LoRAs, also for the text-to-video model.
        rope_stride: S, the distance between memory frames on the temporal axis.
        memory_attention: the layout of memory in :mod:`storymem.wan.segments`; an adapter is trained for one of them.
        boundary: timesteps >= boundary * 1000 go to the high-noise expert; None: there is one expert.
        text_to_video_boundary: the same for the text-to-video model.
        dtype: of the transformers and the text encoder.
        vae_dtype: of the VAE.
        seed: of random weights.
    """

    name: str
    base: BaseName = "wan2.2-a14b"
    video: VideoSettings
    network: NetworkSettings
    weights: Weights | None = None
    gguf: GgufSettings | None = None
    vae: WeightsFile | None = None
    text_encoder: WeightsFile | None = None
    text_to_video: Weights | None = None
    text_to_video_gguf: GgufSettings | None = None
    has_text_to_video: bool = True
    adapter: AdapterSettings | None = None
    adapters: tuple[ExtraAdapterSettings, ...] = ()
    rope_stride: int = 5
    memory_attention: MemoryMode = "joint"
    boundary: float | None = A14B.boundary
    text_to_video_boundary: float = 0.875
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    seed: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The base model."""
        return {"wan2.2-a14b": A14B, "wan2.2-t2v-a14b": T2V_A14B, "wan2.2-ti2v-5b": TI2V_5B}[self.base]

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of its ``WanTransformer3DModel``."""
        return {**self.network.transformer, "in_channels": self.spec.in_channels}

    @property
    def text_model(self) -> ModelSettings:
        """The model whose transformers generate a first shot from text alone, by its own settings; or this one."""
        if not self.has_text_to_video:
            return self
        return replace(
            self,
            base="wan2.2-t2v-a14b",
            weights=self.text_to_video or self.weights,
            gguf=self.text_to_video_gguf,
            text_to_video=None,
            text_to_video_gguf=None,
            has_text_to_video=False,
            adapter=None,
            boundary=self.text_to_video_boundary,
            seed=(self.seed + 10) % MAX_SEED,
        )

    def own_weights(self, setting: str) -> str:
        """What to do if the weights in ``setting`` do not fit; the base is published in its own shape only."""
        if self.network.vae or self.network.text_encoder:
            return f"leave {setting}.source out, to use the weights of {self.name}"
        return f"hf download {self.spec.repository}, and {setting}.source={self.spec.repository}"

    def file_of(self, name: str) -> Weights | None:
        """The single file of a component (as ``model_index.json`` names it); None if it is in a folder."""
        if name in COMPONENTS.values():
            pair = self.gguf
            return None if pair is None else pair.high_noise if name == "transformer" else pair.low_noise
        return {"vae": self.vae, "text_encoder": self.text_encoder}.get(name)

    def folder_of(self, *names: str) -> Weights | None:
        """Where those of the components ``names`` are that are not single files; None if nowhere."""
        names, weights = tuple(name for name in names if self.file_of(name) is None), self.weights
        if weights is None or not names:
            return None
        if weights.is_local and weights.file and (weights.path / "high_noise_model").is_dir():
            return replace(weights, file=None)  # Wan's original layout has no folders of these names
        if names == ("tokenizer",) and not weights.is_local:
            return replace(weights, name=f"{weights.name} (tokenizer)", file="tokenizer/*", size_gb=0.02)
        return weights

    def __post_init__(self) -> None:
        self.spec.latent_size(self.video.height, self.video.width)
        self.spec.latent_frames(self.video.frames)
        check_bounds(self, rope_stride=(1, POSITIONS - 1), seed=(0, MAX_SEED))
        check_bounds(self, boundary=(0, 1), text_to_video_boundary=(0, 1))
        if self.spec.layouts and self.memory_attention not in self.spec.layouts:
            raise ValueError(
                f"memory_attention={self.memory_attention} is not for {self.spec.name}: use {self.spec.layouts[0]}"
            )
        if (self.boundary is None) != (len(self.spec.experts) == 1):
            raise ValueError(f"boundary separates two experts; {self.spec.name} has {len(self.spec.experts)}")
        if self.has_text_to_video and self.base != "wan2.2-a14b":
            raise ValueError(f"{self.spec.name} generates first shots itself: set has_text_to_video to false")
        for name, what in {"gguf": "the experts", "vae": "the VAE", "text_encoder": "the text encoder"}.items():
            if self.weights is None and getattr(self, name) is not None:
                raise ValueError(f"{name} holds {what} alone: weights must name where the rest comes from")
        for name, pair in {"gguf": self.gguf, "text_to_video_gguf": self.text_to_video_gguf}.items():
            if pair is not None and len(pair.all) != (experts := len(self.spec.experts)):
                raise ValueError(f"{name} names {len(pair.all)} files, and {self.spec.name} has {experts} experts")
        by_text = self.text_to_video or self.text_to_video_gguf
        if self.weights is not None and self.has_text_to_video and by_text is None:
            raise ValueError("text_to_video names no weights: give them, or set has_text_to_video to false")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StepAdapterSettings:
    """A step-distilled LoRA on top of the memory LoRA: few steps, and no guidance.

    Args:
        weights: its files for image-to-video, one for each expert.
        text_to_video: those for text-to-video; None: there are none, so a model with text-to-video networks needs
            ``first_shot: m2v``.
        weight: strength in the high-noise expert; 1.0 as trained.
        weight_low: in the low-noise expert; None: as ``weight``.
    """

    weights: Weights
    text_to_video: Weights | None = None
    weight: float = 1.0
    weight_low: float | None = None

    def __post_init__(self) -> None:
        check_bounds(self, weight=(-10, 10), weight_low=(-10, 10))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplerSettings:
    """How a shot is sampled; the defaults are the published settings.

    Args:
        scheduler: "unipc", the published solver of second order, or "euler", for step-distilled adapters.
        adapter: a step-distilled LoRA.
        steps: denoising steps.
        guidance: classifier-free guidance of the high-noise expert; 1.0 means none (and half the work).
        guidance_low: of the low-noise expert; None: as ``guidance``.
        negative_sees_memory: whether the pass with the negative prompt sees the memory, as published. If not, guidance
            strengthens memory as it does the prompt; for adapters trained with memory left out at times.
        shift: of the noise levels, for memory-to-video.
        text_to_video_shift: for a first shot by text-to-video.
        negative_prompt: for shots without their own.
    """

    scheduler: Literal["unipc", "euler"] = "unipc"
    adapter: StepAdapterSettings | None = None
    steps: int = 40
    guidance: float = 3.5
    guidance_low: float | None = None
    negative_sees_memory: bool = True
    shift: float = A14B.shift
    text_to_video_shift: float = T2V_A14B.shift
    negative_prompt: str = ""

    @property
    def text_sampler(self) -> SamplerSettings:
        """For a first shot by text-to-video; ``ValueError`` if there is a step-distilled adapter, but none for that."""
        adapter = self.adapter
        if adapter is not None:
            if adapter.text_to_video is None:
                raise ValueError(
                    f"sampler.adapter names no weights for text-to-video, which needs more than {self.steps} steps "
                    "without them: set sampler.adapter.text_to_video, or generate the first shot from reference images "
                    "(first_shot=m2v)"
                )
            adapter = replace(adapter, weights=adapter.text_to_video)
        return replace(self, adapter=adapter, shift=self.text_to_video_shift)

    def __post_init__(self) -> None:
        check_bounds(self, steps=(1, 1000), shift=(0.01, 100), text_to_video_shift=(0.01, 100))
        check_bounds(self, guidance=(1, 100), guidance_low=(1, 100))  # 1: none
        if self.guidance == 1 and ((self.guidance_low or 1) > 1 or not self.negative_sees_memory):
            name = "guidance_low" if self.negative_sees_memory else "negative_sees_memory=false"
            raise ValueError(f"{name} needs guidance above 1: without it there is no pass with the negative prompt")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RuntimeSettings:
    """Where and how the networks run.

    Only ``cache``, ``precision`` and ``attention: sage`` change a film by more than rounding. What goes together is
    checked by :func:`storymem.wan.combinations.check_combinations`.

    Args:
        device: "auto" (the accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
        offload: "none": all networks stay on the device; "model": whole networks are moved there one at a time;
            "group": the blocks of the transformers are streamed. "auto": the fastest of these that fits.
        precision: of the weights of the transformers' blocks. "as_is": ``model.dtype``, or the 8 bits or fewer of their
            files. "fp8_storage": stored as 8-bit floats, on any device. Adapters stay as they are.
        experts: "together": both of a model's two are loaded. "in_turn": one at a time, read from disk again at each
            change, twice a shot; the quality filter is then loaded for each shot, too.
        vae_tiling: encode and decode in tiles: less VRAM, slower, and faint differences where tiles overlap.
        threads: CPU threads of torch; None: torch's choice.
        context_parallel: how the tokens of a shot are shared among processes: "ulysses" exchanges attention heads,
            "ring" passes keys and values on.
        guidance_parallel: each half of the processes runs one of the two passes of guidance.
        shard_weights: each process keeps a part of the experts' weights and gathers them block by block.
        processes_per_film: divide the processes into teams of this size, which make films at the same time; None: all
            make one film.
        attention: "auto": the fastest exact kernel that works; "sage" rounds queries and keys to int8.
        compile: "blocks" compiles the block that the transformers repeat, once for each shape.
        cache: skips work in steps that resemble the step before: "first_block" where the first block changes little,
            "taylor" in all but every n-th step, by extrapolation.
        cache_threshold: 0 skips nothing. first_block: relative change of the first block's residual; taylor: steps
            extrapolated after each computed one. None: 0.05 and 2.
        memory_cache: where ``memory_attention: cached`` keeps keys and values (12.8 GB an expert for 10 frames at
            480p): on the "device"; in RAM ("cpu"), copied back block by block; "recompute": nowhere.
    """

    device: str = "auto"
    offload: Offload = "none"
    precision: Precision = "as_is"
    experts: Literal["together", "in_turn"] = "together"
    vae_tiling: bool = False
    threads: int | None = None
    context_parallel: ContextParallel = "none"
    guidance_parallel: bool = False
    shard_weights: bool = False
    processes_per_film: int | None = None
    attention: Attention = "auto"
    compile: Literal["none", "blocks"] = "none"
    cache: StepCache = "none"
    cache_threshold: float | None = None
    memory_cache: MemoryCache = "device"

    def __post_init__(self) -> None:
        check_bounds(self, threads=(1, 4096), processes_per_film=(1, 65536), cache_threshold=(0, 1000))
        if self.cache == "none" and self.cache_threshold is not None:
            raise ValueError("cache_threshold needs a cache: first_block or taylor")
        if self.cache == "taylor" and (self.cache_threshold or 0) % 1:
            raise ValueError(f"with cache: taylor, cache_threshold is a number of steps, not {self.cache_threshold}")

    @property
    def spread(self) -> bool:
        """Whether one film is made by several processes."""
        return self.context_parallel != "none" or self.guidance_parallel or self.shard_weights
