"""Speed of each scorer at its true size with random weights, and of ViCLIP with several clips at once.

    python -m benchmarks.scorers
    python -m benchmarks.scorers --quick    # fewer rounds, smaller batches, no L/14

HPSv3 (8 billion parameters) is measured at its true width with one layer of each tower, and the time of its other
layers is added by calculation, so that it fits into any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import open_clip
import torch

from storymem.devices import resolve_device
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.hpsv3 import patches_of, selector_size
from storymem.scorers.hpsv3_network import PUBLISHED, Hpsv3Network, cast_backbone
from storymem.scorers.scorer import resolve_dtype
from storymem.scorers.viclip import ViclipScorer
from storymem.scorers.viclip_network import VICLIP_B_16, VICLIP_L_14

FRAME = (480, 832)  # height and width of a published shot
PROMPT_TOKENS = 600  # HPSv3's text around the image, about


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median wall-clock time of a call, after one call to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times[1:])


def now() -> float:
    """The clock, after the accelerator has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def frames(count: int) -> torch.Tensor:
    return torch.rand(count, 3, *FRAME, generator=torch.Generator().manual_seed(0))


def measure_clip(quick: bool, place: dict) -> dict[str, float]:
    batch = 4 if quick else 32
    scorer = ClipScorer.from_config(open_clip.get_model_config("ViT-B-32-quickgelu"), batch_size=batch, **place)
    images = frames(batch)
    return {"CLIP ViT-B/32": batch / seconds(lambda: scorer.embed_images(images), 1 if quick else 3)}


def measure_aesthetic(quick: bool, place: dict) -> dict[str, float]:
    batch = 2 if quick else 8
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    scorer = AestheticScorer.from_config(config, batch_size=batch, **place)
    images = frames(batch)
    return {"LAION V1 on CLIP ViT-L/14": batch / seconds(lambda: scorer.score(images), 1 if quick else 3)}


def measure_viclip(quick: bool, place: dict) -> tuple[dict[str, float], dict[str, float]]:
    """Frames per second, and the speed-up of one call for all clips over one call per clip."""
    rates, ratios = {}, {}
    count, rounds = (2, 1) if quick else (4, 2)
    sizes = {"B/16": VICLIP_B_16} if quick else {"B/16": VICLIP_B_16, "L/14": VICLIP_L_14}
    clips = frames(8 * count).reshape(count, 8, 3, *FRAME)
    for name, config in sizes.items():
        scorer = ViclipScorer.from_config(config, batch_size=count, **place)
        scorer.embed_clips(clips[:1])
        times = []
        for _ in range(rounds):  # in turns, so that a busy machine slows both
            start = now()
            for clip in clips:
                scorer.embed_clips(clip[None])
            middle = now()
            scorer.embed_clips(clips)
            times.append((middle - start, now() - middle))
        one_by_one, at_once = (min(column) for column in zip(*times, strict=True))
        rates[f"ViCLIP {name}, one call per clip"] = 8 * count / one_by_one
        rates[f"ViCLIP {name}, {count} clips at once"] = 8 * count / at_once
        ratios[f"ViCLIP {name}, {count} clips at once over one call per clip"] = one_by_one / at_once
    return rates, ratios


class Stopwatch:
    """Wall-clock time of a module's last forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.seconds = -now()

    def _stop(self, *_: object) -> None:
        self.seconds += now()


@torch.no_grad()
def measure_hpsv3(quick: bool, place: dict) -> dict[str, float]:
    """From uint8 frames to scores with one layer of each tower; the missing ones are added by calculation."""
    batch, rounds = (1, 1) if quick else (2, 3)
    device, dtype = resolve_device(place["device"]), resolve_dtype(place["dtype"])
    config = copy.deepcopy(PUBLISHED)
    text, vision = config.text_config, config.vision_config
    layers, depth = text.num_hidden_layers, vision.depth
    text.num_hidden_layers = vision.depth = 1
    text.vocab_size = 1024  # looking up rows takes no time, and 150,000 of them take RAM
    config.image_token_id, config.video_token_id = 1001, 1002
    network = Hpsv3Network(config)
    cast_backbone(network, dtype)
    network.eval().to(device)
    layer, block = Stopwatch(network.model.language_model.layers[0]), Stopwatch(network.model.visual.blocks[0])
    images = (torch.rand(batch, 3, *selector_size(*FRAME)) * 255).to(torch.uint8)
    missing: list[float] = []

    def run() -> None:
        patches, grids = patches_of(images)
        image = [config.image_token_id] * (len(patches) // batch // 4)
        row = torch.tensor([*image, *[7] * PROMPT_TOKENS, network.reward_token], device=device).expand(batch, -1)
        network(row, torch.ones_like(row), patches.to(device), grids.to(device))
        missing.append((layers - 1) * layer.seconds + (depth - 1) * block.seconds)

    measured = seconds(run, rounds)
    whole = measured + statistics.median(missing[1:])
    return {"HPSv3 (calculated from one layer at true width)": batch / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller batches, no ViCLIP L/14")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    place = {"device": arguments.device, "dtype": arguments.dtype}

    print(f"{FRAME[1]}x{FRAME[0]} frames, {arguments.dtype} on {resolve_device(arguments.device)},", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, random weights")
    rates = measure_clip(arguments.quick, place) | measure_aesthetic(arguments.quick, place)
    viclip_rates, ratios = measure_viclip(arguments.quick, place)
    rates |= viclip_rates | measure_hpsv3(arguments.quick, place)
    for name, rate in rates.items():
        print(f"{name:60s} {rate:8.3f} frames/s {1 / rate:8.2f} s/frame")
    for name, ratio in ratios.items():
        print(f"{name:60s} {ratio:8.2f} times as fast")
    if arguments.json:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.platform(),
            "device": str(resolve_device(arguments.device)),
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "frames_per_second": rates,
            "times_as_fast": ratios,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
