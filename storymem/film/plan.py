"""The plan of a film (``dry_run=true``): shots, operations, VRAM, disk and weights, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storymem.film.folder import Film
from storymem.film.resume import jobs_of, story_changes, story_record
from storymem.film.settings import (
    GIVEN_FRAMES,
    GenerateSettings,
    build_policy,
    estimated_bytes,
    mode_of,
    parse_aspect,
    uses_text_to_video,
    work_of,
)
from storymem.film.tables import counted, format_table
from storymem.memory import RecallPolicy, SelectionPolicy
from storymem.scorers import scorer_bytes, scorer_weights
from storymem.story import Story
from storymem.story.notes import notes_on
from storymem.wan.estimate import Flops, estimate_shot, forward_flops, memory_cache_bytes
from storymem.wan.placement import Machine, choose_runtime, this_machine
from storymem.wan.processes import Launch, find_grid
from storymem.wan.runtime import check_machine, planned_device
from storymem.wan.segments import memory_cached, memory_joint
from storymem.wan.sources import inspect_weights
from storymem.weights import MissingWeights, locate, size_text

# PFLOP of a shot of a 14B expert at 480p, 81 frames, 40 steps with guidance and no memory: 80 forwards of 1.68.
_SHOT = 80 * 1.68
_H100, _RTX_4090D = 327.8, 40 * 30.5  # seconds of such a shot
#: Card -> seconds of such a shot, and the source. The H200 is measured (benchmarks/results/h200.md). Published are:
#: Wan2.2's table of efficiency (H100: 327.8 s at 480p, 1,055.9 s at 720p; A100: 2,735.7 s at 720p, as quoted in its
#: issue 284), and LightX2V's benchmarks of Wan2.1-I2V-14B, which has the same operations a step (diffusers on an
#: RTX 4090D: 30.5 s a step). Dense bfloat16 TFLOP/s: RTX 4090D 147, RTX 4090 165, RTX 3090 71.
_CARDS = {
    "H100 80 GB": (_H100, "published: 327.8 s a shot, Wan2.2's code"),
    "H200 141 GB": (80 * 3.49, "measured: 3.49 s a forward without memory, not compiled"),
    "A100 80 GB": (_H100 * 2735.7 / 1055.9, "derived: 2.6 times the H100's, as published at 720p"),
    "RTX 4090 24 GB": (_RTX_4090D * 147 / 165, "derived: RTX 4090D with diffusers, 30.5 s a step; by TFLOP/s"),
    "RTX 3090 24 GB": (_RTX_4090D * 147 / 71, "derived: RTX 4090D with diffusers, 30.5 s a step; by TFLOP/s"),
}
_WHERE = {"device": "on the device", "cpu": "in RAM", "recompute": "not stored: recomputed in every step"}


def make_plan(story: Story, settings: GenerateSettings, folder: Path) -> tuple[str, list[str]]:
    """The plan of a film as text, and what would keep the film from being made here: weights, memory.

    Memory is the most that a shot can recall, if every earlier shot adds as many keyframes as its selector allows.
    Tokens and operations are those of one forward of an expert.
    """
    selector: SelectionPolicy = build_policy(settings.memory.selector, "memory.selector", ("max_keyframes", "select"))
    recall: RecallPolicy = build_policy(settings.memory.recall, "memory.recall", ("capacity", "recall"))
    video, sampler, passes = settings.model.video, settings.sampler, _passes(settings)
    rows = [("shot", "scene", "mode", "frames", "memory", "tokens", "PFLOP per forward", "PFLOP")]
    total, frames, disk, most_memory, longest = 0.0, 0, 0, 0, 0
    for shot, recalled in zip(story.shots, _most_recalled(story, recall, selector.max_keyframes), strict=True):
        mode = mode_of(shot, story, continuity=settings.continuity, first_shot=settings.first_shot)
        length, new = shot.frames or video.frames, (shot.frames or video.frames) - GIVEN_FRAMES[mode]
        memory = 0 if mode == "t2v" else recalled
        flops, operations = _flops(settings, memory, length, text=mode == "t2v")
        numbers = (str(new), str(memory), str(flops.tokens), _pflop(flops.total), _pflop(operations))
        rows.append((str(shot.index + 1), f"{shot.scene}.{shot.number}", mode, *numbers))
        total, frames = total + operations, frames + new
        disk += estimated_bytes(length, video.height, video.width)
        most_memory, longest = max(most_memory, memory), max(longest, length)
    text_to_video = uses_text_to_video(story, settings)
    runtime, lacking = _runtime(settings, memory=most_memory, frames=longest)
    weights, unfit = _weights(settings, text_to_video=text_to_video)
    counts = {"shot": len(story.shots), "scene": len(story.scenes)}
    shots, scenes = (counted(count, name) for name, count in counts.items())
    lines = [
        f"{story.title}: {shots} in {scenes}, {video.width}x{video.height}, "
        f"{frames} frames at {video.fps} fps: {frames / video.fps:.1f} s of film",
        "",
        format_table(rows),
        "",
        *_size(settings),
        f"total    {_pflop(total)} PFLOP in the denoiser, {passes} forwards a shot ({sampler.steps} steps)",
        *_time(total / 1e15),
        *runtime,
        f"disk     at most {max(1, round(disk / 1e6))} MB in {folder}",
        *_existing(story, settings, folder),
        *weights,
        *_first_shot(settings, text_to_video=text_to_video),
        *(f"note     {note}" for note in notes_on([story], settings.model, sampler, settings.memory.reference_fit)),
    ]
    return "\n".join(lines), lacking + unfit


def _existing(story: Story, settings: GenerateSettings, folder: Path) -> Iterator[str]:
    """What the folder's film has of the story, and which shots this run generates."""
    if not Film.exists(folder):
        return
    film = Film.open(folder)
    film.use_story(story_record(story))
    jobs = [] if settings.take is not None else jobs_of(film, work_of(settings, len(story.shots)))
    making = ", ".join(f"{job.index + 1}{f' ({job.takes} takes)' if job.takes > 1 else ''}" for job in jobs)
    what = "shot" if len(jobs) == 1 else "shots"
    yield f"film     holds {counted(len(film.takes), 'take')}; to make: {f'{what} {making}' if jobs else 'nothing'}"
    yield from (f"film     {line}" for line in story_changes(film))
    if lost := film.lost():
        yield f"film     {lost}"


