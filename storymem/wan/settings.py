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
Precision = Literal["as_is", "fp8_storage", "fp8", "int8"]

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
    """Size and length of a shot: pixels, frames (4n + 1) and frames per second."""

    height: int
    width: int
    frames: int
    fps: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, not {getattr(self, name)}")
        if self.frames < 5 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4n + 1 and at least 5, not {self.frames}")
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
    boundary: float | None = 0.9
    text_to_video_boundary: float = 0.875
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    seed: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The base model."""
        return {"wan2.2-a14b": A14B, "wan2.2-t2v-a14b": T2V_A14B, "wan2.2-ti2v-5b": TI2V_5B}[self.base]

    @property
    def text_spec(self) -> ModelSpec:
        """The base model of the networks that generate a first shot from text alone."""
        return T2V_A14B if self.has_text_to_video else self.spec

    def file_of(self, name: str, *, by_text: bool = False) -> Weights | None:
        """The single file of a component (as ``model_index.json`` names it); None if it is in a folder.

        Args:
            by_text: of the text-to-video model.
        """
        pair = self.text_to_video_gguf if by_text else self.gguf
        if name in COMPONENTS.values():
            return None if pair is None else pair.high_noise if name == "transformer" else pair.low_noise
        return {"vae": self.vae, "text_encoder": self.text_encoder}.get(name)

    def folder_of(self, *names: str, by_text: bool = False) -> Weights | None:
        """Where those of the components ``names`` are that are not single files; None if nowhere."""
        names = tuple(name for name in names if self.file_of(name, by_text=by_text) is None)
        weights = self.text_to_video if by_text else self.weights
        if weights is None or not names:
            return None
        if weights.is_local and weights.file and (weights.path / "high_noise_model").is_dir():
            return replace(weights, file=None)  # Wan's original layout has no folders of these names
        if names == ("tokenizer",) and not weights.is_local:
            return replace(weights, name=f"{weights.name} (tokenizer)", file="tokenizer/*", size_gb=0.02)
        return weights

    def __post_init__(self) -> None:
        self.spec.latent_size(self.video.height, self.video.width)
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
    shift: float = 4.0
    text_to_video_shift: float = 12.0
    negative_prompt: str = ""

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
    checked by :func:`check_combinations`.

    Args:
        device: "auto" (the accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
        offload: "none": all networks stay on the device; "model": whole networks are moved there one at a time;
            "group": the blocks of the transformers are streamed. "auto": the fastest of these that fits.
        precision: of the weights of the transformers' blocks. "as_is": ``model.dtype``, or the 8 bits or fewer of their
            files. "fp8_storage": stored as 8-bit floats, on any device. "fp8" and "int8": computed in 8 bits by
            torchao. Adapters stay as they are.
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
        guidance_batch: run both passes of guidance as one batch of two.
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
    guidance_batch: bool = False
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


def check_reach(model: ModelSettings, memory_frames: int, name: str) -> None:
    """Raise ``ValueError`` if memory frames are beyond the transformer's temporal positions.

    Args:
        name: of the setting that gives their number.
    """
    most = (model.network.positions - 1) // model.rope_stride
    if memory_frames > most:
        raise ValueError(
            f"{name}={memory_frames}: with model.rope_stride={model.rope_stride} {model.name} can recall at most "
            f"{most} frames; write fewer, or a smaller stride"
        )


# What goes together


def check_combinations(
    model: ModelSettings,
    sampler: SamplerSettings,
    runtime: RuntimeSettings,
    *,
    processes: int | None = None,
    shares_attention: bool = False,
) -> None:
    """Raise ``ValueError`` for settings that contradict each other or have no effect together.

    Args:
        processes: how many generate a film; None: not known yet.
        shares_attention: whether shots of a batch read each other, in other layers at each step, as in StoryDiffusion.
    """
    blocks, cached = model.network.transformer["num_layers"], model.memory_attention == "cached"
    batch, halves, cache = runtime.guidance_batch, runtime.guidance_parallel, runtime.cache
    hidden = "sampler.negative_sees_memory=false hides the memory from one pass of guidance, and"
    rules = {
        f"runtime.guidance_batch does not combine with runtime.cache={cache}, which skips steps for each of the two "
        "passes alone: use one of them": batch and cache != "none",
        "runtime.guidance_batch runs both passes of guidance on one device, runtime.guidance_parallel each on its own: "
        "use one of them": batch and halves,
        "runtime.guidance_batch batches the two passes of guidance; sampler.guidance=1 has only one": batch
        and sampler.guidance == 1,
        f"{hidden} runtime.guidance_batch gives both the same tokens: set it to false": (
            batch and not sampler.negative_sees_memory
        ),
        f"{hidden} with memory_attention=joint that pass needs what the other predicts, which "
        "runtime.guidance_parallel computes elsewhere: set it to false": (
            halves and not sampler.negative_sees_memory and not cached
        ),
        "runtime.cache=first_block does not combine with runtime.context_parallel: processes see different tokens and "
        "would skip different steps; use runtime.cache=taylor": (
            cache == "first_block" and runtime.context_parallel != "none"
        ),
        f"runtime.cache=first_block skips all blocks but the first, and the networks of {model.name} have only one: "
        "use runtime.cache=none": cache == "first_block" and blocks < 2,
        f"runtime.cache={cache} skips steps that resemble the one before; the {sampler.steps} steps of a "
        "step-distilled sampler do not: use runtime.cache=none": cache != "none" and bool(sampler.adapter),
        f"runtime.memory_cache={runtime.memory_cache} is for model.memory_attention=cached: with joint nothing of the "
        "memory is cached": runtime.memory_cache != "device" and not cached,
        "runtime.precision=fp8_storage is not compiled: use runtime.precision=fp8 or int8, or runtime.compile=none": (
            runtime.precision == "fp8_storage" and runtime.compile != "none"
        ),
        "runtime.experts=in_turn loads an expert twice a shot, and runtime.compile=blocks would compile it each time: "
        "use one of them": runtime.experts == "in_turn" and runtime.compile != "none",
        "runtime.experts=in_turn loads one expert at a time, and a learned recall reads both: use another memory, or "
        "runtime.experts=together": runtime.experts == "in_turn" and bool(model.adapter and model.adapter.query),
        f"runtime.precision={runtime.precision} needs model.dtype=bfloat16 for the rest, not {model.dtype}": (
            runtime.precision in ("fp8", "int8") and model.dtype != "bfloat16"
        ),
        "storydiffusion changes attention between steps: write runtime.compile=none": (
            shares_attention and runtime.compile != "none"
        ),
        f"storydiffusion changes attention between steps, some of which runtime.cache={cache} skips: write "
        "runtime.cache=none": shares_attention and cache != "none",
        "storydiffusion changes the attention of both experts, and one is loaded at a time (runtime.experts=in_turn): "
        "use a runtime with room for both (runtime.precision, runtime.offload)": (
            shares_attention and runtime.experts == "in_turn"
        ),
    }
    for name in ("context_parallel", "guidance_parallel", "shard_weights"):
        value = getattr(runtime, name)
        rules[
            f"runtime.{name}={str(value).lower()} shares a film among several processes and there is one: start it "
            "with torchrun --nproc_per_node=N scripts/generate.py ..., or use another runtime"
        ] = processes == 1 and value not in (False, "none")
    if processes is not None and processes > 1:
        rules |= _rules_for_several(model, sampler, runtime, processes)
    if broken := next((message for message, applies in rules.items() if applies), None):
        raise ValueError(broken)


def _rules_for_several(
    model: ModelSettings, sampler: SamplerSettings, runtime: RuntimeSettings, processes: int
) -> dict[str, bool]:
    """What several processes cannot do: message -> whether the settings ask for it."""
    method, halves, sharded = runtime.context_parallel, runtime.guidance_parallel, runtime.shard_weights
    heads, context = model.network.transformer["num_attention_heads"], processes // (2 if halves else 1)
    fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
    twice = ", each twice for guidance_parallel" if halves else ""
    rules = {
        f"{processes} processes were started and nothing specifies how they share the film: write runtime=multi-gpu, "
        "or runtime.context_parallel=ulysses, or runtime.guidance_parallel=true": method == "none" and not halves,
        f"runtime.guidance_parallel=true needs two equal halves, and {processes} processes were started: start one "
        "more or less, or set it to false": halves and processes % 2 == 1,
        f"runtime.guidance_parallel=true alone has work for 2 processes and {processes} were started: add "
        "runtime.context_parallel=ulysses": halves and method == "none" and processes > 2,
        "runtime.guidance_parallel=true, but sampler.guidance=1 runs no second pass: set it to false and leave all "
        "processes to runtime.context_parallel": halves and sampler.guidance == 1,
        f"runtime.offload={runtime.offload} does not combine with several processes; where the weights do not fit "
        "write runtime.offload=none runtime.shard_weights=true": runtime.offload not in ("none", "auto"),
        "runtime.experts=in_turn does not combine with several processes; where the weights do not fit write "
        "runtime.shard_weights=true": runtime.experts == "in_turn",
        "runtime.cache=first_block skips a step in one pass and not in the other, and processes that share weights "
        "must gather them at the same time: write runtime.cache=taylor or none": (
            runtime.cache == "first_block" and sharded
        ),
        f"runtime.context_parallel=ulysses gives each of {context} processes equally many of the model's {heads} "
        f"attention heads: start as many processes as divide them ({fitting}{twice}), or use ring": (
            method == "ulysses" and heads % context != 0
        ),
        "runtime.context_parallel=ring joins parts of attention by their log-sum-exp, which torch's native attention "
        "does not return: write runtime.attention=cudnn, flash2 or sage, or runtime.context_parallel=ulysses": (
            method == "ring" and context > 1 and (runtime.attention == "native" or runtime.device == "cpu")
        ),
        "runtime.attention=flash3 is not among the kernels that diffusers runs with runtime.context_parallel: write "
        "runtime.attention=auto, flash2, cudnn or sage": (
            method != "none" and context > 1 and runtime.attention == "flash3"
        ),
    }
    for name, plain in (("precision", "as_is"), ("compile", "none")):
        value = getattr(runtime, name)
        rules[
            f"runtime.{name}={value} does not combine with runtime.shard_weights=true: write runtime.{name}={plain}, "
            "or leave the weights whole"
        ] = sharded and value != plain
    return rules
