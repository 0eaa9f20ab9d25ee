"""Measure a model at true size with random weights: seconds a forward and a shot, TFLOP/s, memory.

storymem benchmark                 # what this machine can do: the large model on a GPU,
                                   # small ones on a CPU in less than two minutes
storymem benchmark --sweep --shot  # every attention kernel, cache, precision; a whole shot
storymem benchmark --model wan2.2-a14b --runtime gpu-24gb --memory 0 10
storymem benchmark runtime.attention=cudnn runtime.compile=blocks model.video.frames=41

The table goes to the terminal, and to a JSON file with the device, versions and commit. A case that cannot run is
listed with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from storymem.commands import benchmark, benchmark_report
from storymem.commands.configuration import composed
from storymem.config import build_settings
from storymem.film.settings import GenerateSettings
from storymem.wan.runtime import resolve_device
from storymem.wan.settings import VideoSettings

SMALL_VIDEO = VideoSettings(height=96, width=160, frames=9, fps=8)
SMALL_LAYERS = 2


def settings(model: str, runtime: str, overrides: Sequence[str]) -> GenerateSettings:
    """The settings that ``storymem generate`` would have."""
    return build_settings(
        GenerateSettings, composed("generate", [f"model={model}", f"runtime={runtime}", "story=none", *overrides])
    )


def planned(arguments: argparse.Namespace) -> Iterator[GenerateSettings]:
    """The models to measure, and how they run."""
    device = resolve_device("cpu" if arguments.runtime == "cpu" else "auto")
    large = device.type != "cpu"
    for name in [arguments.model] if arguments.model else ["wan2.2-a14b"] if large else ["tiny", "wan-1.3b-shaped"]:
        if name == "wan-1.3b-shaped":
            made = settings("tiny", arguments.runtime, arguments.overrides)
            model = benchmark.small_model(SMALL_VIDEO, layers=arguments.layers or SMALL_LAYERS)
            yield replace(made, model=replace(model, dtype="bfloat16" if large else "float32"))
            continue
        made = settings(name, arguments.runtime, arguments.overrides)
        if arguments.layers:
            transformer = made.model.network.transformer | {"num_layers": arguments.layers}
            network = replace(made.model.network, transformer=transformer)
            made = replace(made, model=replace(made.model, network=network))
        yield made


def run(made: GenerateSettings, arguments: argparse.Namespace) -> list[dict]:
    """Measure one model, printing as it goes."""
    # A shot is that of the published sampler, however few steps a small model takes.
    sampler = replace(made.sampler, steps=40, guidance=3.5, guidance_low=None, negative_sees_memory=True)
    runtime, reason = benchmark.settled(made.model, made.runtime, sampler)
    device = resolve_device(runtime.device)
    ceiling = benchmark.matmul_ceiling(device, getattr(torch, made.model.dtype))
    print(f"\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if device.type != "cpu":
        print(f"offload={runtime.offload}: {reason or 'as asked'}")
    print(f"ceiling: {ceiling:.3g} TFLOP/s in matrix products of {made.model.dtype}")
    cases = benchmark.variations(made.model, runtime, device) if arguments.sweep else []
    cases = cases or [benchmark.Case(name="plain", model=made.model, runtime=runtime)]
    rows, results = [], []
    for case in cases:
        measured = list(
            benchmark.measure(
                case, sampler=sampler, memory_sizes=arguments.memory, ceiling=ceiling, repeats=arguments.repeats
            )
        )
        rows += measured
        results.append(benchmark_report.as_result(made.model, case, measured, ceiling))
    print(benchmark_report.table(rows, made.model, sampler))
    if arguments.shot:
        shot = benchmark.measure_shot(cases[0], sampler=sampler, memory=max(arguments.memory), steps=arguments.steps)
        print(
            f"a whole shot of {shot.steps} steps at memory {shot.memory}: {shot.seconds:.3g} s, of which "
            f"{shot.outside:.0%} outside the denoiser"
        )
        results.append(benchmark_report.as_result(made.model, cases[0], [shot], ceiling))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="storymem benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a choice of configs/model, or wan-1.3b-shaped")
    parser.add_argument("--runtime", default="auto", help="a choice of configs/runtime")
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 4, 10], help="numbers of memory frames")
    parser.add_argument("--sweep", action="store_true", help="also with one thing changed at a time")
    parser.add_argument("--shot", action="store_true", help="also a whole shot")
    parser.add_argument("--steps", type=int, default=8, help="of the whole shot")
    parser.add_argument("--repeats", type=int, default=3, help="forwards measured, after two to warm up")
    parser.add_argument("--layers", type=int, help="so many of the model's layers, for devices that are too small")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/true_size.json"), help="where to save")
    parser.add_argument("overrides", nargs="*", help="key=value, as for storymem generate")
    arguments = parser.parse_args()
    results = [result for made in planned(arguments) for result in run(made, arguments)]
    device = resolve_device("cpu" if arguments.runtime == "cpu" else "auto")
    if device.type == "cpu":
        print("\nThere is no accelerator here: nothing of the above says how fast or how large the true model is.")
    print(f"\n{benchmark_report.published()}")
    benchmark_report.save(arguments.json, device, results)
    print(f"\nsaved to {arguments.json}")
