"""What a shot costs, calculated from shapes: operations, VRAM and RAM.

Nothing is loaded: parameters are counted on networks on the meta device. VRAM is the peak of live tensors in each stage
of a shot; :mod:`storymem.wan.placement` adds what the driver, workspaces and gaps between tensors take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from storymem.wan.folders import on_meta
from storymem.wan.gguf import are_in_8_bits, stays_in_few_bits
from storymem.wan.processes import Grid
from storymem.wan.segments import Layout, name_of
from storymem.wan.settings import Dtype, ModelSettings, Precision, RuntimeSettings, SamplerSettings
from storymem.wan.spec import A14B, UMT5_XXL
from storymem.weights import Weights

GB = 1e9
SIZES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Where the number of memory frames is not known: the published capacity.
MEMORY_FRAMES = 10
#: Ranks of adapters whose files are not read: the published memory LoRA, and other LoRAs as usual.
MEMORY_RANK, OTHER_RANK = 128, 64

# Measured on the meta device, where the VAE's peak is at full resolution, one latent frame (four frames) at a time, in
# tensors of `base_dim` channels: inputs, outputs and the frames that its causal convolutions cache.
_DECODER_TENSORS, _ENCODER_TENSORS = 12.1, 9.0
_TILE, _TILE_STRIDE = 256, 192  # pixels, diffusers' own
_SCORING = 0.1  # activations of the scorers, as a share of their weights


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one forward at batch size 1; a multiply-add counts as two.

    ``linear`` grows with the number of tokens, ``attention`` (self-attention) with the pairs of queries and keys.
    """

    tokens: int
    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def forward_flops(
    transformer: Mapping[str, Any],
    layout: Layout,
    *,
    height: int,
    width: int,
    text_tokens: int,
    cached: frozenset[str] = frozenset(),
) -> Flops:
    """Operations of a forward of ``WanTransformer3DModel`` on the segments of a layout.

    Args:
        transformer: its arguments or config; ``ModelSettings.transformer``.
        height, width: of the latents.
        text_tokens: length of the padded prompt.
        cached: names of segments that are read from a cache and not computed.
    """
    p_t, p_h, p_w = transformer.get("patch_size", (1, 2, 2))
    frame = (height // p_h) * (width // p_w)
    dim, ffn = _dim(transformer), transformer["ffn_dim"]
    channels = transformer["in_channels"], transformer.get("out_channels", A14B.latent_channels)
    frames = {segment.name: segment.frames for segment in layout.segments}
    segments = [segment for segment in layout.segments if segment.name not in cached]
    tokens = sum(segment.frames for segment in segments) * frame
    pairs = frame**2 * sum(
        segment.frames * (frames[name_of(keys)] if isinstance(keys, str) else keys.frames)
        for segment in segments
        for key_set in segment.reads
        for keys in key_set
    )
    block = tokens * (4 * dim * dim + 2 * dim * ffn)  # q, k, v, o of self-attention, and the feed-forward network
    for text, readers in groupby(segments, key=lambda segment: segment.text):
        if text is not None:  # q and o of cross-attention for the tokens, k and v for the text
            read = sum(last - first for first, last in text.spans) if text.spans else text_tokens
            queries = sum(segment.frames for segment in readers) * frame
            block += (queries + read) * 2 * dim * dim + 2 * queries * read * dim
    texts = len({segment.text.name for segment in segments if segment.text})
    timesteps = len(segments) if any(segment.timestep is not None for segment in segments) else 1
    outside = (
        tokens * dim * p_t * p_h * p_w * sum(channels)
        + texts * text_tokens * (transformer["text_dim"] * dim + dim * dim)
        + timesteps * (transformer["freq_dim"] * dim + 7 * dim * dim)
    )
    layers = transformer["num_layers"]
    return Flops(tokens=tokens, linear=2 * (layers * block + outside), attention=4 * layers * pairs * dim)


# Weights and activations


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
        """VRAM when blocks are streamed: one block computes and the next one is copied."""
        return min(2, self.layers) * self.block + self.rest


def expert_bytes(
    transformer: Mapping[str, Any],
    *,
    dtype: Dtype,
    precision: Precision = "as_is",
    ranks: Sequence[int] = (),
) -> ExpertBytes:
    """Weights of a ``WanTransformer3DModel``; what diffusers keeps in float32 counts as such.

    Args:
        dtype: of everything else.
        precision: of the linears in the blocks.
        ranks: of the LoRAs on all of these linears.
    """
    network = on_meta("WanTransformer3DModel", {**transformer, "num_layers": 1}, "model.network")
    size, kept = SIZES[dtype], set(network._keep_in_fp32_modules)
    block = rest = 0
    for name, module in network.named_modules():
        for key, weight in module.named_parameters(name, recurse=False):
            width = 4 if kept & set(key.split(".")) else size
            if not key.startswith("blocks."):
                rest += width * weight.numel()
            elif not isinstance(module, nn.Linear) or precision == "as_is":
                block += width * weight.numel()
            elif weight.ndim == 2:
                block += weight.numel()
            else:  # biases, with a float32 factor for each row
                block += weight.numel() * (size + 4)
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            block += size * sum(ranks) * (module.in_features + module.out_features)
    return ExpertBytes(block=block, layers=transformer["num_layers"], rest=rest)


def forward_bytes(
    transformer: Mapping[str, Any], *, tokens: int, dtype: Dtype, precision: Precision = "as_is", adapted: bool = False
) -> int:
    """Peak of the activations of a forward; blocks come one after the other and leave nothing.

    A block's peak is where the residual stream is added up in float32, or within the feed-forward network.

    Args:
        tokens: computed, times the batch.
        adapted: whether there are LoRAs, whose outputs are scaled and added.
    """
    size, dim, ffn = SIZES[dtype], _dim(transformer), transformer["ffn_dim"]
    # The stream before and after attention, attention's output, input and output of the last linears; then float32
    # copies (unless all is float32) and two terms of the sum.
    residual = 5 * size * dim + (4 * (size < 4) + 8) * dim
    feed_forward = 4 * size * dim + (3 if adapted else 2) * size * ffn
    rotary = 4 * 4 * transformer["attention_head_dim"]  # cosines and sines, and their parts
    one_linear = dim * ffn * size if precision == "fp8_storage" else 0
    return tokens * (max(residual, feed_forward) + rotary) + one_linear


def vae_bytes(*, frames: int, height: int, width: int, base_dim: float = 96, tiled: bool = False) -> tuple[int, int]:
    """Peaks of the activations when the VAE encodes F frames, and when it decodes them, in float32 for any dtype.

    Args:
        base_dim: channels at full resolution.
    """
    tiled = tiled and max(height, width) > _TILE
    limit, video = _TILE if tiled else max(height, width), 12 * frames * height * width
    latent_frame = 16 * base_dim * min(height, limit) * min(width, limit)  # a tensor at full resolution
    # A growing video is copied frame by frame; tiles are stored with overlaps, then joined in rows and as a whole.
    copies = (_TILE / _TILE_STRIDE) ** 2 + 2 if tiled else 2
    return int(_ENCODER_TENSORS * latent_frame + video), int(_DECODER_TENSORS * latent_frame + copies * video)


def memory_cache_bytes(model: ModelSettings, memory_frames: int) -> int:
    """Keys and values of M memory frames in all blocks of one expert; 0 where memory is not cached."""
    if model.memory_attention == "joint":
        return 0
    network = model.network.transformer
    return network["num_layers"] * 2 * memory_frames * _frame_tokens(model) * _dim(network) * SIZES[model.dtype]


# A shot


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Bytes of VRAM at the peak of a stage: "texts", "encode", "denoise", "decode" or "score" (choose keyframes)."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a film needs at its most demanding shot, in bytes.

    Args:
        stages: VRAM, one stage after the other.
        ram: for the weights, which are read to RAM before they are placed, and for scorers that are not at work.
        shared_ram: the same on a machine without VRAM, where all stages take place in RAM.
    """

    stages: tuple[Stage, ...]
    ram: int
    shared_ram: int

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)


def estimate_shot(
    model: ModelSettings,
    runtime: RuntimeSettings,
    *,
    sampler: SamplerSettings | None = None,
    memory_frames: int = MEMORY_FRAMES,
    frames: int | None = None,
    scorers: Sequence[int] = (0, 0),
    grid: Grid | None = None,
) -> Estimate:
    """What one shot needs on the device, or on each of several, stage by stage.

    Args:
        runtime: its ``offload`` must not be "auto".
        sampler: None: as published.
        memory_frames: M.
        frames: F; None: the model's.
        scorers: bytes of the embedder's weights and of the quality filter's, as of
            :func:`storymem.scorers.scorer_bytes`. They choose keyframes one after the other.
        grid: how several processes share the shot; None: one makes it.
    """
    assert runtime.offload != "auto", "choose_runtime settles it"
    grid, sampler = grid or Grid(), sampler or SamplerSettings()
    frames = frames or model.video.frames
    in_turn = runtime.experts == "in_turn" and len(model.spec.experts) > 1
    count = 1 if in_turn else len(model.spec.experts)
    expert = _expert(model, runtime.precision, sampler)
    idle, at_work = _placed(expert, count, runtime, grid)
    left = 0 if in_turn else idle  # one that takes turns is freed after the last step
    vae = SIZES[model.vae_dtype] * _parameters("AutoencoderKLWan", model.network.vae)
    stays = 0 if runtime.offload == "model" else vae
    text_config = {**UMT5_XXL, **model.network.text_encoder}
    texts = _text_bytes(model, text_config)
    # Streamed layer by layer; its embeddings are the largest.
    widest = SIZES[model.dtype] * text_config["vocab_size"] * text_config["d_model"]
    vae_network = model.network.vae
    encode, decode = vae_bytes(
        frames=frames,
        height=model.video.height,
        width=model.video.width,
        # Channels for each pixel: a VAE of patches works at a lower resolution.
        base_dim=vae_network.get("base_dim", 96) / (vae_network.get("patch_size") or 1) ** 2,
        tiled=runtime.vae_tiling,
    )
    stages = (
        Stage(
            name="texts",
            weights=widest if runtime.offload == "group" else texts,  # the VAE is loaded after this
            activations=_text_activations(model, text_config),
        ),
        Stage(name="encode", weights=idle + vae, activations=encode),
        Stage(
            name="denoise",
            weights=at_work + vae,
            activations=_denoise_bytes(model, runtime, sampler, memory_frames, frames, grid.context),
        ),
        Stage(name="decode", weights=left + vae, activations=decode),
        Stage(name="score", weights=left + stays + max(scorers), activations=int(_SCORING * max(scorers))),
    )
    read = count * expert.total + vae
    cached = memory_cache_bytes(model, memory_frames) if runtime.memory_cache == "cpu" else 0
    embedder, quality = scorers
    waiting = embedder if in_turn else embedder + quality  # the filter takes turns with the experts
    ram = waiting + max(texts, read + cached, quality + vae if in_turn else 0)
    *others, score = stages
    at_most = max(max(stage.total for stage in others) + waiting, score.total + min(scorers))
    return Estimate(stages=stages, ram=ram, shared_ram=max(ram, at_most))


def _placed(expert: ExpertBytes, count: int, runtime: RuntimeSettings, grid: Grid) -> tuple[int, int]:
    """Bytes of ``count`` experts on the device, between forwards and during one."""
    idle = count * expert.total if runtime.offload == "none" else 0
    if runtime.shard_weights:
        idle //= grid.guidance * grid.context
    at_work = {"none": idle, "model": expert.total, "group": expert.streamed}[runtime.offload]
    if runtime.shard_weights:
        at_work += 2 * expert.block  # gathered for the moment
    return idle, at_work


def _text_bytes(model: ModelSettings, config: Mapping[str, Any]) -> int:
    """Weights of the text encoder: of a file in 8 bits, its linears stay in them."""
    linears = config["num_layers"] * config["d_model"] * (4 * config["num_heads"] * config["d_kv"] + 3 * config["d_ff"])
    small = model.text_encoder is not None and are_in_8_bits(model.text_encoder)
    size = SIZES[model.dtype]
    return size * _parameters("UMT5EncoderModel", config) - (linears * (size - 1) if small else 0)


def _expert(model: ModelSettings, precision: Precision, sampler: SamplerSettings) -> ExpertBytes:
    network, ranks = model.transformer, _ranks(model, sampler)
    if model.gguf is None or not stays_in_few_bits(model.gguf):
        return expert_bytes(network, dtype=model.dtype, precision=_stored(model, precision), ranks=ranks)
    adapted, plain = (expert_bytes(network, dtype=model.dtype, ranks=each).total for each in (ranks, ()))
    layers = network["num_layers"]
    whole = max(_file_bytes(weights) for weights in model.gguf.all)
    return ExpertBytes(block=(whole + adapted - plain) // layers, layers=layers, rest=0)


def _stored(model: ModelSettings, precision: Precision) -> Precision:
    """``runtime.precision``, or "fp8_storage" for files whose weights stay in few bits until they compute."""
    widened = model.gguf is not None and (stays_in_few_bits(model.gguf) or are_in_8_bits(*model.gguf.all))
    return "fp8_storage" if precision == "as_is" and widened else precision


def _file_bytes(weights: Weights) -> int:
    return weights.path.stat().st_size if weights.path.is_file() else int(weights.size_gb * GB)


def _ranks(model: ModelSettings, sampler: SamplerSettings) -> list[int]:
    others = len(model.adapters) + (sampler.adapter is not None)
    return [MEMORY_RANK] * (model.adapter is not None) + [OTHER_RANK] * others


def _denoise_bytes(
    model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings, memory: int, frames: int, context: int
) -> int:
    """Activations of a forward, and what is cached between forwards: the memory's keys and values, the step cache."""
    network, size, guided = model.network.transformer, SIZES[model.dtype], sampler.guidance > 1
    tokens, cached = model.spec.latent_frames(frames) * _frame_tokens(model), 0
    if model.memory_attention == "joint" or runtime.memory_cache == "recompute":
        tokens += memory * _frame_tokens(model)
    else:  # those of one block at a time, if the others are in RAM
        cached = memory_cache_bytes(model, memory) // (1 if runtime.memory_cache == "device" else network["num_layers"])
    if runtime.cache == "first_block":  # two residuals for each pass
        cached += 2 * (2 if guided else 1) * tokens * _dim(network) * size
    activations = forward_bytes(
        network,
        tokens=math.ceil(tokens / context),
        dtype=model.dtype,
        precision=_stored(model, runtime.precision),
        adapted=bool(_ranks(model, sampler)),
    )
    return activations + cached // context


def _text_activations(model: ModelSettings, config: Mapping[str, Any]) -> int:
    """One prompt at a time; attention's scores are in float32."""
    tokens = model.network.text_tokens
    widest = 3 * config["d_ff"] + 4 * config["d_model"]
    return SIZES[model.dtype] * tokens * widest + 4 * 2 * config["num_heads"] * tokens * tokens


def _parameters(class_name: str, config: Mapping[str, Any]) -> int:
    return sum(weight.numel() for weight in on_meta(class_name, config, "model.network").parameters())


def _frame_tokens(model: ModelSettings) -> int:
    """Tokens of a latent frame."""
    height, width = model.spec.latent_size(model.video.height, model.video.width)
    return (height // model.spec.patch) * (width // model.spec.patch)


def _dim(transformer: Mapping[str, Any]) -> int:
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]
