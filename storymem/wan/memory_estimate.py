"""How much memory a shot takes, from shapes alone: nothing is loaded, and no tensor made.

Peaks of live tensors on the device, for each stage of a shot. What comes on top, the driver, workspaces of kernels and
holes between tensors, is :mod:`storymem.wan.presets`' to leave room for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from storymem.io import read_json_object
from storymem.wan.folders import on_meta
from storymem.wan.gguf import stays_in_few_bits
from storymem.wan.layout import Layout
from storymem.wan.settings import Dtype, ModelSettings, Precision, RuntimeSettings, SamplerSettings
from storymem.weights import Weights, locate

StageName = Literal["texts", "encode", "denoise", "decode", "score"]

SIZES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Ranks of adapters whose files have not been read: the memory LoRA as published, and step-distilled ones as usual.
MEMORY_RANK, STEP_RANK = 128, 64

#: The text encoder of all Wan models, for settings that leave it to the published weights.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_RELATIVE_BUCKETS = 32
#: Parameters of Wan's VAE (encoder and decoder), likewise.
WAN_VAE = 126_892_531

# The VAE works on one latent frame, four frames of video, at a time. Its peak is at full resolution and is counted in
# tensors of `base_dim` channels there: inputs, outputs and the frames that its causal convolutions remember.
_DECODER_TENSORS = 12.1
_ENCODER_TENSORS = 9.0
_TILE, _TILE_STRIDE = 256, 192  # pixels, diffusers' own
_SCORING = 0.1  # activations of the scorers, as a share of their weights: they work in small batches


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Bytes on the device at the peak of one stage.

    Args:
        name: "texts" (the text encoder), "encode" (conditions and memory), "denoise", "decode" or "score" (choosing
            keyframes).
        weights: of every network that is there then.
        activations: everything else.
    """

    name: StageName
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a film takes at its most demanding shot.

    Args:
        stages: on the device, one after the other.
        host: bytes of main memory, where weights are read to before they are placed, and where scorers rest.
    """

    stages: tuple[Stage, ...]
    host: int

    @property
    def peak(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.total)


@dataclass(frozen=True, kw_only=True)
class ExpertBytes:
    """Weights of one expert, its adapters included."""

    block: int
    layers: int
    rest: int

    @property
    def total(self) -> int:
        return self.layers * self.block + self.rest

    @property
    def streamed(self) -> int:
        """On the device at a time when blocks are streamed: one that computes and one that comes."""
        return min(2, self.layers) * self.block + self.rest


def expert_bytes(
    transformer: Mapping[str, Any],
    *,
    dtype: Dtype,
    in_channels: int = 36,
    precision: Precision = "as_is",
    ranks: Sequence[int] = (),
) -> ExpertBytes:
    """Weights of a ``WanTransformer3DModel``, with what diffusers keeps in float32 for any ``dtype``.

    Args:
        transformer: its arguments or its config.
        dtype: of everything else.
        in_channels: 36 with a condition, 16 for text-to-video.
        precision: of the linears in the blocks; see :class:`storymem.wan.settings.RuntimeSettings`.
        ranks: of the adapters on all of these linears, in ``dtype``.
    """
    size = SIZES[dtype]
    dim, ffn = _dim(transformer), transformer["ffn_dim"]
    weights, biases = 8 * dim * dim + 2 * dim * ffn, 9 * dim + ffn  # q, k, v, o twice, and two of the feed-forward
    if precision == "as_is":
        linears = size * (weights + biases)
    elif precision == "fp8_storage":
        linears = weights + biases
    else:
        linears = weights + size * biases + 4 * biases  # a float32 scale for each row, that is for each bias
    adapters = size * sum(ranks) * (2 * 8 * dim + 2 * (dim + ffn))
    # Norms of q and k twice; in float32 the norm before cross-attention and the table of shifts and scales.
    block = linears + adapters + size * 4 * dim + 4 * (2 * dim + 6 * dim)
    patch = math.prod(transformer.get("patch_size", (1, 2, 2)))
    out, text = transformer.get("out_channels", 16) * patch, transformer["text_dim"]
    time_embedder = (transformer["freq_dim"] + 1) * dim + (dim + 1) * dim
    others = (in_channels * patch + 1) * dim + (dim + 1) * out  # patches in and out
    others += (dim + 1) * 6 * dim + (text + 1) * dim + (dim + 1) * dim  # projections of timestep and text
    rest = 4 * (time_embedder + 2 * dim) + size * others
    return ExpertBytes(block=block, layers=transformer["num_layers"], rest=rest)


def forward_bytes(
    transformer: Mapping[str, Any],
    *,
    tokens: int,
    dtype: Dtype,
    precision: Precision = "as_is",
    adapted: bool = False,
) -> int:
    """Peak of the activations of a forward, without weights; blocks come one after the other and leave nothing.

    A block's peak is at its end, where the residual stream is added up in float32, or within the feed-forward network.

    Args:
        transformer: as for :func:`expert_bytes`.
        tokens: of memory and video, times the batch.
        dtype: of the activations.
        precision: as for :func:`expert_bytes`.
        adapted: whether adapters lie beside the linears: their outputs are scaled and added.
    """
    size = SIZES[dtype]
    dim, ffn = _dim(transformer), transformer["ffn_dim"]
    # The stream before and after attention, attention's output, what the last linears were given and gave; then
    # float32 copies (unless all is float32) and two terms of the sum.
    residual = 5 * size * dim + (4 * (size < 4) + 8) * dim
    hidden = max((3 if adapted else 2) * size, _QUANTISED_SCRATCH.get(precision, 0))
    feed_forward = 4 * size * dim + hidden * ffn
    positions = 4 * 4 * transformer["attention_head_dim"]  # cosines and sines, and their parts
    one_linear = dim * ffn * size if precision == "fp8_storage" else 0
    return tokens * (max(residual, feed_forward) + positions) + one_linear


#: Bytes for each of the feed-forward network's hidden channels: 8-bit inputs, and for int8 sums in 32 bits and their
#: scaled copy. Read off torchao, not measured.
_QUANTISED_SCRATCH: dict[Precision, int] = {"fp8": 7, "int8": 10}


def text_encoder_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a ``UMT5EncoderModel`` with gated feed-forward networks; an empty ``config`` is UMT5-XXL."""
    shape = {**UMT5_XXL, **config}
    width, heads = shape["d_model"], shape["d_kv"] * shape["num_heads"]
    layer = 4 * width * heads + 3 * width * shape["d_ff"] + 2 * width
    layer += shape.get("relative_attention_num_buckets", _RELATIVE_BUCKETS) * shape["num_heads"]
    return shape["vocab_size"] * width + shape["num_layers"] * layer + width


