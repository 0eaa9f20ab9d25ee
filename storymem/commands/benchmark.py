"""Measure a model at true size with random weights: seconds a forward and a shot, TFLOP/s, VRAM.

storymem benchmark                   # what this machine can run: the large model on a GPU, a tiny one on a CPU
storymem benchmark --sweep --shot    # every attention kernel, cache and precision; a whole shot
storymem benchmark --model wan2.2-a14b --runtime gpu-24gb --memory 0 10
storymem benchmark runtime.attention=cudnn runtime.compile=blocks model.video.frames=41

Each case is saved as JSON as soon as it is measured, with what it depends on, and a table is printed at the end. A case
that cannot be run is named with the reason; after --minutes no further one begins.
Times do not depend on the values of weights, so nothing is downloaded. What a step cache skips does depend on them:
caches are measured at threshold 0, where they skip nothing; ``benchmarks.acceleration`` measures what they save.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from storymem.composition import composed
from storymem.config import build_settings
from storymem.devices import resolve_device
from storymem.film.settings import GenerateSettings
from storymem.film.tables import format_table
from storymem.io import write_json
from storymem.wan.combinations import check_combinations
from storymem.wan.estimate import GB, estimate_shot, forward_flops
from storymem.wan.lora import memory_lora_config
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.placement import choose_runtime
from storymem.wan.runtime import accelerate, check_machine, clear_step_caches, place, release_memory
from storymem.wan.schedule import wan_scheduler
from storymem.wan.segments import Layout, memory_cached, memory_joint
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings
from storymem.wan.transformer import SegmentCache

#: A shot is that of the published sampler, however few steps a small model takes.
PUBLISHED = SamplerSettings()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run a model; ``name`` is what differs from the first case."""

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
        tflop: of one forward.
        seconds: of one forward, the fastest.
        ceiling: TFLOP/s of matrix products on this device.
        prefill: seconds to compute cached memory, once a shot and expert.
        calculated_gb: peak VRAM while denoising, as estimated.
        measured_gb: the same as torch measures it; None on the CPU.
        refused: why there are no figures.
    """

    case: str
    memory: int
    tokens: int = 0
    tflop: float = 0.0
    seconds: float = 0.0
    ceiling: float = 0.0
    prefill: float = 0.0
    calculated_gb: float = 0.0
    measured_gb: float | None = None
    refused: str = ""

    @property
    def floor(self) -> float:
        """Seconds of one forward at the ceiling."""
        return self.tflop / self.ceiling

    @property
    def shot(self) -> float:
        """Seconds of a shot's denoising, calculated."""
        return 2 * PUBLISHED.steps * self.seconds + 2 * self.prefill


@dataclass(frozen=True, kw_only=True)
class ShotRow:
    """A whole shot: seconds from noise and latents to frames, and the share outside the denoiser."""

    case: str
    memory: int
    steps: int
    seconds: float
    outside: float
    measured_gb: float | None


# Models and cases


def variations(model: ModelSettings, runtime: RuntimeSettings, device: torch.device) -> list[Case]:
    """``runtime`` unchanged, then with one setting changed at a time."""
    changes: list[dict[str, Any]] = [{"precision": "fp8_storage"}]
    if device.type != "cpu":
        changes += [{"attention": name} for name in ("native", "flash2", "flash3", "cudnn", "sage")]
        changes += [{"cache": name, "cache_threshold": 0.0} for name in ("first_block", "taylor")]
        changes += [{"compile": "blocks"}]
    cases = [
        Case(name="plain", model=model, runtime=runtime),
        Case(name="memory_attention=cached", model=replace(model, memory_attention="cached"), runtime=runtime),
    ]
    for change in changes:
        ((key, value), *_) = change.items()
        cases.append(Case(name=f"{key}={value}", model=model, runtime=replace(runtime, **change)))
    return cases


