"""What the embedded models reach on held-out stories of the drawn world.

    python -m benchmarks.toy [--count 200] [--parts vae text scorers joints memory filter]

Prints the figures beside their targets, with 95 % bootstrap intervals over stories, and writes them to
benchmarks/results/toy.json with versions and date. With 200 stories it takes about an hour; a run of some parts
replaces only those in the file.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch

from toyworld import WEIGHTS
from toyworld.report import GUIDANCE, PARTS, STEPS, Report

#: Part, figure, description, target.
TARGETS = (
    ("vae", "psnr_db", "VAE, PSNR of whole shots in dB", "28"),
    ("vae", "attributes_right", "VAE, attributes read right in decoded frames", "0.98"),
    ("text", "place_time_framing_action", "base, place, time, framing and action as asked", "0.95"),
    ("text", "looks", "base, looks as asked", "0.92"),
    ("scorers", "clip_place_and_time_top1", "CLIP, place and time top-1", "0.95"),
    ("scorers", "quality_auroc", "quality head, AUROC clean against damaged", "0.95"),
    ("joints", "joint_over_inside_median", "step across a joint over steps inside a shot", "at most 1.5"),
    ("memory", "with_memory", "looks as in memory, one character", "0.90"),
    ("memory", "without", "the same without memory", "chance"),
    ("memory", "several_characters", "looks as in memory, two or three characters", ""),
    ("memory", "chance", "chance", ""),
    ("filter", "kept", "quality filter, frames of the model accepted", ""),
    ("filter", "refused_of_damaged", "quality filter, damaged copies of them refused", ""),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="held-out stories; joints and filter take a quarter")
    parser.add_argument("--parts", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--adapter", type=Path, help="instead of the one beside the weights")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of shots made from text and memory")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/toy.json"))
    parser.add_argument("--quick", action="store_true", help="four stories and six steps: only to see that it runs")
    args = parser.parse_args()
    figures = json.loads(args.output.read_text()) if args.output.is_file() else {}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    made = {"date": datetime.now(UTC).date().isoformat(), **versions}
    count, steps = (4, 6) if args.quick else (args.count, STEPS)
    report = Report(args.weights, adapter=args.adapter, count=count, steps=steps, guidance=args.guidance)
    for part in args.parts or PARTS:  # written one by one: all take an hour
        figures[part] = {**report.measure(part), "steps": steps, "guidance": args.guidance, "made": made}
        if not args.quick:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{'figure':52} {'reached':>8}  {'interval':16} target")
    for part, name, description, target in TARGETS:
        if name in figures.get(part, {}):
            low_high = figures[part].get(f"{name}_interval") or figures[part].get("interval")
            interval = "{:.3f} to {:.3f}".format(*low_high) if low_high and name != "psnr_db" else ""
            print(f"{description:52} {figures[part][name]:8.3f}  {interval:16} {target}")


if __name__ == "__main__":
    main()
