"""What a film costs, of systems that denoise all shots at once and of those that make one after the other.

    python -m benchmarks.methods_cost [--shots 4 8 16 32] [--steps 4] [--quick]

For films of 4, 8, 16 and 32 shots: operations at true size, calculated (Wan2.2 A14B, 480p, 81 frames a shot, 40 guided
steps), and CPU seconds and peak RAM above the weights, measured on a small network with random weights. A shot has up
to ten keyframes, of which each earlier shot adds three; LCT costs what HoloCine with full attention does. Prints the
tables and writes them with a plot to benchmarks/results/methods_cost.md and .png. Three minutes on one core.
--quick: 2 and 4 shots, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import markdown
from storymem.config import build_settings
from storymem.wan.estimate import forward_flops
from storymem.wan.inputs import Inputs
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import Layout, Text, holocine, memory_cached, memory_joint, single_shot
from storymem.wan.settings import ModelSettings, RuntimeSettings

FILE = Path("benchmarks/results/methods_cost.md")
SIZES = (4, 8, 16, 32)
CAPACITY, ADDED = 10, 3  # keyframes that a shot recalls at most, and that a shot adds
STEPS, EXPERTS, PASSES = 40, 2, 2

Build = Callable[[int, int], Sequence[Layout]]
"""From the shots of a film and the latent frames of a shot to the layouts that are denoised, one after the other."""


def _windows(shots: int, length: int) -> list[Text]:
    """A global caption and one of each shot, of equal length, in ``length`` tokens, as HoloCine reads them."""
    part = length // (shots + 1)
    return [Text(spans=((0, part), (k * part, (k + 1) * part))) for k in range(1, shots + 1)]


def _recalled(shot: int) -> int:
    return min(CAPACITY, ADDED * shot)


@dataclass(frozen=True)
class System:
    """A row of the tables."""

    name: str
    layouts: Callable[[int, int, int], Sequence[Layout]]  # shots, latent frames of a shot, tokens of the text
    memory: str = "joint"  # memory_attention of the pipeline


SYSTEMS = (
    System("independent shots", lambda n, t, _: [single_shot(t)] * n),
    System("StoryMem, joint", lambda n, t, _: [memory_joint(_recalled(k), t) for k in range(n)]),
    System("StoryMem, cached", lambda n, t, _: [memory_cached(_recalled(k), t) for k in range(n)], memory="cached"),
    System("HoloCine full, LCT", lambda n, t, length: [holocine([t] * n, _windows(n, length), sparse=False)]),
    System("HoloCine sparse", lambda n, t, length: [holocine([t] * n, _windows(n, length), sparse=True)]),
)


def operations(system: System, shots: int, model: ModelSettings) -> float:
    """Operations of a film: all steps and both passes; what is cached is computed once a shot and expert."""
    network, video = model.network, model.video
    height, width = model.spec.latent_size(video.height, video.width)
    shape: dict[str, Any] = {"height": height, "width": width, "text_tokens": network.text_tokens}
    total = 0
    for layout in system.layouts(shots, model.spec.latent_frames(video.frames), network.text_tokens):
        total += STEPS * PASSES * forward_flops(model.transformer, layout, cached=layout.constant, **shape).total
        if layout.constant:
            total += EXPERTS * forward_flops(model.transformer, layout.only(layout.constant), **shape).total
    return float(total)


@dataclass(frozen=True)
class Measured:
    """CPU seconds, and the peak of RAM above the weights in bytes."""

    seconds: float
    peak: int


def measure(system: System, shots: int, pipe: WanMemoryToVideoPipeline, model: ModelSettings, steps: int) -> Measured:
    """Denoise a film in a process of its own, of which the peak can be read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before, began = _peak(), time.process_time()
        _denoise(system, shots, pipe, model, steps)
        taken = {"seconds": time.process_time() - began, "peak": _peak() - before}
        os.write(writer, json.dumps(taken).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return Measured(**json.loads(text))


def _peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _denoise(system: System, shots: int, pipe: WanMemoryToVideoPipeline, model: ModelSettings, steps: int) -> None:
    text, video, spec = model.network.text_tokens, model.video, model.spec
    size, frames = spec.latent_size(video.height, video.width), spec.latent_frames(video.frames)
    prompt = {"prompt": torch.zeros(1, text, model.network.transformer["text_dim"])}
    for layout in system.layouts(shots, frames, text):
        noisy = layout.frames - sum(segment.frames for segment in layout.segments if segment.name in layout.constant)
        clean = layout.frames - noisy
        inputs = Inputs(
            layout=layout,
            negative_layout=layout,
            text=prompt,
            negative=prompt,
            condition=torch.zeros(1, spec.condition_channels, noisy, *size),
            memory=torch.zeros(1, spec.in_channels, clean, *size) if clean else None,
        )
        noise = torch.randn(1, spec.latent_channels, noisy, *size)
        pipe.denoise(noise, inputs, num_inference_steps=steps, guidance_scale=3.5)


# Tables and plot


def table(values: Mapping[str, Sequence[float]], sizes: Sequence[int], unit: str, form: str) -> str:
    """A Markdown table with a row for each system; growth is the exponent between the two longest films."""
    cells = [
        [
            name,
            *(format(value, form) for value in found),
            f"N^{math.log(found[-1] / found[-2], sizes[-1] / sizes[-2]):.2f}",
        ]
        for name, found in values.items()
    ]
    return markdown([unit, *(f"{size} shots" for size in sizes), "growth"], cells)


def plot(panels: Mapping[str, Mapping[str, Sequence[float]]], sizes: Sequence[int], path: Path) -> None:
    """One panel for each quantity, both axes logarithmic."""
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name, found in values.items():
                axes.plot(sizes, found, marker="o", markersize=3, linewidth=1, label=name)
            axes.set(title=title, xlabel="shots of the film", xscale="log", yscale="log", xticks=sizes)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
        axes.legend(fontsize=6)
        figure.savefig(path, dpi=100)


def settings_of(name: str, **changes: Any) -> ModelSettings:
    """The settings of ``configs/model``, without adapters."""
    values: dict[str, Any] = yaml.safe_load(Path(f"configs/model/{name}.yaml").read_text(encoding="utf-8"))["model"]
    return build_settings(ModelSettings, values | {"adapter": None} | changes)


def main() -> None:
    """Calculate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    sizes, steps = ((2, 4), 2) if given.quick else (given.shots, given.steps)
    torch.set_num_threads(1)
    true = settings_of("wan2.2-a14b")
    small = settings_of("tiny", video={"height": 96, "width": 128, "frames": 17, "fps": 8})
    pipes = {}
    for memory in ("joint", "cached"):
        model = replace(small, memory_attention=memory)
        pipes[memory] = load_pipeline(model, runtime=RuntimeSettings(device="cpu"), text_encoder=False)
        pipes[memory].set_progress_bar_config(disable=True)
    calculated = {one.name: [operations(one, size, true) / 1e15 for size in sizes] for one in SYSTEMS}
    measured = {one.name: [measure(one, size, pipes[one.memory], small, steps) for size in sizes] for one in SYSTEMS}
    seconds = {name: [one.seconds for one in found] for name, found in measured.items()}
    peaks = {name: [one.peak / 1e6 for one in found] for name, found in measured.items()}
    text = "\n".join(
        [
            f"`python -m benchmarks.methods_cost`: operations at true size ({STEPS} guided steps, calculated); CPU",
            f"seconds and peak RAM above the weights of {steps} guided steps on a small network (measured).\n",
            table(calculated, sizes, "PFLOP", ",.0f"),
            "",
            table(seconds, sizes, "CPU seconds", ".1f"),
            "",
            table(peaks, sizes, "MB", ".0f"),
        ]
    )
    print(text)
    if not given.quick:
        FILE.write_text(f"{text}\n\n![Cost of a film]({FILE.stem}.png)\n", encoding="utf-8")
        panels = {"PFLOP at true size": calculated, "CPU seconds, small network": seconds, "peak RAM, MB": peaks}
        plot(panels, sizes, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