def _size(settings: GenerateSettings) -> Iterator[str]:
    """How near the size is to the aspect asked for."""
    if settings.aspect is not None:
        video, multiple = settings.model.video, settings.model.spec.multiple
        error = video.width / video.height / parse_aspect(settings.aspect) - 1
        share = round(100 * abs(error))
        near = f"{share} % {'wider' if error > 0 else 'narrower'}" if share else "exactly"
        yield f"size     {video.width}x{video.height} for aspect={settings.aspect}, {near}, in multiples of {multiple}"


def _time(pflop: float) -> Iterator[str]:
    """A line for each card; none for models so small that loading takes longer than work."""
    for card, (seconds_of_shot, source) in _CARDS.items() if pflop >= 10 else ():
        seconds = pflop / _SHOT * seconds_of_shot
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
        yield f"time     {time} on {card} ({source})"


def _passes(settings: GenerateSettings) -> int:
    return settings.sampler.steps * (2 if settings.sampler.guidance > 1 else 1)


def _most_recalled(story: Story, recall: RecallPolicy, per_shot: int) -> Iterator[int]:
    """How many keyframes each shot is given at most if every shot before it adds ``per_shot``."""
    keyframes = len(story.references)
    for shot in story.shots:
        keyframes += len(shot.references)
        yield min(recall.capacity, keyframes)
        keyframes += per_shot


def _flops(settings: GenerateSettings, memory: int, frames: int, *, text: bool) -> tuple[Flops, int]:
    """Operations of one forward, and of all forwards of the shot."""
    model, sampler, slots = settings.model, settings.sampler, settings.model.spec.latent_frames(frames)
    height, width = model.spec.latent_size(model.video.height, model.video.width)
    build = memory_cached if model.memory_attention == "cached" else memory_joint
    cached = frozenset() if settings.runtime.memory_cache == "recompute" else build(memory, slots).constant

    def forward(memory: int, cached: frozenset[str] = frozenset(), only: frozenset[str] = frozenset()) -> Flops:
        layout = build(memory, slots)
        return forward_flops(
            (model.text_model if text else model).transformer,
            layout.only(only) if only else layout,
            height=height,
            width=width,
            text_tokens=model.network.text_tokens,
            cached=cached,
        )

    each = forward(memory, cached)
    seeing = _passes(settings) if sampler.negative_sees_memory or not memory else sampler.steps
    once = len(model.spec.experts) * forward(memory, only=cached).total if cached else 0
    return each, seeing * each.total + (_passes(settings) - seeing) * forward(0).total + once


