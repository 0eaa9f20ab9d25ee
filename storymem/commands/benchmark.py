"""The denoiser and whole shots at true size, with random weights: seconds, TFLOP/s and memory, beside what is possible.

Times do not depend on the values of weights, so nothing need be downloaded. What a step cache skips does depend on
them: caches are measured at threshold 0, where they skip nothing, for what they cost; ``benchmarks.acceleration``
measures what they save.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from storymem.wan.acceleration import accelerate, check_acceleration, forget_steps
from storymem.wan.flops import ForwardFlops, cached_flops, forward_flops
from storymem.wan.lora import memory_lora_config
from storymem.wan.memory_estimate import estimate_memory
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.precision import check_precision, lower_precision
from storymem.wan.presets import choose_runtime
from storymem.wan.runtime import place, release_memory, resolve_device
from storymem.wan.schedule import wan_scheduler
from storymem.wan.segments import memory_cached, memory_joint
from storymem.wan.settings import ModelSettings, NetworkSettings, RuntimeSettings, SamplerSettings, VideoSettings
from storymem.wan.transformer import SegmentCache

#: The shape of Wan2.1's small model, for machines that the large one is too large for.
WAN_1_3B = {
    "num_layers": 30,
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "text_dim": 4096,
    "freq_dim": 256,
    "out_channels": 16,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run a model.

    Args:
        name: of what differs from the first case, for the table.
        runtime: how the networks run.
        model: with its ``memory_attention``.
    """

    name: str
    model: ModelSettings
    runtime: RuntimeSettings


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case at one size of memory.

    Args:
        case: its name.
        memory: M.
        tokens: of one forward.
        tflop: of one forward, all passes in its batch.
        seconds: of one forward, the fastest.
        tflops: TFLOP per second.
        share: of the ceiling.
        floor: seconds that the same operations take at the ceiling.
        shot: seconds of a shot's denoising, calculated.
        floor_shot: the same at the ceiling.
        predicted_gb: peak memory of a forward, calculated.
        measured_gb: as the device, or on the CPU torch's profiler, says.
        prefill: seconds that computing the memory takes, once a shot and expert; only with cached memory.
        refused: why there are no figures.
    """

    case: str
    memory: int
    tokens: int = 0
    tflop: float = 0.0
    seconds: float = 0.0
    tflops: float = 0.0
    share: float = 0.0
    floor: float = 0.0
    shot: float = 0.0
    floor_shot: float = 0.0
    predicted_gb: float = 0.0
    measured_gb: float = 0.0
    prefill: float | None = None
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class ShotRow:
    """A whole shot: seconds from noise and latents to frames."""

    case: str
    memory: int
    steps: int
    seconds: float
    denoiser: float
    outside: float
    measured_gb: float


def small_model(video: VideoSettings, *, layers: int | None = None) -> ModelSettings:
    """The 1.3B shape, with as many of its layers as are asked for."""
    whole = WAN_1_3B["num_layers"]
    network = WAN_1_3B | {"num_layers": layers or whole}
    name = "wan-1.3b-shaped" if layers in (None, whole) else f"wan-1.3b-shaped, of {whole} layers"
    return ModelSettings(name=name, video=video, network=NetworkSettings(transformer=network), dtype="float32")


def variations(model: ModelSettings, runtime: RuntimeSettings, device: torch.device) -> list[Case]:
    """``runtime`` as it is, then with one thing changed at a time."""
    changes: list[dict[str, Any]] = [{"attention": name} for name in ("native", "flash2", "flash3", "cudnn", "sage")]
    changes += [{"compile": "blocks"}, {"guidance_batch": True}]
    changes += [{"cache": name, "cache_threshold": 0.0} for name in ("first_block", "taylor")]
    changes += [{"precision": name} for name in ("fp8_storage", "fp8", "int8")]
    changes += [{"precision": "fp8", "compile": "blocks"}, {"precision": "int8", "compile": "blocks"}]
    if device.type == "cpu":
        changes = [{"guidance_batch": True}, {"precision": "fp8_storage"}]
    cases = [Case(name="plain", model=model, runtime=runtime)]
    for change in changes:
        name = " ".join(f"{key}={value}" for key, value in change.items() if key != "cache_threshold")
        cases.append(Case(name=name, model=model, runtime=replace(runtime, **change)))
    cached = replace(model, memory_attention="cached")
    cases.append(Case(name="memory_attention=cached", model=cached, runtime=runtime))
    return cases


def settled(model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings) -> tuple[RuntimeSettings, str]:
    """``runtime`` without "auto", for networks without text encoder and scorers, and why."""
    choice = choose_runtime(model, runtime, sampler=sampler)
    return choice.runtime, choice.reason


def random_pipeline(model: ModelSettings, runtime: RuntimeSettings, sampler: SamplerSettings) -> Any:
    """The networks of ``model`` with random weights, its memory adapter's included, as ``runtime`` runs them.

    Weights are drawn where they will lie, one block's for all blocks: a 14B expert takes seconds.
    """
    device = resolve_device(runtime.device)
    check_precision(model, runtime, device)
    check_acceleration(model, sampler, runtime)
    home = device if runtime.offload == "none" else torch.device("cpu")
    with torch.device(home):
        vae = AutoencoderKLWan(**model.network.vae).eval()
    if model.vae_dtype != "float32":
        vae.to(getattr(torch, model.vae_dtype))
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=wan_scheduler(sampler.shift, sampler.scheduler),
        transformer=_random_expert(model, home),
        transformer_2=_random_expert(model, home),
        boundary_ratio=model.boundary,
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
    )
    lower_precision(pipe.experts.values(), model, runtime)
    # Forwards are measured one by one, already with both passes in them.
    accelerate(pipe, model, replace(runtime, guidance_batch=False))
    place(pipe, runtime)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _random_expert(model: ModelSettings, device: torch.device) -> Any:
    with torch.device("meta"):
        expert = WanTransformer3DModel(**model.network.transformer, in_channels=model.spec.in_channels).eval()
        if model.adapter is not None:
            expert.add_adapter(memory_lora_config())
    kept = set(expert._keep_in_fp32_modules)
    for name, weight in expert.named_parameters():
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(getattr(torch, model.dtype))
    rope = expert.rope
    expert.to_empty(device=device)
    with device:  # tables, which are not weights
        expert.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    for name, weight in expert.named_parameters():
        if not name.startswith("blocks.") or name.startswith("blocks.0."):
            weight.fill_(1.0) if weight.ndim == 1 and name.endswith("weight") else weight.normal_(std=0.02)
    for block in expert.blocks[1:]:
        block.load_state_dict(expert.blocks[0].state_dict())
    return expert.eval().requires_grad_(False)


# Measuring


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """TFLOP/s of the best of several large matrix products: what no network here can exceed in ``dtype``."""
    size = 1024 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        best = min(best, timed(lambda: torch.mm(one, other), device))
    return 2 * size**3 / best / 1e12


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device is done."""
    _synchronise(device)
    began = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - began


