"""What a film will take, before anything is loaded: shots, memory, tokens, arithmetic, disk, weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storymem.film.folder import Film, estimated_bytes
from storymem.film.modes import GIVEN_FRAMES, mode_of
from storymem.film.progress import format_table
from storymem.film.settings import GenerateSettings, uses_text_to_video
from storymem.memory import Keyframe, RecallPolicy
from storymem.scorers import scorer_bytes, scorer_weights
from storymem.story import Story
from storymem.story.prompts import remarks_on
from storymem.story.references import reference_remarks
from storymem.wan.acceleration import check_acceleration
from storymem.wan.flops import ForwardFlops, cached_flops, forward_flops
from storymem.wan.layout import Launch, find_layout
from storymem.wan.memory_estimate import estimate_memory, memory_cache_bytes
from storymem.wan.precision import check_precision
from storymem.wan.presets import Machine, choose_runtime, this_machine
from storymem.wan.runtime import planned_device
from storymem.wan.sources import inspect_weights
from storymem.weights import MissingWeights, Weights, locate

if TYPE_CHECKING:
    from storymem.memory import SelectionPolicy
    from storymem.wan.settings import ModelSettings, RuntimeSettings


def make_plan(story: Story, settings: GenerateSettings, folder: Path) -> str:
    """The plan of a film as text.

    Memory is the most that a shot can look back at: every shot before it is taken to leave as many keyframes as its
    selector allows. Tokens and operations are those of one forward of an expert.
    """
    from hydra.utils import instantiate

    selector: SelectionPolicy = instantiate(settings.memory.selector)
    recall: RecallPolicy = instantiate(settings.memory.recall)
    video = settings.model.video
    passes = settings.sampler.steps * (2 if settings.sampler.guidance > 1 else 1)
    rows = [("shot", "scene", "mode", "frames", "memory", "tokens", "PFLOP per forward", "PFLOP")]
    total, frames, disk, most_memory, longest = 0.0, 0, 0, 0, 0
    for shot, recalled in zip(story.shots, _most_recalled(story, recall, selector.max_keyframes), strict=True):
        mode = mode_of(shot, story, continuity=settings.continuity, first_shot=settings.first_shot)
        length, repeated = shot.frames or video.frames, GIVEN_FRAMES[mode]
        memory = 0 if mode == "t2v" else recalled
        flops, operations = _flops(settings, memory, length, text=mode == "t2v")
        each, whole = flops.total / 1e15, operations / 1e15
        rows.append(
            (
                *(str(shot.index + 1), f"{shot.scene}.{shot.number}", mode, str(length - repeated)),
                *(str(memory), str(flops.tokens), f"{each:.3g}", f"{whole:.3g}"),
            )
        )
        total, frames = total + whole, frames + length - repeated
        disk += estimated_bytes(length, video.height, video.width)
        most_memory, longest = max(most_memory, memory), max(longest, length)
    text_to_video = uses_text_to_video(story, settings)
    lines = [
        f"{story.title}: {len(story.shots)} shots in {len(story.scenes)} scenes, {video.width}x{video.height}, "
        f"{frames} frames at {video.fps} fps: {frames / video.fps:.1f} s of film",
        "",
        format_table(rows),
        "",
        f"in all   {total:.3g} PFLOP in the denoiser, {passes} forwards a shot ({settings.sampler.steps} steps)",
        *_runtime(settings, memory=most_memory, frames=longest),
        f"disk     at most {disk / 1e6:.0f} MB in {folder}{_state(folder)}",
        *_weights(settings, text_to_video=text_to_video),
        *_first_shot(settings, text_to_video=text_to_video),
        *(f"text     {remark}" for remark in remarks_on([story], settings.model, settings.sampler)),
        *(
            f"picture  {remark}"
            for remark in reference_remarks(story, video.height, video.width, settings.memory.reference_fit)
        ),
    ]
    return "\n".join(lines)


def _most_recalled(story: Story, recall: RecallPolicy, per_shot: int) -> Iterator[int]:
    """How many keyframes ``recall`` gives each shot if every shot before it left ``per_shot``."""

    def stand_in(id: str, character: str | None = None) -> Keyframe:
        image, embedding = np.zeros((1, 1, 3), np.uint8), np.ones(1, np.float32)
        return Keyframe(id=id, image=image, embedding=embedding, character=character)

    bank = [
        stand_in(f"ref_{number}_{k}", character.name)
        for number, character in enumerate(story.characters)
        for k in range(len(character.references))
    ]
    for shot in story.shots:
        bank += [stand_in(f"s{shot.index}_ref{k}") for k in range(len(shot.references))]
        yield len(recall.recall(bank, shot))
        bank += [stand_in(f"s{shot.index}_{k}") for k in range(per_shot)]


def _flops(settings: GenerateSettings, memory: int, frames: int, *, text: bool) -> tuple[ForwardFlops, int]:
    """Operations of one forward, and of all forwards of the shot."""
    model, sampler = settings.model, settings.sampler
    passes = sampler.steps * (2 if sampler.guidance > 1 else 1)
    size: dict[str, int] = {
        "height": model.spec.latent_size(model.video.height, model.video.width)[0],
        "width": model.spec.latent_size(model.video.height, model.video.width)[1],
        "text_tokens": model.network.text_tokens,
    }
    transformer, slots = model.network.transformer, model.spec.latent_frames(frames)
    channels = (model.text_spec if text else model.spec).in_channels
    alone = forward_flops(transformer, slots=slots, in_channels=channels, **size).total
    seeing = passes if sampler.negative_sees_memory or not memory else sampler.steps
    hidden = (passes - seeing) * alone
    if model.memory_attention == "cached" and memory:
        flops = cached_flops(transformer, memory_frames=memory, slots=slots, **size)
        if settings.runtime.memory_cache == "recompute":
            return flops.whole, passes * flops.whole.total
        return flops.read, seeing * flops.read.total + 2 * flops.prefill.total + hidden
    each = forward_flops(transformer, slots=memory + slots, in_channels=channels, **size)
    return each, seeing * each.total + hidden


def _memory_cache(model: ModelSettings, runtime: RuntimeSettings, memory: int) -> list[str]:
    """What cached memory keeps between steps, and where."""
    size = memory_cache_bytes(model, memory)
    if not size:
        return []
    where = {"device": "kept on the device", "cpu": "kept in main memory", "recompute": "computed again in every step"}
    return [
        f"cached   keys and values of {memory} memory frames, {_gb(size)} an expert, are "
        f"{where[runtime.memory_cache]} (runtime.memory_cache={runtime.memory_cache})"
    ]


def _runtime(settings: GenerateSettings, *, memory: int, frames: int) -> list[str]:
    """Where and how the networks run, and the memory that their stages take at the most demanding shot."""
    model, sampler, asked = settings.model, settings.sampler, settings.runtime
    device, here = planned_device(asked)
    check_precision(model, asked, device, here=here)
    layout = find_layout(asked, Launch.of(asked), model=model, sampler=sampler)
    scorers = scorer_bytes(settings.scorer.clip, settings.scorer.quality)
    machine = this_machine(device) if here else Machine(name=str(device), memory=None, host=None, here=False)
    choice = choose_runtime(model, asked, sampler=sampler, scorers=scorers, layout=layout, machine=machine)
    runtime = choice.runtime
    estimate = estimate_memory(
        model,
        runtime,
        sampler=sampler,
        memory_frames=memory,
        frames=frames,
        scorers=scorers,
        layout=layout,
    )
    stages = [
        f"{stage.name} {_gb(stage.total)} ({_gb(stage.weights)} weights)" for stage in estimate.stages if stage.total
    ]
    lines = [
        f"runtime  {device}, offload {runtime.offload}, " + check_acceleration(model, sampler, runtime, here=here),
        f"memory   {_gb(estimate.peak.total)} on the device at the peak, at {memory} memory frames, by calculation: "
        + ", ".join(stages),
        f"         {_gb(estimate.host)} of main memory",
        *_memory_cache(model, runtime, memory),
    ]
    if choice.reason:
        lines.append(f"machine  {'' if choice.fits else 'TOO SMALL: '}{choice.reason}")
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def _state(folder: Path) -> str:
    if not Film.exists(folder):
        return ""
    return f", which holds {len(Film.open(folder).shots)} finished shots"


def _weights(settings: GenerateSettings, *, text_to_video: bool) -> list[str]:
    found = inspect_weights(
        settings.model, text_to_video=text_to_video, continuity=settings.continuity, sampler=settings.sampler
    )
    lines = []
    if settings.model.weights is None:
        lines.append(f"weights  random, from seed {settings.model.seed}: the film will be noise")
    lines += [f"weights  {source}" for source in found]
    scorers = (settings.scorer.clip, settings.scorer.quality)
    return lines + [f"scorer   {_whereabouts(weights)}" for scorer in scorers for weights in scorer_weights(scorer)]


def _whereabouts(weights: Weights) -> str:
    try:
        return f"{weights.name}: {locate(weights)}"
    except MissingWeights as error:
        return f"MISSING {error}"


def _first_shot(settings: GenerateSettings, *, text_to_video: bool) -> list[str]:
    """What a first shot by text-to-video costs, where it needs weights of its own."""
    weights = settings.model.text_to_video
    if not text_to_video or not settings.model.has_text_to_video or weights is None:
        return []
    size = f"{weights.size_gb:g} GB of " if weights.size_gb else ""
    return [
        f"first    first_shot=m2v needs no {weights.name}: {size}weights less to download and to read. The first shot "
        "is then made by the networks with memory, from its text and the story's reference pictures; without pictures "
        "from its text alone, for which they were not trained."
    ]