def vae_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of an ``AutoencoderKLWan``; an empty ``config`` is Wan's own.

    Raises:
        FileError: if ``config`` describes none.
    """
    if not config:
        return WAN_VAE
    return sum(weight.numel() for weight in on_meta("AutoencoderKLWan", config, "model.network.vae").parameters())


def decode_bytes(*, frames: int, height: int, width: int, base_dim: float = 96, tiled: bool = False) -> int:
    """Peak of the activations when the VAE decodes F frames, in float32 (its norms use it for any dtype)."""
    video = 4 * 3 * frames * height * width
    tiled = tiled and (height > _TILE or width > _TILE)
    piece = _full_resolution(height, width, base_dim, tiled)
    # A growing video is copied frame by frame; tiles are kept with their overlaps, then joined in rows and as a whole.
    kept = (_TILE / _TILE_STRIDE) ** 2 + 2 if tiled else 2
    return int(_DECODER_TENSORS * piece + kept * video)


def encode_bytes(*, frames: int, height: int, width: int, base_dim: float = 96, tiled: bool = False) -> int:
    """Peak of the activations when the VAE encodes F frames, in float32."""
    piece = _full_resolution(height, width, base_dim, tiled and (height > _TILE or width > _TILE))
    return int(_ENCODER_TENSORS * piece + 4 * 3 * frames * height * width)


def estimate_memory(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    memory_frames: int,
    sampler: SamplerSettings | None = None,
    frames: int | None = None,
    scorers: int = 0,
    layout: Layout | None = None,
) -> MemoryEstimate:
    """What one shot takes on the device, or on each of several, stage by stage.

    Args:
        model: which networks.
        runtime: how they run; ``offload`` must not be "auto".
        memory_frames: M.
        sampler: how shots are sampled; None: as published.
        frames: F; None: the model's.
        scorers: bytes of the weights that choose keyframes.
        layout: how several processes share the shot; None: one makes it.
    """
    assert runtime.offload != "auto", "resolve it first: storymem.wan.presets.choose_runtime"
    layout, video = layout or Layout(), model.video
    vae_shape = _shape_of(model, "vae", model.network.vae)
    text_shape = _shape_of(model, "text_encoder", model.network.text_encoder)
    expert, vae = _expert(model, runtime, sampler), SIZES[model.vae_dtype] * vae_parameters(vae_shape)
    texts = SIZES[model.dtype] * text_encoder_parameters(text_shape)
    count = len(model.spec.experts)
    experts = {"none": count * expert.total, "model": 0, "group": 0}[runtime.offload]
    if runtime.shard_weights:
        experts = experts // (layout.guidance * layout.context)
    working = {"none": experts, "model": expert.total, "group": expert.streamed}[runtime.offload]
    if runtime.shard_weights:
        working += 2 * expert.block  # gathered for the moment
    always = 0 if runtime.offload == "model" else vae  # streamed or not, the small VAE stays
    shape: dict[str, Any] = {
        "frames": frames or video.frames,
        "height": video.height,
        "width": video.width,
        # Channels for each pixel: a VAE of patches works at a lower resolution.
        "base_dim": vae_shape.get("base_dim", 96) / (vae_shape.get("patch_size") or 1) ** 2,
        "tiled": runtime.vae_tiling,
    }
    denoise = _denoise_bytes(model, runtime, sampler, memory_frames, shape["frames"], layout.context)
    stages = (
        Stage(name="texts", weights=texts + always, activations=_text_activations(model, text_shape)),
        Stage(name="encode", weights=experts + vae, activations=encode_bytes(**shape)),
        Stage(name="denoise", weights=working + vae, activations=denoise),
        Stage(name="decode", weights=experts + vae, activations=decode_bytes(**shape)),
        Stage(name="score", weights=experts + always + scorers, activations=int(_SCORING * scorers)),
    )
    # Weights are read whole, in the model's own dtype; their precision falls afterwards.
    read = count * _expert(model, RuntimeSettings(), sampler).total + vae
    cached = memory_cache_bytes(model, memory_frames) if runtime.memory_cache == "cpu" else 0
    return MemoryEstimate(stages=stages, host=max(read, texts + vae) + scorers + cached)


def memory_cache_bytes(model: ModelSettings, memory_frames: int) -> int:
    """Keys and values of M memory frames in all blocks of one expert; 0 where memory is not cached."""
    if model.memory_attention == "joint":
        return 0
    network = model.network.transformer
    tokens = memory_frames * frame_tokens(model)
    return network["num_layers"] * 2 * tokens * _dim(network) * SIZES[model.dtype]


def frame_tokens(model: ModelSettings) -> int:
    """Tokens of a latent frame."""
    height, width = model.spec.latent_size(model.video.height, model.video.width)
    return (height // model.spec.patch) * (width // model.spec.patch)


def _expert(model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings | None) -> ExpertBytes:
    network, ranks = model.network.transformer, _ranks(model, sampler)
    if model.gguf is None or not stays_in_few_bits(model.gguf):
        return expert_bytes(
            network,
            dtype=model.dtype,
            in_channels=model.spec.in_channels,
            precision=runtime.precision,
            ranks=ranks,
        )
    # Adapters on quantised linears stay in their files' float32.
    adapters = [expert_bytes(network, dtype="float32", ranks=each).total for each in (ranks, ())]
    whole = max(_file_bytes(weights) for weights in (model.gguf.high_noise, model.gguf.low_noise))
    layers = network["num_layers"]
    return ExpertBytes(block=(whole + adapters[0] - adapters[1]) // layers, layers=layers, rest=0)


def _file_bytes(weights: Weights) -> int:
    return weights.path.stat().st_size if weights.path.is_file() else int(weights.size_gb * 1e9)


def _ranks(model: ModelSettings, sampler: SamplerSettings | None) -> list[int]:
    stepped = sampler is not None and sampler.adapter is not None
    return [MEMORY_RANK] * (model.adapter is not None) + [STEP_RANK] * (stepped + len(model.adapters))


def _denoise_bytes(
    model: ModelSettings,
    runtime: RuntimeSettings,
    sampler: SamplerSettings | None,
    memory_frames: int,
    frames: int,
    context: int,
) -> int:
    """Activations of a forward, and what is kept between forwards: the memory's keys and values, the step cache."""
    network, size = model.network.transformer, SIZES[model.dtype]
    per_slot = frame_tokens(model)
    memory, tokens = memory_frames * per_slot, model.spec.latent_frames(frames) * per_slot
    kept = 0
    if model.memory_attention == "joint" or runtime.memory_cache == "recompute":
        tokens += memory
    else:
        kept += memory_cache_bytes(model, memory_frames) // (
            1 if runtime.memory_cache == "device" else network["num_layers"]
        )
    guided = (sampler or SamplerSettings()).guidance > 1
    residuals = {"first_block": 2}.get(runtime.cache, 0) * (2 if guided else 1)
    kept += residuals * tokens * _dim(network) * size
    batch = 2 if runtime.guidance_batch and guided else 1
    activations = forward_bytes(
        network,
        tokens=math.ceil(batch * tokens / context),
        dtype=model.dtype,
        precision=runtime.precision,
        adapted=bool(_ranks(model, sampler)),
    )
    return activations + kept // context


def _text_activations(model: ModelSettings, config: Mapping[str, Any]) -> int:
    """One prompt at a time; attention's scores are in float32."""
    shape, tokens = {**UMT5_XXL, **config}, model.network.text_tokens
    widest = 3 * shape["d_ff"] + 4 * shape["d_model"]
    return SIZES[model.dtype] * tokens * widest + 4 * 2 * shape["num_heads"] * tokens * tokens


def _shape_of(model: ModelSettings, part: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a part that the settings leave to the weights, if they are here; else Wan's, that is {}."""
    if given or model.weights is None:
        return given
    try:
        file = locate(model.weights) / part / "config.json"
        config = read_json_object(file)
        on_meta(_CLASSES[part], config, str(file))
    except (ValueError, FileNotFoundError):  # what is wrong with weights is said where they are checked
        return {}
    return config


_CLASSES = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}


def _full_resolution(height: int, width: int, base_dim: float, tiled: bool) -> int:
    """Bytes of four frames of ``base_dim`` channels, of a whole picture or a tile."""
    limit = _TILE if tiled else max(height, width)
    return int(4 * 4 * base_dim * min(height, limit) * min(width, limit))


def _dim(transformer: Mapping[str, Any]) -> int:
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]
