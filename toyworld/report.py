"""What the toy models reach on held-out stories, by the ordinary door: figures for the stage `report`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from PIL import Image

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer
from storymem.wan.lora import load_memory_lora
from storymem.wan.lora_files import LoraFile
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from toyworld.attributes import FRAMES, HEIGHT, LOOKS, UNKNOWN, WIDTH, Look, Seen
from toyworld.contrast import THRESHOLD, auroc, clip_top1, place_and_time_top1, quality_frames
from toyworld.damage import DAMAGES, damage
from toyworld.reader import read_attributes
from toyworld.shot_reader import read_shot
from toyworld.text import TEXT_TOKENS
from toyworld.vae import psnr_of
from toyworld.world import HELD_OUT, ToyShot, ToyStory, story

PLACE_PARTS = ("place", "time", "framing", "landmark", "side", "flag")
LOOK_PARTS = ("shape", "colour", "hat", "eyes")
STEPS = 20
GUIDANCE, NEGATIVE_SEES_MEMORY = 2.5, False  # as sampler=toy guides
MEMORY = 6  # frames; what the adapter was trained with
FILTER = 3.0  # the threshold of scorer/quality=toy


def held_out_shots(count: int, *, looks: bool = False) -> list[ToyShot]:
    """One shot of each of `count` held-out stories."""
    return [story(HELD_OUT + i, looks=looks).shots[i % 8] for i in range(count)]


def agreement(truth: Seen, read: Seen) -> list[tuple[str, bool]]:
    """For every part that can be seen, its name and whether it was read right ("unknown" is not)."""
    pairs = [(part, getattr(truth, part), getattr(read, part)) for part in PLACE_PARTS]
    lost = Look(shape=UNKNOWN, colour=UNKNOWN, hat=UNKNOWN, eyes=UNKNOWN)
    looks = read.looks if len(read.looks) == len(truth.looks) else (lost,) * len(truth.looks)
    for true_look, look in zip(truth.looks, looks, strict=True):
        pairs += [(part, getattr(true_look, part), getattr(look, part)) for part in LOOK_PARTS]
    return [(part, true == value) for part, true, value in pairs if true != UNKNOWN]


def shares(answers: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The share of right answers of each part."""
    answers = list(answers)
    names = dict.fromkeys(name for name, _ in answers)
    return {name: float(np.mean([right for part, right in answers if part == name])) for name in names}


def measure_vae(vae: AutoencoderKLWan, count: int) -> dict[str, Any]:
    """PSNR of whole shots, and attributes read from one decoded frame of each."""
    shots = held_out_shots(count)
    psnr, decoded = psnr_of(vae, shots)
    rng = np.random.default_rng(0)
    answers: list[tuple[str, bool]] = []
    for shot, frames in zip(shots, decoded, strict=True):
        at = int(rng.integers(FRAMES))
        answers += agreement(shot.seen(at), read_attributes(frames[at]))
    right = float(np.mean([right for _, right in answers]))
    return {"shots": count, "psnr_db": psnr, "attributes_right": right, "by_part": shares(answers)}


def generate(
    pipe: WanMemoryToVideoPipeline,
    prompt: str,
    seed: int,
    *,
    steps: int,
    guidance: float = GUIDANCE,
    first: npt.NDArray[np.uint8] | None = None,
    memory: Sequence[Image.Image] | None = None,
    negative_sees_memory: bool = NEGATIVE_SEES_MEMORY,
) -> npt.NDArray[np.uint8]:
    """A shot, uint8 [17, 64, 96, 3], from text and perhaps a first frame and memory."""
    result = pipe(
        prompt,
        negative_prompt="",
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=TEXT_TOKENS,
        first_frame=None if first is None else Image.fromarray(first),
        memory=memory,
        negative_sees_memory=negative_sees_memory or not memory,
    )
    assert isinstance(result, WanPipelineOutput)
    made = result.frames[0]
    return (made * 255).round().astype(np.uint8)


