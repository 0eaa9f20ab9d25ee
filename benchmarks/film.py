"""Where the wall time of a film goes: everything outside denoising and decoding is overhead.

    python -m benchmarks.film [--quick]

Tells the example story on ``model=tiny`` with the published sampler, from loading the networks to the joined film.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storymem.commands.configuration import composed

STORY = Path(__file__).parents[1] / "examples" / "the_keeper.yaml"


class LoopTimer:
    """Wall time of denoising loops (first forward to last step of the sampler) and of decoding."""

    def __init__(self) -> None:
        self.denoising = self.decoding = 0.0
        self._began: float | None = None
        self._stepped = 0.0

    def forward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._began is None:
                self._began = time.perf_counter()
            return call(*args, **kwargs)

        return timed

    def step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            self._stepped = time.perf_counter()
            return result

        return timed

    def decode(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            assert self._began is not None, "a shot is decoded after it was denoised"
            self.denoising += self._stepped - self._began
            started, self._began = time.perf_counter(), None
            result = call(*args, **kwargs)
            self.decoding += time.perf_counter() - started
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight steps a shot, tiny's own, in place of forty")
    arguments = parser.parse_args()
    overrides = [f"story={STORY}", "model=tiny", *([] if arguments.quick else ["sampler=unipc"])]

    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.schedulers import UniPCMultistepScheduler

    from storymem.config import build_settings
    from storymem.film.generate import build_storyteller
    from storymem.film.settings import GenerateSettings
    from storymem.story import load_story

    timer = LoopTimer()
    WanTransformer3DModel.forward = timer.forward(WanTransformer3DModel.forward)
    UniPCMultistepScheduler.step = timer.step(UniPCMultistepScheduler.step)
    AutoencoderKLWan.decode = timer.decode(AutoencoderKLWan.decode)

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
        "benchmark": "film",
        "shots": len(film.shots),
        "steps": settings.sampler.steps,
        "threads": torch.get_num_threads(),
        "seconds": round(whole, 2),
        "denoising": round(timer.denoising / whole, 3),
        "decoding": round(timer.decoding / whole, 3),
        "overhead": round(1 - (timer.denoising + timer.decoding) / whole, 3),
        "stages": {name: round(seconds, 2) for name, seconds in stages.items()},
    }
    print(f"film of {row['shots']} shots, {row['steps']} steps, {row['threads']} threads: {whole:.1f} s")
    for name, target in (("denoising", ""), ("decoding", ""), ("overhead", "  (target: at most 15 %)")):
        print(f"  {name:10} {100 * row[name]:5.1f} %{target}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