def random_pipeline(model: ModelSettings, runtime: RuntimeSettings) -> Any:
    """The networks of ``model`` with random weights, its memory adapter's included, as ``runtime`` runs them.

    Weights are drawn where they will be, one block's for all blocks: a 14B expert takes seconds.
    """
    check_combinations(model, PUBLISHED, runtime)
    check_machine(model, runtime)
    home = resolve_device(runtime.device) if runtime.offload == "none" else torch.device("cpu")
    with torch.device(home):
        vae = AutoencoderKLWan(**model.network.vae).eval()
    if model.vae_dtype != "float32":
        vae.to(getattr(torch, model.vae_dtype))
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=wan_scheduler(PUBLISHED.shift),
        transformer=random_expert(model, home),
        transformer_2=random_expert(model, home),
        boundary_ratio=model.boundary,
        rope_stride=model.rope_stride,
        memory_attention=model.memory_attention,
    )
    accelerate(pipe, model, runtime)
    place(pipe, runtime)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def random_expert(model: ModelSettings, device: torch.device) -> Any:
    """An expert of ``model`` with random weights, and its memory adapter if it has one."""
    with torch.device("meta"):
        expert = WanTransformer3DModel(**model.transformer).eval()
        if model.adapter is not None:
            expert.add_adapter(memory_lora_config())
    kept, rope = set(expert._keep_in_fp32_modules), expert.rope
    for name, weight in expert.named_parameters():
        if not kept & set(name.split(".")):
            weight.data = weight.data.to(getattr(torch, model.dtype))
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


def measure(case: Case, *, memory_sizes: Sequence[int], ceiling: float, repeats: int = 5) -> Iterator[Row]:
    """A row for each size of memory; a case that cannot be run here gives one row with the reason."""
    device = resolve_device(case.runtime.device)
    try:
        pipe = random_pipeline(case.model, case.runtime)
        for memory in memory_sizes:
            yield _measured(pipe, case, memory, ceiling, repeats, device)
    except (ValueError, RuntimeError, ImportError, AssertionError) as error:  # kernels and compilers raise any of these
        yield Row(case=case.name, memory=max(memory_sizes), refused=reason_of(error))
    pipe = None
    release_memory()