def measure(
    case: Case, *, sampler: SamplerSettings, memory_sizes: Sequence[int], ceiling: float, repeats: int = 5
) -> Iterator[Row]:
    """A row for each size of memory; a case that cannot be run here gives one row that says why."""
    device = resolve_device(case.runtime.device)
    try:
        pipe = random_pipeline(case.model, case.runtime, sampler)
        for memory in memory_sizes:
            yield _measured(pipe, case, sampler, memory, ceiling, repeats, device)
    except (ValueError, torch.OutOfMemoryError) as error:
        yield Row(case=case.name, memory=max(memory_sizes), refused=str(error).splitlines()[0])
    pipe = None
    release_memory()


@torch.no_grad()
def _measured(
    pipe: Any, case: Case, sampler: SamplerSettings, memory: int, ceiling: float, repeats: int, device: torch.device
) -> Row:
    model, runtime = case.model, case.runtime
    batch = 2 if runtime.guidance_batch and sampler.guidance > 1 else 1
    prefill_call, forward = forwards(pipe, model, runtime, memory, batch, device)
    prefill = None if prefill_call is None else timed(prefill_call, device)
    for _ in range(2):
        forward()  # what is compiled or traced is so now
    peak = _peak_bytes(forward, device, pipe)
    seconds = min(timed(forward, device) for _ in range(repeats))  # other work on the machine can only add
    flops = flops_of(model, memory, runtime)
    tflop = batch * flops.total / 1e12
    passes = sampler.steps * (2 if sampler.guidance > 1 else 1) / batch
    predicted = next(
        stage.total
        for stage in estimate_memory(model, runtime, sampler=sampler, memory_frames=memory).stages
        if stage.name == "denoise"
    )
    floor = tflop / ceiling
    return Row(
        case=case.name,
        memory=memory,
        tokens=batch * flops.tokens,
        tflop=tflop,
        seconds=seconds,
        tflops=tflop / seconds,
        share=floor / seconds,
        floor=floor,
        shot=passes * seconds + 2 * (prefill or 0.0),
        floor_shot=passes * floor,
        predicted_gb=predicted / 1e9,
        measured_gb=peak / 1e9,
        prefill=prefill,
    )


