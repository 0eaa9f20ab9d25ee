"""What a film will take, before anything is loaded: shots, memory, tokens, arithmetic, disk, weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storymem.film import Film, estimated_bytes
from storymem.memory import Keyframe, RecallPolicy
from storymem.modes import GIVEN_FRAMES, mode_of
from storymem.progress import format_table
from storymem.settings import GenerateSettings, uses_text_to_video
from storymem.story import Shot, Story
from storymem.wan.conditioning import latent_frames
from storymem.wan.flops import ForwardFlops, forward_flops
from storymem.wan.runtime import check_runtime
from storymem.wan.sources import required_weights
from storymem.weights import MissingWeights, locate

if TYPE_CHECKING:
    from storymem.memory import SelectionPolicy


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
    total, frames, disk = 0.0, 0, 0
    for shot in story.shots:
        mode = mode_of(shot, story, continuity=settings.continuity, first_shot=settings.first_shot)
        length, repeated = shot.frames or video.frames, GIVEN_FRAMES[mode]
        memory = 0 if mode == "t2v" else _most_recalled(story, shot, recall, selector.max_keyframes)
        flops = _flops(settings, memory, length, text=mode == "t2v")
        each, whole = flops.total / 1e15, flops.total * passes / 1e15
        rows.append(
            (
                *(str(shot.index + 1), f"{shot.scene}.{shot.number}", mode, str(length - repeated)),
                *(str(memory), str(flops.tokens), f"{each:.3g}", f"{whole:.3g}"),
            )
        )
        total, frames = total + whole, frames + length - repeated
        disk += estimated_bytes(length, video.height, video.width)
    lines = [
        f"{story.title}: {len(story.shots)} shots in {len(story.scenes)} scenes, {video.width}x{video.height}, "
        f"{frames} frames at {video.fps} fps: {frames / video.fps:.1f} s of film",
        "",
        format_table(rows),
        "",
        f"in all   {total:.3g} PFLOP in the denoiser, {passes} forwards a shot ({settings.sampler.steps} steps)",
        f"runtime  {check_runtime(settings.runtime)}, offload {settings.runtime.offload}",
        f"disk     at most {disk / 1e6:.0f} MB in {folder}{_state(folder)}",
        *_weights(settings, text_to_video=uses_text_to_video(story, settings)),
    ]
    return "\n".join(lines)


def _most_recalled(story: Story, shot: Shot, recall: RecallPolicy, per_shot: int) -> int:
    """How many keyframes ``recall`` gives ``shot`` if every shot before it left ``per_shot``."""

    def stand_in(id: str, character: str | None = None) -> Keyframe:
        image, embedding = np.zeros((1, 1, 3), np.uint8), np.ones(1, np.float32)
        return Keyframe(id=id, image=image, embedding=embedding, character=character)

    bank = [
        stand_in(f"ref_{number}_{k}", character.name)
        for number, character in enumerate(story.characters)
        for k in range(len(character.references))
    ]
    for before in story.shots[: shot.index + 1]:
        bank += [stand_in(f"s{before.index}_ref{k}") for k in range(len(before.references))]
        if before.index < shot.index:
            bank += [stand_in(f"s{before.index}_{k}") for k in range(per_shot)]
    return len(recall.recall(bank, shot))


def _flops(settings: GenerateSettings, memory: int, frames: int, *, text: bool) -> ForwardFlops:
    video, network = settings.model.video, settings.model.network
    return forward_flops(
        network.transformer,
        slots=memory + latent_frames(frames),
        height=video.height // 8,
        width=video.width // 8,
        text_tokens=network.text_tokens,
        in_channels=16 if text and settings.model.has_text_to_video else 36,
    )


def _state(folder: Path) -> str:
    if not Film.exists(folder):
        return ""
    return f", which holds {len(Film.open(folder).shots)} finished shots"


def _weights(settings: GenerateSettings, *, text_to_video: bool) -> list[str]:
    wanted = required_weights(settings.model, text_to_video=text_to_video, continuity=settings.continuity)
    if not wanted:
        return [f"weights  random, from seed {settings.model.seed}: the film will be noise"]
    lines = []
    for weights in wanted:
        try:
            lines.append(f"weights  {weights.name}: {locate(weights)}")
        except MissingWeights as error:
            lines.append(f"weights  MISSING {error}")
    return lines