def reason_of(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@torch.no_grad()
def _measured(pipe: Any, case: Case, memory: int, ceiling: float, repeats: int, device: torch.device) -> Row:
    model, runtime = case.model, case.runtime
    layout, cached = shot_layout(model, memory, runtime)
    prefill_call, forward = forwards(pipe, model, runtime, memory, device)
    prefill = 0.0 if prefill_call is None else timed(prefill_call, device)
    forward()  # what is compiled or traced is so now
    reset_peak(device)
    seconds = min(timed(forward, device) for _ in range(repeats))  # other work on the machine can only add
    height, width = model.spec.latent_size(model.video.height, model.video.width)
    flops = forward_flops(
        model.transformer,
        layout,
        height=height,
        width=width,
        text_tokens=model.network.text_tokens,
        cached=cached,
    )
    stages = estimate_shot(model, runtime, sampler=PUBLISHED, memory_frames=memory).stages
    return Row(
        case=case.name,
        memory=memory,
        tokens=flops.tokens,
        tflop=flops.total / 1e12,
        seconds=seconds,
        ceiling=ceiling,
        prefill=prefill,
        calculated_gb=next(stage.total for stage in stages if stage.name == "denoise") / GB,
        measured_gb=peak_gb(device),
    )


def shot_layout(model: ModelSettings, memory: int, runtime: RuntimeSettings) -> tuple[Layout, frozenset[str]]:
    """The layout of a shot, and which of its segments are read from a cache."""
    build = memory_cached if model.memory_attention == "cached" else memory_joint
    layout = build(memory, model.spec.latent_frames(model.video.frames), model.rope_stride)
    return layout, frozenset() if runtime.memory_cache == "recompute" else layout.constant


def forwards(
    pipe: Any, model: ModelSettings, runtime: RuntimeSettings, memory: int, device: torch.device
) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
    """Forwards of the high-noise expert as the denoising loop calls them: of memory that is cached, and of a step."""
    expert, dtype = pipe.transformer, getattr(torch, model.dtype)
    size = model.spec.latent_size(model.video.height, model.video.width)
    layout, cached = shot_layout(model, memory, runtime)
    cache = SegmentCache(on_cpu=runtime.memory_cache == "cpu") if cached else None
    draw = partial(torch.randn, device=device, dtype=dtype)
    text = draw(1, model.network.text_tokens, model.network.transformer["text_dim"])

    def forward(layout: Layout, frames: int, context: str) -> Any:
        latents, timestep = draw(1, model.spec.in_channels, frames, *size), torch.full((1,), 950.0, device=device)
        with torch.no_grad(), expert.cache_context(context):
            return expert(latents, timestep, text, layout=layout, cache=cache, return_dict=False)

    clear_step_caches(pipe.experts)  # of another size of memory
    prefill = partial(forward, layout.only(cached), memory, "memory") if cached else None
    return prefill, partial(forward, layout, layout.frames - (memory if cached else 0), "cond")


def measure_shot(case: Case, *, memory: int, steps: int) -> ShotRow:
    """A whole shot by the pipeline: condition, ``steps`` steps with guidance, decoding, frames."""
    device, model, video = resolve_device(case.runtime.device), case.model, case.model.video
    pipe = random_pipeline(model, case.runtime)
    size = model.spec.latent_size(video.height, video.width)
    embeds = torch.randn(2, 1, model.network.text_tokens, model.network.transformer["text_dim"])

    def shot(steps: int) -> None:
        pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            height=video.height,
            width=video.width,
            num_frames=video.frames,
            num_inference_steps=steps,
            guidance_scale=PUBLISHED.guidance,
            memory=list(torch.randn(memory, model.spec.latent_channels, 1, *size)),
            output_type="np",
        )

    shot(2)
    reset_peak(device)
    with seconds_of_forwards(pipe, device) as spent:
        seconds = timed(lambda: shot(steps), device)
    peak = peak_gb(device)
    pipe = None
    release_memory()
    outside = 1 - sum(spent) / seconds
    return ShotRow(case=case.name, memory=memory, steps=steps, seconds=seconds, outside=outside, measured_gb=peak)


@contextmanager
def seconds_of_forwards(pipe: Any, device: torch.device) -> Iterator[list[float]]:
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


def reset_peak(device: torch.device) -> None:
    """Count the peak of VRAM from here on."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """The peak of VRAM in GB; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device) / GB


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# The command


def table(rows: Sequence[Row], model: ModelSettings) -> str:
    """The rows as text."""
    cells = [("case", "memory", "tokens", "s", "floor s", "TFLOP/s", "of ceiling", "s a shot", "GB", "calculated")]
    cells += [
        (
            *(row.case, str(row.memory), str(row.tokens), f"{row.seconds:.3g}", f"{row.floor:.3g}"),
            *(f"{row.tflop / row.seconds:.3g}", f"{row.floor / row.seconds:.0%}", f"{row.shot:.3g}"),
            *("-" if row.measured_gb is None else f"{row.measured_gb:.3g}", f"{row.calculated_gb:.3g}"),
        )
        for row in rows
        if not row.refused
    ]
    video, layers = model.video, model.network.transformer["num_layers"]
    lines = [
        f"{model.name}: {layers} layers, {video.width}x{video.height}, {video.frames} frames, random weights",
        format_table(cells),
        f"s: one forward. A shot is calculated: {PUBLISHED.steps} steps of two passes, without texts, encoding and "
        "decoding. Floor: the same operations at the measured ceiling of matrix products.",
    ]
    return "\n".join([*lines, *(f"not measured: {row.case}: {row.refused}" for row in rows if row.refused)])