def flops_of(model: ModelSettings, memory: int, runtime: RuntimeSettings) -> ForwardFlops:
    """Operations of one forward of one pass."""
    height, width = model.spec.latent_size(model.video.height, model.video.width)
    slots = model.spec.latent_frames(model.video.frames)
    size: dict[str, int] = {"height": height, "width": width, "text_tokens": model.network.text_tokens}
    if model.memory_attention == "joint" or memory == 0:
        return forward_flops(model.network.transformer, slots=slots + memory, **size)
    flops = cached_flops(model.network.transformer, memory_frames=memory, slots=slots, **size)
    return flops.whole if runtime.memory_cache == "recompute" else flops.read


def forwards(
    pipe: Any, model: ModelSettings, runtime: RuntimeSettings, memory: int, batch: int, device: torch.device
) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
    """Forwards of the high-noise expert as the denoising loop makes them: of memory that is kept, and of a step."""
    expert, dtype, spec = pipe.transformer, getattr(torch, model.dtype), model.spec
    height, width = spec.latent_size(model.video.height, model.video.width)
    slots, cached = spec.latent_frames(model.video.frames), model.memory_attention == "cached"
    layout = (memory_cached if cached else memory_joint)(memory, slots, model.rope_stride)
    kept = cached and memory and runtime.memory_cache != "recompute"
    cache = SegmentCache(on_cpu=runtime.memory_cache == "cpu") if kept else None
    frames = layout.frames - (memory if kept else 0)
    text = _noise(batch, model.network.text_tokens, model.network.transformer["text_dim"], device=device, dtype=dtype)

    def forward(frames: int, layout: Any, context: str = "cond") -> Any:
        count = 1 if context == "memory" else batch
        latents = _noise(count, spec.in_channels, frames, height, width, device=device, dtype=dtype)
        timestep = torch.full((count,), 950.0, device=device)
        arguments = {"encoder_hidden_states": text[:count], "layout": layout, "cache": cache, "return_dict": False}
        with torch.no_grad(), expert.cache_context(context):
            return expert(hidden_states=latents, timestep=timestep, **arguments)

    forget_steps(pipe.experts)  # of another size of memory
    prefill = partial(forward, memory, layout.only(layout.constant), "memory") if kept else None
    return prefill, partial(forward, frames, layout)


def measure_shot(case: Case, *, sampler: SamplerSettings, memory: int, steps: int) -> ShotRow:
    """A whole shot by the pipeline, once to warm up: condition, ``steps`` steps with guidance, decoding, frames."""
    device, model = resolve_device(case.runtime.device), case.model
    pipe = random_pipeline(model, case.runtime, sampler)
    latents = [
        torch.randn(model.spec.latent_channels, 1, *model.spec.latent_size(model.video.height, model.video.width))
        for _ in range(memory)
    ]
    shape = (1, model.network.text_tokens, model.network.transformer["text_dim"])

    def shot(steps: int) -> None:
        pipe(
            prompt_embeds=torch.randn(shape),
            negative_prompt_embeds=torch.randn(shape) if sampler.guidance > 1 else None,
            height=model.video.height,
            width=model.video.width,
            num_frames=model.video.frames,
            num_inference_steps=steps,
            guidance_scale=sampler.guidance,
            memory=latents or None,
            output_type="np",
        )

    shot(2)
    _reset_peak(device)
    with _counted_seconds(pipe, device) as spent:
        seconds = timed(lambda: shot(steps), device)
    peak = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else 0
    pipe = None
    release_memory()
    return ShotRow(
        case=case.name,
        memory=memory,
        steps=steps,
        seconds=seconds,
        denoiser=sum(spent),
        outside=1 - sum(spent) / seconds,
        measured_gb=peak / 1e9,
    )


@contextmanager
def _counted_seconds(pipe: Any, device: torch.device) -> Iterator[list[float]]:
    """Seconds of each forward of the experts inside; the device is waited for before and after each."""
    spent: list[float] = []
    began = [0.0]

    def before(*_: Any) -> None:
        _synchronise(device)
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        _synchronise(device)
        spent.append(time.perf_counter() - began[0])

    with ExitStack() as stack:
        for expert in pipe.experts.values():
            stack.callback(expert.register_forward_pre_hook(before).remove)
            stack.callback(expert.register_forward_hook(after).remove)
        yield spent


def _peak_bytes(call: Callable[[], Any], device: torch.device, pipe: Any) -> int:
    """The most memory during a call: tensors on the accelerator; on the CPU, what a call adds to the weights."""
    if device.type != "cpu":
        _reset_peak(device)
        call()
        _synchronise(device)
        return torch.accelerator.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + sum(_held(part) for part in pipe.components.values() if isinstance(part, nn.Module))


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def _held(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _noise(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
