"""CPU seconds of a shot for each size of memory and both layouts, and the share of a step outside the denoiser.

    python -m benchmarks.shot [--against CHECKOUT] [--memory 0 4 6] [--repeats 5]

``model=toy`` denoises random latents, guided. With ``--against`` the same shots run with the code of another checkout,
in turn and in processes of their own; the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

LAYOUTS = ("joint", "cached")
TARGET = 0.03  # at most so much of a step outside its two forwards


def worker() -> None:
    """Answer each line "layout memory" with "seconds outside", the share of the steps outside the forwards."""
    import torch
    import yaml

    from storymem.config import build_settings
    from storymem.wan.loading import load_pipeline
    from storymem.wan.settings import ModelSettings, RuntimeSettings

    torch.set_num_threads(1)
    values: dict[str, Any] = yaml.safe_load(Path("configs/model/toy.yaml").read_text())["model"]
    pipes, forwards = {}, [0.0, 0.0]

    def before(*_: object) -> None:
        forwards[1] = time.process_time()

    def after(*_: object) -> None:
        forwards[0] += time.process_time() - forwards[1]

    for layout in LAYOUTS:  # without an adapter, which is trained for one of them: only speed is compared
        model = build_settings(ModelSettings, values | {"memory_attention": layout, "adapter": None})
        pipes[layout] = load_pipeline(model, runtime=RuntimeSettings(device="cpu"), text_encoder=False)
        pipes[layout].set_progress_bar_config(disable=True)
        for expert in pipes[layout].experts.values():
            expert.register_forward_pre_hook(before)
            expert.register_forward_hook(after)
    text = torch.zeros(2, 1, model.network.text_tokens, model.network.transformer["text_dim"])
    height, width = model.video.height, model.video.width
    memory = torch.zeros(10, 16, 1, *model.spec.latent_size(height, width))
    print("ready", flush=True)
    for line in sys.stdin:
        layout, count = line.split()
        steps: list[tuple[float, float]] = []

        def note(*_: object, steps: list = steps) -> dict:
            steps.append((time.process_time(), forwards[0]))
            return {}

        began = time.process_time()
        pipes[layout](
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            memory=memory[: int(count)] if int(count) else None,
            height=height,
            width=width,
            num_frames=model.video.frames,
            num_inference_steps=15,
            output_type="latent",
            callback_on_step_end=note,
        )
        seconds = time.process_time() - began
        pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(steps)]
        print(seconds, statistics.median(1 - inside / whole for whole, inside in pairs), flush=True)


class Side:
    """A process with the code of one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(command, cwd=checkout, env=environment, text=True, **pipes)
        self._answer()

    def shot(self, layout: str, memory: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        print(layout, memory, file=self.process.stdin, flush=True)
        seconds, outside = map(float, self._answer().split())
        return seconds, outside

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 4, 6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    ours = Side(Path(__file__).parents[1])
    other = None if arguments.against is None else Side(arguments.against)
    print("layout  memory  CPU sec.  outside the forwards of a step  seconds over those of the other version")
    for layout in LAYOUTS:
        for memory in arguments.memory:
            shots, ratios = [], []
            for turn in range(arguments.repeats + 1):
                shot = ours.shot(layout, memory)
                ratio = shot[0] / other.shot(layout, memory)[0] if other else float("nan")
                if turn:  # the first warms up
                    shots.append(shot)
                    ratios.append(ratio)
            seconds, outside = (statistics.median(values) for values in zip(*shots, strict=True))
            print(
                f"{layout:<7} {memory:>6} {seconds:>8.3f} {outside:>12.1%} (target {TARGET:.0%})"
                f"{statistics.median(ratios):>18.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