def save(path: Path, device: torch.device, results: Sequence[dict[str, Any]]) -> None:
    """Write results as JSON, with what they depend on besides settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    content = {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, indent=2)


def _run(arguments: argparse.Namespace, add: Callable[[dict[str, Any]], None]) -> None:
    """Measure and print the table; each result is given to ``add`` as soon as it is there.

    The whole shot comes before the variations, so that it is measured even if time runs out.
    """
    overrides = [f"model={arguments.model}", f"runtime={arguments.runtime}", "story=none", *arguments.overrides]
    settings = build_settings(GenerateSettings, composed("generate", overrides))
    model, runtime = settings.model, settings.runtime
    if arguments.layers:
        network = model.network.transformer | {"num_layers": arguments.layers}
        model = replace(model, network=replace(model.network, transformer=network))
    choice = choose_runtime(model, runtime, sampler=PUBLISHED)
    runtime, device = choice.runtime, resolve_device(runtime.device)
    ceiling = matmul_ceiling(device, getattr(torch, model.dtype))
    print(f"\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {choice.reason or 'as set'}")
    print(f"ceiling: {ceiling:.3g} TFLOP/s in matrix products of {model.dtype}", flush=True)
    first, *others = variations(model, runtime, device)
    measured = partial(measure, ceiling=ceiling, repeats=arguments.repeats)
    rows = list(measured(first, memory_sizes=arguments.memory))
    add(_result(first, rows))
    if arguments.shot:
        try:
            shot = measure_shot(first, memory=arguments.sweep_memory, steps=arguments.steps)
            print(
                f"a whole shot of {shot.steps} steps at memory {shot.memory}: {shot.seconds:.3g} s, of which "
                f"{shot.outside:.0%} outside the denoiser",
                flush=True,
            )
            add(_result(first, [shot]))
        except (ValueError, RuntimeError) as error:
            print(f"not measured: a whole shot: {reason_of(error)}", flush=True)
            release_memory()
    for case in others if arguments.sweep else []:
        if time.perf_counter() - arguments.began > 60 * arguments.minutes:
            print(f"not measured: {case.name} and what follows: {arguments.minutes:g} minutes are over (--minutes)")
            break
        of_memory = case.model.memory_attention != first.model.memory_attention
        sizes = arguments.memory if of_memory else [arguments.sweep_memory]
        rows += (found := list(measured(case, memory_sizes=sizes)))
        add(_result(case, found))
    print(table(rows, model))


def _result(case: Case, rows: Sequence[Row | ShotRow]) -> dict[str, Any]:
    """What JSON has of a case."""
    return {
        "model": case.model.name,
        "video": asdict(case.model.video),
        "layers": case.model.network.transformer["num_layers"],
        "memory_attention": case.model.memory_attention,
        "runtime": asdict(case.runtime),
        "rows": [asdict(row) for row in rows],
    }


def _from(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if (found := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {found}")
        return found

    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="storymem benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a choice of configs/model")
    parser.add_argument("--runtime", default="auto", help="a choice of configs/runtime")
    parser.add_argument("--memory", type=_from(0), nargs="+", default=[0, 4, 10], help="numbers of memory frames")
    parser.add_argument("--sweep-memory", type=_from(0), default=4, help="memory frames of a sweep and of a whole shot")
    parser.add_argument("--sweep", action="store_true", help="also with one setting changed at a time")
    parser.add_argument("--shot", action="store_true", help="also a whole shot")
    parser.add_argument("--steps", type=_from(1), default=8, help="of the whole shot")
    parser.add_argument("--repeats", type=_from(1), default=2, help="forwards measured, after one to warm up")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further case of a sweep begins")
    parser.add_argument("--layers", type=_from(1), help="keep so many of the model's layers, for small devices")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where to save")
    parser.add_argument("overrides", nargs="*", help="key=value, as for scripts/generate.py")
    arguments = parser.parse_args()
    arguments.began = time.perf_counter()
    device, results = resolve_device("cpu" if arguments.runtime == "cpu" else "auto"), []
    arguments.model = arguments.model or ("tiny" if device.type == "cpu" else "wan2.2-a14b")

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        save(arguments.json, device, results)

    _run(arguments, add)
    if device.type == "cpu":
        print("\nThere is no accelerator here: these figures do not show how fast or how large the true model is.")
    print(f"\nsaved to {arguments.json}")
