"""Train the toy models from nothing, stage by stage: `python scripts/build_toy.py --stage all --work build/toy`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from storymem.toy.fitting import Run, Schedule
from storymem.toy.vae import train_vae


def main() -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("vae",), default="vae")
    parser.add_argument("--work", type=Path, default=Path("build/toy"), help="checkpoints, logs and pictures")
    parser.add_argument("--minutes", type=float, help="train for so long, counted over all resumed runs")
    parser.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    schedule = Schedule(minutes=args.minutes, steps=args.steps, learning_rate=3e-3, warmup=100)
    train_vae(Run(args.work / args.stage), schedule)


if __name__ == "__main__":
    main()