def measure_text_following(
    pipe: WanMemoryToVideoPipeline, count: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """Attributes read from shots generated from text with looks."""
    answers: list[tuple[str, bool]] = []
    for i, shot in enumerate(held_out_shots(count, looks=True)):
        read = read_shot(generate(pipe, shot.prompt, i, steps=steps, guidance=guidance))
        answers += agreement(shot.seen(FRAMES // 2), read.seen)
        answers.append(("action", read.action == shot.action))
    by_part = shares(answers)
    asked = ("place", "time", "framing", "action")
    return {
        "shots": count,
        "steps": steps,
        "guidance": guidance,
        "place_time_framing_action": float(np.mean([by_part[part] for part in asked])),
        "looks": float(np.mean([by_part[part] for part in LOOK_PARTS])),
        "by_part": by_part,
    }


def measure_joints(
    pipe: WanMemoryToVideoPipeline, count: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """Pixel steps across the joint of a shot with a first frame, relative to the steps inside the shot."""
    ratios = []
    for i, shot in enumerate(held_out_shots(count)):
        made = generate(pipe, shot.prompt, i, steps=steps, guidance=guidance, first=shot.frames[0]).astype(np.float64)
        inside = np.abs(np.diff(made[1:], axis=0)).mean()
        across = np.abs(made[1] - shot.frames[0]).mean()
        ratios.append(across / max(inside, 1e-6))
    return {"shots": count, "joint_over_inside_median": float(np.median(ratios)), "mean": float(np.mean(ratios))}


def remembered(told: ToyStory, index: int) -> list[Image.Image]:
    """The middle frames of the shots before `index` that do not just go on from another: a memory as drawn."""
    return [Image.fromarray(shot.frames[FRAMES // 2]) for shot in told.shots[:index] if shot.cut][:MEMORY]


def measure_memory(
    pipe: WanMemoryToVideoPipeline, count: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> dict[str, Any]:
    """How much of a character's look, which no prompt says, a shot takes from frames of shots before.

    One shot of each of `count` held-out stories with one character, from drawn memory, the same with guidance as
    published (both passes see the memory), and the same without memory, all from the same noise; beside them the chance
    that two looks drawn at random agree.
    """
    answers: dict[str, list[tuple[str, bool]]] = {"with_memory": [], "published_guidance": [], "without": []}
    alone = (told for told in map(story, itertools.count(HELD_OUT)) if len(told.cast) == 1)
    for seed, told in enumerate(itertools.islice(alone, count)):
        index = max(i for i, shot in enumerate(told.shots) if shot.cut)
        shot = told.shots[index]
        for name, given in answers.items():
            memory = None if name == "without" else remembered(told, index)
            both = name != "with_memory"
            made = generate(
                pipe, shot.prompt, seed, steps=steps, guidance=guidance, memory=memory, negative_sees_memory=both
            )
            pairs = agreement(shot.seen(FRAMES // 2), read_shot(made).seen)
            given += [(part, right) for part, right in pairs if part in LOOK_PARTS]
    shares_of = {name: shares(given) for name, given in answers.items()}
    means = {name: float(np.mean(list(parts.values()))) for name, parts in shares_of.items()}
    return {
        "stories": count,
        "steps": steps,
        "guidance": guidance,
        **means,
        "chance": chance_of_look(),
        "by_part": shares_of,
    }


def chance_of_look() -> float:
    """The mean share of parts in which two looks drawn at random agree."""
    return float(np.mean([1 / len({getattr(look, part) for look in LOOKS}) for part in LOOK_PARTS]))


def measure_scorers(weights: Path, count: int) -> dict[str, Any]:
    """CLIP's and ViCLIP's retrieval among held-out sentences; the quality head's AUROC."""
    quality = AestheticScorer.from_folder(weights / "clip", threshold=THRESHOLD)
    pictures, clean = quality_frames(count, HELD_OUT)
    return {
        "clip_place_and_time_top1": place_and_time_top1(ClipScorer.from_folder(weights / "clip"), count),
        "viclip_place_time_action_top1": clip_top1(ViclipScorer.from_folder(weights / "viclip"), count),
        "quality_auroc": auroc(quality.score(pictures), clean),
    }


def measure_filter(pipe: WanMemoryToVideoPipeline, weights: Path, count: int, steps: int = STEPS) -> dict[str, Any]:
    """What the quality filter of films keeps of frames that the model makes, and refuses of damaged copies of them."""
    quality = AestheticScorer.from_folder(weights / "clip", threshold=FILTER)
    rng = np.random.default_rng(0)
    made: list[npt.NDArray[np.uint8]] = []
    for seed, told in enumerate(story(HELD_OUT + i) for i in range(count)):
        index = max(i for i, shot in enumerate(told.shots) if shot.cut)
        shot = generate(pipe, told.shots[index].prompt, seed, steps=steps, memory=remembered(told, index))
        made += list(shot[[3, FRAMES // 2, 13]])
    damaged = {kind: np.stack([damage(rng, frame, kind) for frame in made]) for kind in DAMAGES}

    def kept(frames: npt.NDArray[np.uint8]) -> float:
        return float((quality.score(as_images(frames)) >= quality.threshold).float().mean())

    refused = {kind: 1 - kept(frames) for kind, frames in damaged.items()}
    return {
        "frames": len(made),
        "threshold": FILTER,
        "kept": kept(np.stack(made)),
        "refused_of_damaged": float(np.mean(list(refused.values()))),
        "by_damage": refused,
    }


def memory_mode(adapter: Path) -> str:
    """What an adapter was trained for: joint or cached."""
    info = LoraFile(adapter / "low_noise.safetensors").info
    assert info is not None, "the recipe ships adapters in our own layout"
    return info.memory_attention


def measure(
    weights: Path,
    *,
    adapter: Path | None = None,
    count: int = 200,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    parts: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of the models in a folder, or those of some parts: "vae", "text", "scorers", "joints" and so on.

    The base is measured without the memory adapter, joints, memory and filter with it: ``adapter``, or else the
    folder's own.
    """
    if adapter is not None and not adapter.is_dir():
        raise FileNotFoundError(f"adapter {adapter}: there is no such folder; give the one that train.py wrote")
    adapter = adapter or weights / "adapter"
    pipe = WanMemoryToVideoPipeline.from_pretrained(
        weights, torch_dtype=torch.float32, memory_attention=memory_mode(adapter) if adapter.is_dir() else "joint"
    )
    pipe.set_progress_bar_config(disable=True)

    def remembering() -> WanMemoryToVideoPipeline:
        if adapter.is_dir() and not hasattr(pipe.transformer, "peft_config"):
            load_memory_lora(pipe, adapter)
        return pipe

    tasks = {
        "vae": lambda: measure_vae(pipe.vae, count),
        "text": lambda: measure_text_following(pipe, count, steps, guidance),
        "scorers": lambda: measure_scorers(weights, count),
        "joints": lambda: measure_joints(remembering(), max(2, count // 4), steps, guidance),
        "memory": lambda: measure_memory(remembering(), max(2, count // 4), steps, guidance),
        "filter": lambda: measure_filter(remembering(), weights, max(2, count // 4), steps),
    }
    return {name: task() for name, task in tasks.items() if not parts or name in parts}
