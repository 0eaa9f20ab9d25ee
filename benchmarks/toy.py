"""What the embedded models reach on held-out stories of the drawn world.

    python -m benchmarks.toy [--count 200] [--parts vae text scorers joints memory filter]

Prints the figures beside their targets, with 95 % bootstrap intervals over stories, and writes them to
benchmarks/results/toy.json with versions and date. With 200 stories it takes about an hour; a run of some parts
replaces only those in the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from PIL import Image

from storymem.evaluation.statistics import StatisticsSettings, bootstrap_interval
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import as_images
from storymem.scorers.viclip import ViclipScorer
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from toyworld import WEIGHTS
from toyworld.attributes import FRAMES, HEIGHT, LOOK_PARTS, PLACE_PARTS, UNKNOWN, WIDTH, Look, Seen
from toyworld.base import recalled
from toyworld.consistency import CHANCE
from toyworld.contrast import THRESHOLD, auroc, quality_frames, top1
from toyworld.damage import DAMAGES, damage
from toyworld.reader import read_attributes, read_shot
from toyworld.text import TEXT_TOKENS
from toyworld.vae import decoded
from toyworld.world import HELD_OUT, ToyShot, ToyStory, story

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

STEPS = 15  # as sampler=toy
GUIDANCE, NEGATIVE_SEES_MEMORY = 2.5, False  # as sampler=toy guides
FILTER = 3.0  # the threshold of scorer/quality=toy

PARTS = ("vae", "text", "scorers", "joints", "memory", "filter")

Answers = list[tuple[str, bool]]

interval = partial(bootstrap_interval, settings=StatisticsSettings())
"""95 % of the mean of one value per story."""


def held_out_shots(count: int, *, looks: bool = False) -> list[ToyShot]:
    """One shot of each of `count` held-out stories."""
    return [story(HELD_OUT + i, looks=looks).shots[i % 8] for i in range(count)]


def agreement(truth: Seen, read: Seen) -> Answers:
    """For every part that can be seen, its name and whether it was read right ("unknown" is not)."""
    pairs = [(part, getattr(truth, part), getattr(read, part)) for part in PLACE_PARTS]
    lost = Look(**dict.fromkeys(LOOK_PARTS, UNKNOWN))
    looks = read.looks if len(read.looks) == len(truth.looks) else (lost,) * len(truth.looks)
    for true_look, look in zip(truth.looks, looks, strict=True):
        pairs += [(part, getattr(true_look, part), getattr(look, part)) for part in LOOK_PARTS]
    return [(part, true == value) for part, true, value in pairs if true != UNKNOWN]


def shares(answers: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The share of right answers of each part."""
    by_part: dict[str, list[bool]] = {}
    for name, right in answers:
        by_part.setdefault(name, []).append(right)
    return {name: float(np.mean(right)) for name, right in by_part.items()}


def mean_of(answers: Answers, parts: Sequence[str]) -> float:
    """The mean of the shares of some parts."""
    found = shares(answers)
    return float(np.mean([found[part] for part in parts if part in found]))


