"""What the toy models reach on held-out stories of the drawn world.

    python -m benchmarks.toy [--count 200] [--parts vae text scorers joints memory filter]

Prints the figures beside what they should reach, and writes them to benchmarks/results/toy.json with versions and
date. With 200 stories it takes about an hour; a run of some parts replaces only those in the file.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

from toyworld.build import WEIGHTS
from toyworld.report import GUIDANCE, measure

#: Part, figure, how it is called, what it should reach.
AIMS = (
    ("vae", "psnr_db", "VAE, PSNR of whole shots in dB", "28"),
    ("vae", "attributes_right", "VAE, attributes read right in decoded frames", "0.97"),
    ("text", "place_time_framing_action", "base, place, time, framing and action as asked", "0.90"),
    ("text", "looks", "base, looks as asked", "0.80"),
    ("scorers", "clip_place_and_time_top1", "CLIP, place and time top-1", "0.95"),
    ("scorers", "quality_auroc", "quality head, AUROC clean against damaged", "0.95"),
    ("joints", "joint_over_inside_median", "step across a joint over steps inside a shot", "at most 1.5"),
    ("memory", "with_memory", "adapter, looks as in the frames remembered", "0.90"),
    ("memory", "published_guidance", "the same with guidance as published", ""),
    ("memory", "without", "the same without memory", "chance"),
    ("memory", "chance", "chance", ""),
    ("filter", "kept", "quality filter, frames of the model kept", ""),
    ("filter", "refused_of_damaged", "quality filter, damaged copies of them refused", ""),
)
PARTS = tuple(dict.fromkeys(part for part, *_ in AIMS))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=200, help="held-out stories; joints, memory and filter take a quarter"
    )
    parser.add_argument("--parts", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--adapter", type=Path, help="instead of the one beside the weights")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of shots made from text and memory")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/toy.json"))
    parser.add_argument("--quick", action="store_true", help="four stories and six steps: only to see that it runs")
    args = parser.parse_args()
    merged = json.loads(args.output.read_text()) if args.output.is_file() else {}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    made = {"date": datetime.now(UTC).date().isoformat(), **versions}
    quick: dict[str, Any] = {"count": 4, "steps": 6} if args.quick else {"count": args.count}
    for part in args.parts or PARTS:  # written one by one: all take an hour
        figures = measure(args.weights, adapter=args.adapter, guidance=args.guidance, parts=[part], **quick)
        merged[part] = {**figures[part], "made": made}
        if not args.quick:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(merged, indent=2) + "\n")
    print(f"{'what':58} {'reached':>8}  should be")
    for part, name, called, aim in AIMS:
        if part in merged:
            print(f"{called:58} {merged[part][name]:8.3f}  {aim}")


if __name__ == "__main__":
    main()
