"""Train the toy models from nothing, stage by stage, and save them: each stage resumes where it stopped.

python scripts/build_toy.py --work build/toy                         # everything, some hours on two cores
python scripts/build_toy.py --work build/toy --stage vae --minutes 5
python scripts/build_toy.py --work /tmp/toy --weights /tmp/weights --quick  # a few steps of everything
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from toyworld.build import STAGES, WEIGHTS, Recipe


def main() -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, default=Path("build/toy"), help="checkpoints, logs and pictures")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the stage `save` writes the models")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage, to see that it runs")
    parser.add_argument("--minutes", type=float, help="train a stage for so long, counted over all resumed runs")
    parser.add_argument("--steps", type=int, help="train a stage for so many steps")
    parser.add_argument("--adapter", type=Path, help="the folder of a trained memory adapter, for the stage `adapter`")
    parser.add_argument("--stories", type=int, default=400, help="of how many stories the stage `clips` writes clips")
    parser.add_argument("--threads", type=int, default=2, help="processor threads; one where others compute too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        work=args.work,
        weights=args.weights,
        quick=args.quick,
        minutes=args.minutes,
        steps=args.steps,
        stories=args.stories,
        adapter=args.adapter,
    )
    for stage in STAGES if args.stage == "all" else (args.stage,):
        STAGES[stage](recipe)


if __name__ == "__main__":
    main()