class Report:
    """The figures of the models in a folder.

    Args:
        weights: the folder.
        adapter: of the memory, for joints, memory and filter; None: that in the folder.
        count: held-out stories; joints and filter take a quarter.
        steps: of the sampler.
        guidance: of shots made from text and memory.

    Raises:
        FileNotFoundError: if there is no such adapter.
    """

    def __init__(
        self,
        weights: Path,
        *,
        adapter: Path | None = None,
        count: int = 200,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> None:
        self.adapter = adapter or weights / "adapter"
        if not self.adapter.is_dir():
            raise FileNotFoundError(f"{self.adapter} is no folder: give the one that storymem train wrote")
        self.weights, self.count, self.few = weights, count, max(2, count // 4)
        self.steps, self.guidance = steps, guidance
        self.pipe = WanMemoryToVideoPipeline.from_pretrained(weights, dtype=torch.float32, memory_attention="cached")
        self.pipe.set_progress_bar_config(disable=True)

    def measure(self, part: str) -> dict[str, Any]:
        """The figures of a part: one of `PARTS`. Only vae and text are measured without the adapter."""
        if part not in ("vae", "text") and not hasattr(self.pipe.transformer, "peft_config"):
            load_memory_lora(self.pipe, self.adapter)
        figures: dict[str, Any] = getattr(self, part)()
        return figures

    def generate(
        self,
        prompt: str,
        seed: int,
        *,
        first: npt.NDArray[np.uint8] | None = None,
        memory: Sequence[Image.Image] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """A shot, uint8 [17, 64, 96, 3], from text and perhaps a first frame and memory."""
        result = self.pipe(
            prompt,
            negative_prompt="",
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=TEXT_TOKENS,
            first_frame=None if first is None else Image.fromarray(first),
            memory=memory,
            negative_sees_memory=NEGATIVE_SEES_MEMORY or not memory,
        )
        assert isinstance(result, WanPipelineOutput)
        return (result.frames[0] * 255).round().astype(np.uint8)

    def vae(self) -> dict[str, Any]:
        """PSNR of whole shots, and attributes read from one decoded frame of each."""
        rng, answers, psnr = np.random.default_rng(0), [], []
        for shot in held_out_shots(self.count):
            frames, value = decoded(self.pipe.vae, shot)
            at = int(rng.integers(FRAMES))
            answers.append(agreement(shot.seen(at), read_attributes(frames[at])))
            psnr.append(value)
        flat = [answer for each in answers for answer in each]
        return {
            "shots": self.count,
            "psnr_db": float(np.mean(psnr)),
            "attributes_right": float(np.mean([right for _, right in flat])),
            "interval": interval([float(np.mean([right for _, right in each])) for each in answers]),
            "by_part": shares(flat),
        }

    def text(self) -> dict[str, Any]:
        """Attributes read from shots made from prompts with looks, without memory."""
        answers = []
        for i, shot in enumerate(held_out_shots(self.count, looks=True)):
            read = read_shot(self.generate(shot.prompt, i))
            answers.append([*agreement(shot.seen(FRAMES // 2), read.seen), ("action", read.action == shot.action)])
        flat = [answer for each in answers for answer in each]
        asked = ("place", "time", "framing", "action")
        return {
            "shots": self.count,
            "place_time_framing_action": mean_of(flat, asked),
            "place_time_framing_action_interval": interval([mean_of(each, asked) for each in answers]),
            "looks": mean_of(flat, LOOK_PARTS),
            "looks_interval": interval([mean_of(each, LOOK_PARTS) for each in answers]),
            "by_part": shares(flat),
        }

    def joints(self) -> dict[str, Any]:
        """Pixel steps across the joint of a shot with a first frame, relative to the steps inside the shot."""
        ratios = []
        for i, shot in enumerate(s for s in held_out_shots(8 * self.few) if not s.cut):
            made = self.generate(shot.prompt, i, first=shot.frames[0]).astype(np.float64)
            inside = np.abs(np.diff(made[1:], axis=0)).mean()
            ratios.append(float(np.abs(made[1] - shot.frames[0]).mean() / max(inside, 0.5)))
            if len(ratios) == self.few:
                break
        return {"shots": len(ratios), "joint_over_inside_median": float(np.median(ratios))}

    def memory(self) -> dict[str, Any]:
        """How much of a character's look, which is not in the prompt, a shot takes from drawn earlier frames.

        The last cut of stories with one character: with memory and without, from the same noise; the same of stories
        with two or three, where the shoes that go with a name identify each; beside them the chance that two looks
        drawn at random agree.
        """
        figures: dict[str, Any] = {"stories": self.count, "chance": chance_of_look()}
        groups = {"with_memory": (1,), "without": (1,), "several_characters": (2, 3)}
        for name, casts in groups.items():
            source = (s for s in map(story, itertools.count(HELD_OUT)) if len(s.cast) in casts)
            answers = [self._recall(one, seed, name) for seed, one in enumerate(itertools.islice(source, self.count))]
            flat = [answer for each in answers for answer in each]
            figures[name] = mean_of(flat, LOOK_PARTS)
            figures[f"{name}_interval"] = interval([float(np.mean([right for _, right in each])) for each in answers])
            figures[f"{name}_by_part"] = shares(flat)
        return figures

    def _recall(self, source: ToyStory, seed: int, how: str) -> Answers:
        index = max(i for i, shot in enumerate(source.shots) if shot.cut)
        shot, memory = source.shots[index], None if how == "without" else memory_of(source, index)
        made = self.generate(shot.prompt, seed, memory=memory)
        return [a for a in agreement(shot.seen(FRAMES // 2), read_shot(made).seen) if a[0] in LOOK_PARTS]

    def scorers(self) -> dict[str, Any]:
        """CLIP's and ViCLIP's retrieval among held-out sentences; the quality head's AUROC."""
        quality = AestheticScorer.from_folder(self.weights / "clip", threshold=THRESHOLD)
        images, clean = quality_frames(self.count, HELD_OUT)
        return {
            "clip_place_and_time_top1": top1(ClipScorer.from_folder(self.weights / "clip"), self.count),
            "viclip_place_time_action_top1": top1(ViclipScorer.from_folder(self.weights / "viclip"), self.count),
            "quality_auroc": auroc(quality.score(images), clean),
        }

    def filter(self) -> dict[str, Any]:
        """What the quality filter of films accepts of frames that the model makes, and of damaged copies of them."""
        quality = AestheticScorer.from_folder(self.weights / "clip", threshold=FILTER)
        rng = np.random.default_rng(0)
        made: list[npt.NDArray[np.uint8]] = []
        for seed, source in enumerate(story(HELD_OUT + i) for i in range(self.few)):
            index = max(i for i, shot in enumerate(source.shots) if shot.cut)
            made += list(self.generate(source.shots[index].prompt, seed, memory=memory_of(source, index))[[3, 8, 13]])

        def accepted(frames: Sequence[npt.NDArray[np.uint8]]) -> float:
            return float((quality.score(as_images(np.stack(frames))) >= quality.threshold).float().mean())

        refused = {kind: 1 - accepted([damage(rng, frame, kind) for frame in made]) for kind in DAMAGES}
        return {
            "frames": len(made),
            "threshold": FILTER,
            "kept": accepted(made),
            "refused_of_damaged": float(np.mean(list(refused.values()))),
            "by_damage": refused,
        }


def memory_of(source: ToyStory, index: int) -> list[Image.Image]:
    """The middle frames of the shots before `index` that a film recalls: a memory as drawn."""
    return [Image.fromarray(source.shots[i].frames[FRAMES // 2]) for i in recalled(index)]


def chance_of_look() -> float:
    """The mean share of parts in which two looks drawn at random agree."""
    return float(np.mean([CHANCE[part] for part in LOOK_PARTS]))


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
