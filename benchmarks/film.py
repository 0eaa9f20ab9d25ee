"""Where the wall time of a film goes: everything outside denoising and decoding is overhead.

    python -m benchmarks.film [--quick]

Generates the film of the example story on ``model=tiny`` with the published sampler, from loading the networks to the
joined film.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import show
from storymem.composition import composed

STORY = Path(__file__).parents[1] / "examples" / "the_keeper.yaml"


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``call``, which adds the wall time of each of its calls to ``seconds``."""

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = call(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return found

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight steps a shot, tiny's own, in place of forty")
    arguments = parser.parse_args()
    overrides = [f"story={STORY}", "model=tiny", *([] if arguments.quick else ["sampler=unipc"])]

    import torch
    from diffusers import AutoencoderKLWan

    from storymem.config import build_settings
    from storymem.film.generate import build_storyteller
    from storymem.film.settings import GenerateSettings
    from storymem.story import load_story
    from storymem.wan.pipeline import WanMemoryToVideoPipeline

    denoising: list[float] = []
    decoding: list[float] = []
    WanMemoryToVideoPipeline._denoise = timed(WanMemoryToVideoPipeline._denoise, denoising)
    AutoencoderKLWan.decode = timed(AutoencoderKLWan.decode, decoding)

    config = composed("generate", overrides)
    settings = build_settings(GenerateSettings, config)
    story = load_story(settings.story)
    teller = build_storyteller(settings, config)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        film = teller.tell(story, Path(folder) / "film")
        whole = time.perf_counter() - started
    stages = {name: sum(shot.seconds[name] for shot in film.shots) for name in film.shots[0].seconds}
    row = {
        "shots": len(film.shots),
        "steps": settings.sampler.steps,
        "threads": torch.get_num_threads(),
        "seconds": round(whole, 2),
        "denoising": round(sum(denoising) / whole, 3),
        "decoding": round(sum(decoding) / whole, 3),
        "overhead": round(1 - sum(denoising + decoding) / whole, 3),
        "stages": {name: round(seconds, 2) for name, seconds in stages.items()},
    }
    print("seconds, and shares of them (target of the overhead: at most 0.15)")
    show("film", [row])


if __name__ == "__main__":
    main()
