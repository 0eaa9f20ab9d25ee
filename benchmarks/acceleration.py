"""What each way of making a shot faster saves, and by how much it changes the shot: ratios from one run on the CPU.

    python -m benchmarks.acceleration [--model toy] [--story FILE] [--memory 4] [--steps 40] [--repeats 3] [--quick]

Denoises one shot, with memory, guided, again and again: as published, and with one thing changed. Both take turns, so
that a busy machine slows both; times are CPU seconds of one thread. A change is the norm of the difference of the
latents over the norm of those as published.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.tables import show
from storymem.composition import composed
from storymem.config import build_settings
from storymem.data.clips import spread
from storymem.film.settings import GenerateSettings
from storymem.story import load_story
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.runtime import compiled_graphs, release_memory
from storymem.wan.settings import MemoryMode, RuntimeSettings, SamplerSettings, VideoSettings

STORY = Path(__file__).parents[1] / "examples" / "ada_and_the_tent.yaml"
CPU = RuntimeSettings(device="cpu", threads=1)
MEMORY_SIZES = (0, 4, 10)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """The shot that is denoised: texts and memory are encoded once."""

    prompt: Tensor
    negative: Tensor
    memory: Tensor
    video: VideoSettings
    sampler: SamplerSettings

    def denoise(self, pipe: WanMemoryToVideoPipeline, memory: int) -> tuple[Tensor, float]:
        """Latents, and the CPU seconds they took."""
        started = time.process_time()
        latents = pipe(
            prompt_embeds=self.prompt,
            negative_prompt_embeds=self.negative,
            memory=self.memory[:memory] if memory else None,
            height=self.video.height,
            width=self.video.width,
            num_frames=self.video.frames,
            num_inference_steps=self.sampler.steps,
            guidance_scale=self.sampler.guidance,
            guidance_scale_2=self.sampler.guidance_low,
            negative_sees_memory=self.sampler.negative_sees_memory,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0]
        return latents, time.process_time() - started


def prepare(settings: GenerateSettings, pipe: WanMemoryToVideoPipeline, memory: int) -> Shot:
    """The second shot of the story; its memory are frames of the first, spread evenly, as ``pipe`` makes it."""
    model, sampler = settings.model, settings.sampler
    texts = [shot.prompt for shot in load_story(settings.story).shots[:2]]
    encoder = load_pipeline(model, runtime=settings.runtime, experts=False)
    with torch.no_grad():
        first, second, negative = (
            encoder.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=model.network.text_tokens
            )[0].cpu()
            for text in (*texts, sampler.negative_prompt)
        )
    del encoder
    release_memory()
    (frames,) = pipe(
        prompt_embeds=first,
        negative_prompt_embeds=negative,
        height=model.video.height,
        width=model.video.width,
        num_frames=model.video.frames,
        num_inference_steps=min(sampler.steps, 15),
        guidance_scale=sampler.guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="pil",
        return_dict=False,
    )[0]
    latents = pipe.encode_memory([frames[place] for place in spread(memory, len(frames))])
    return Shot(prompt=second, negative=negative, memory=latents, video=model.video, sampler=sampler)


def compare(
    what: str, shot: Shot, plain: WanMemoryToVideoPipeline, other: WanMemoryToVideoPipeline, memory: int, repeats: int
) -> dict[str, Any]:
    """Both in turn, after a first time that is not counted, which compiles what is to be compiled."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        (expected, took), (latents, took_other) = shot.denoise(plain, memory), shot.denoise(other, memory)
        if turn:
            seconds[0].append(took)
            seconds[1].append(took_other)
    before, after = (statistics.median(times) for times in seconds)
    change = ((latents - expected).norm() / expected.norm()).item()
    print(f"{what}, {memory} keyframes: {before / after:.2f} times as fast", flush=True)
    return {
        "what": what,
        "memory": memory,
        "plain_seconds": round(before, 4),
        "seconds": round(after, 4),
        "faster": round(before / after, 2),
        "change": float(f"{change:.2g}"),
    }


def runtimes() -> dict[str, dict[str, Any]]:
    """Every change of ``runtime`` that is compared, by its name in the table."""
    return {
        "cache first_block at 0.05": {"cache": "first_block", "cache_threshold": 0.05},
        "cache first_block at 0.1": {"cache": "first_block", "cache_threshold": 0.1},
        "cache taylor, every 2nd step": {"cache": "taylor", "cache_threshold": 1},
        "cache taylor, every 3rd step": {"cache": "taylor", "cache_threshold": 2},
        "compile blocks": {"compile": "blocks"},
        "compile blocks, first_block at 0.05": {"compile": "blocks", "cache": "first_block", "cache_threshold": 0.05},
    }


def loaded(settings: GenerateSettings, **changes: Any) -> WanMemoryToVideoPipeline:
    """The experts, with ``changes`` of ``runtime``."""
    runtime = replace(settings.runtime, **changes)
    pipe = load_pipeline(settings.model, runtime=runtime, sampler=settings.sampler, text_encoder=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare_all(settings: GenerateSettings, *, memory: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each change, printed as they are measured."""
    plain = loaded(settings)
    shot = prepare(settings, plain, max(memory, *MEMORY_SIZES))
    # Without an adapter, which is for one of the modes: it is the speed that is compared.
    joint, cached = (
        loaded(replace(settings, model=replace(settings.model, memory_attention=mode, adapter=None)))
        for mode in get_args(MemoryMode)
    )
    rows = [compare("memory_attention cached", shot, joint, cached, size, repeats) for size in MEMORY_SIZES]
    for what, changes in runtimes().items():
        rows.append(compare(what, shot, plain, loaded(settings, **changes), memory, repeats))
    print(f"\ncompiled graphs: {compiled_graphs()}, for one shape")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="one of configs/model")
    parser.add_argument("--story", type=Path, default=STORY, help="its second shot is denoised")
    parser.add_argument("--memory", type=int, default=4, help="memory frames, unless the table has another number")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="15 steps, each shot once")
    parser.add_argument("overrides", nargs="*", help="settings as scripts/generate.py takes them")
    arguments = parser.parse_args()
    steps, repeats = (15, 1) if arguments.quick else (arguments.steps, arguments.repeats)
    overrides = [f"story={arguments.story}", f"model={arguments.model}", f"sampler.steps={steps}"]
    settings = build_settings(GenerateSettings, composed("generate", [*overrides, *arguments.overrides]))
    torch.set_num_threads(1)
    published = replace(settings.sampler, negative_sees_memory=True)
    settings = replace(settings, runtime=CPU, sampler=published)
    rows = compare_all(settings, memory=arguments.memory, repeats=repeats)
    show("acceleration", [{"model": settings.model.name, "steps": steps, **row} for row in rows])


if __name__ == "__main__":
    main()