def _runtime(settings: GenerateSettings, *, memory: int, frames: int) -> tuple[list[str], list[str]]:
    """Where and how the networks run, what their stages need at the most demanding shot, and what is lacking."""
    model, sampler, asked = settings.model, settings.sampler, settings.runtime
    device, here = planned_device(asked)
    grid = find_grid(asked, Launch.of(asked), model=model, sampler=sampler)
    scorers = scorer_bytes(settings.scorer.clip, settings.scorer.quality)
    machine = this_machine(device) if here else Machine(name=str(device), vram=None, ram=None, here=False)
    choice = choose_runtime(model, asked, sampler=sampler, scorers=scorers, grid=grid, machine=machine)
    runtime = choice.runtime
    estimate = estimate_shot(
        model, runtime, sampler=sampler, grid=grid, memory_frames=memory, frames=frames, scorers=scorers
    )
    stages = ", ".join(
        f"{stage.name} {_gb(stage.total)} ({_gb(stage.weights)} weights)" for stage in estimate.stages if stage.total
    )
    shared = here and machine.vram is None
    vram, ram = f"VRAM     {_gb(estimate.peak.total)}", f"RAM      {_gb(estimate.shared_ram)} with idle scorers,"
    lines = [
        f"runtime  {device}, offload {runtime.offload}, {check_machine(model, runtime, here=here)}",
        f"{ram if shared else vram} at the peak, calculated for {memory} memory frames: {stages}",
        *([] if shared else [f"RAM      {_gb(estimate.ram)}"]),
    ]
    if size := memory_cache_bytes(model, memory):
        lines.append(
            f"cached   keys and values of {memory} memory frames, {_gb(size)} an expert, "
            f"{_WHERE[runtime.memory_cache]} (runtime.memory_cache={runtime.memory_cache})"
        )
    if choice.reason:
        lines.append(f"machine  {'' if choice.fits else 'TOO SMALL: '}{choice.reason}")
    return lines, [] if choice.fits or asked.offload != "auto" else [choice.reason]


def _pflop(operations: float) -> str:
    pflop = operations / 1e15
    return f"{pflop:,.0f}" if pflop >= 100 else f"{pflop:.3g}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def _weights(settings: GenerateSettings, *, text_to_video: bool) -> tuple[list[str], list[str]]:
    """All weights with their paths, and those that are missing or do not fit."""
    found = inspect_weights(
        settings.model, text_to_video=text_to_video, continuity=settings.continuity, sampler=settings.sampler
    )
    lines, problems = [], [source.problem for source in found if source.problem]
    if settings.model.weights is None:
        lines.append(f"weights  random, from seed {settings.model.seed}: the film will be noise")
    lines += [f"weights  {source}" for source in found]
    missing = [source.weights for source in found if source.path is None]
    for scorer in (settings.scorer.clip, settings.scorer.quality):
        for weights in scorer_weights(scorer):
            try:
                lines.append(f"scorer   {weights.name}: {locate(weights)}")
            except MissingWeights as error:
                lines.append(f"scorer   MISSING {error}")
                problems.append(str(error))
                missing.append(weights)
    sizes = [f"{size_text(weights.size_gb)} {weights.name}" for weights in missing]
    if missing:
        total = size_text(sum(weights.size_gb for weights in missing))
        lines.append(f"fetch    {total} in all: {', '.join(sizes)}")
    return lines, problems


def _first_shot(settings: GenerateSettings, *, text_to_video: bool) -> list[str]:
    """What a first shot by text-to-video costs, where it needs weights of its own."""
    weights = settings.model.text_to_video
    if not text_to_video or not settings.model.has_text_to_video or weights is None:
        return []
    size = f"{weights.size_gb:g} GB of " if weights.size_gb else ""
    return [
        f"first    first_shot=m2v needs no {weights.name}: {size}weights less to download and to read. The first shot "
        "is then generated by the memory-to-video networks, from its text and the story's reference images; without "
        "images from its text alone, for which they were not trained."
    ]
