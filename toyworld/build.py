"""The recipe of the toy models: stages that resume, each with its own folder of checkpoints, logs and pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file

from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import wan_scheduler
from toyworld.attributes import FRAMES
from toyworld.base import BOUNDARY, Denoiser, build_transformer, train_denoiser
from toyworld.clips import write_clips
from toyworld.contrast import (
    ClipTraining,
    save_clip,
    save_quality,
    save_viclip,
    train_clip,
    train_quality,
    train_viclip,
)
from toyworld.fitting import Run, Schedule, averaged
from toyworld.latents import SHARD, channel_statistics, fill_cache, load_cache
from toyworld.report import generate, measure
from toyworld.text import load_tokenizer, seeded_text_encoder, train_tokenizer, write_known_words
from toyworld.text_reading import Reader, train_text_encoder
from toyworld.vae import build_vae, picture, train_vae
from toyworld.world import HELD_OUT, story

WEIGHTS = Path(__file__).parent / "weights"
SHARDS = 40  # of 250 training shots each
SHIFT = 4.0  # of the sampler

# Minutes on one core; the order is the order of `--stage all`.
SCHEDULES = {
    "text_encoder": Schedule(minutes=6, learning_rate=2e-3, warmup=50, ema=0.99),
    "vae": Schedule(minutes=50, learning_rate=3e-3, warmup=100),
    "decoder": Schedule(minutes=40, learning_rate=1e-3, warmup=50),
    "base": Schedule(minutes=100, learning_rate=2e-3, warmup=100),
    "high": Schedule(minutes=40, learning_rate=1.5e-3, warmup=20, ema=0.998),
    "low": Schedule(minutes=40, learning_rate=1.5e-3, warmup=20, ema=0.998),
    "clip": Schedule(minutes=8, learning_rate=2e-3, warmup=50, ema=0.995),
    "viclip": Schedule(minutes=8, learning_rate=2e-3, warmup=50, ema=0.995),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where the recipe works and how much of it is done.

    work: folder of all stages. quick: a few steps of everything, to see that it runs. minutes, steps: instead of a
    stage's own schedule. stories: of how many training stories clips are written.
    adapter: folder of a trained memory adapter, for the stage that ships it.
    """

    work: Path
    weights: Path = WEIGHTS
    quick: bool = False
    minutes: float | None = None
    steps: int | None = None
    stories: int = 400
    adapter: Path | None = None

    def run(self, stage: str) -> Run:
        """The folder of a stage."""
        return Run(self.work / stage)

    def schedule(self, stage: str) -> Schedule:
        """The schedule of a stage as it is to be run."""
        schedule = SCHEDULES[stage]
        if self.quick:
            return replace(schedule, minutes=None, steps=2, log_every=1)
        if self.minutes is not None or self.steps is not None:
            return replace(schedule, minutes=self.minutes, steps=self.steps)
        return schedule


def text(recipe: Recipe) -> None:
    """The vocabulary."""
    if not (recipe.work / "tokenizer").exists():
        train_tokenizer(recipe.work / "tokenizer", stories=100 if recipe.quick else 2000)


def _fresh_reader(recipe: Recipe) -> Reader:
    torch.manual_seed(5)
    return Reader(seeded_text_encoder(len(load_tokenizer(recipe.work / "tokenizer"))))


def text_encoder(recipe: Recipe) -> None:
    """The text encoder learns to read prompts; from then on it is frozen."""
    sizes = {"size": 8, "held_out": 16} if recipe.quick else {}
    reader, tokenizer = _fresh_reader(recipe), load_tokenizer(recipe.work / "tokenizer")
    train_text_encoder(recipe.run("text_encoder"), recipe.schedule("text_encoder"), reader, tokenizer, **sizes)


def vae(recipe: Recipe) -> None:
    """Encoder and decoder together."""
    train_vae(recipe.run("vae"), recipe.schedule("vae"), build_vae(), held_out=2 if recipe.quick else 24)


def latents(recipe: Recipe) -> None:
    """Latent statistics of the encoder, and the latents of all training shots and of some held-out ones."""
    encoder = averaged(recipe.run("vae"), build_vae())
    assert isinstance(encoder, AutoencoderKLWan)
    statistics = recipe.work / "latents" / "statistics.json"
    if not statistics.exists():
        statistics.parent.mkdir(parents=True, exist_ok=True)
        mean, std = channel_statistics(encoder, range(4 if recipe.quick else 200))
        part = statistics.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"latents_mean": mean, "latents_std": std}, indent=2) + "\n")
        os.replace(part, statistics)
    encoder.register_to_config(**json.loads(statistics.read_text()))
    count = 5 if recipe.quick else SHARD
    fill_cache(encoder, recipe.work / "latents" / "held_out", range(1), count=count, start=HELD_OUT)
    fill_cache(encoder, recipe.work / "latents" / "train", range(1 if recipe.quick else SHARDS), count=count)


def decoder(recipe: Recipe) -> None:
    """The decoder goes on alone: latents keep their meaning."""
    start = averaged(recipe.run("vae"), build_vae())
    assert isinstance(start, AutoencoderKLWan)
    held_out = 2 if recipe.quick else 24
    train_vae(recipe.run("decoder"), recipe.schedule("decoder"), start, only_decoder=True, held_out=held_out)


def _fresh_denoiser(recipe: Recipe) -> Denoiser:
    reader = averaged(recipe.run("text_encoder"), _fresh_reader(recipe))
    assert isinstance(reader, Reader)
    torch.manual_seed(3)
    return Denoiser(build_transformer(), reader.encoder)


def _expert(recipe: Recipe, name: str) -> None:
    model = _fresh_denoiser(recipe)
    if name != "base":
        averaged(recipe.run("base"), model)
    run = recipe.run(name)
    train_denoiser(
        run,
        recipe.schedule(name),
        model,
        load_tokenizer(recipe.work / "tokenizer"),
        load_cache(recipe.work / "latents" / "train"),
        load_cache(recipe.work / "latents" / "held_out"),
        expert=name,
        size=4 if recipe.quick else 24,
        compiled=not recipe.quick,
        draw=lambda trained, step: draw_samples(recipe, trained, run.folder / f"samples_{step:06d}.png"),
    )


def base(recipe: Recipe) -> None:
    """One network for all noise levels, of which both experts are then made."""
    _expert(recipe, "base")


def high(recipe: Recipe) -> None:
    """The expert above the boundary."""
    _expert(recipe, "high")


def low(recipe: Recipe) -> None:
    """The expert below the boundary."""
    _expert(recipe, "low")


def clip(recipe: Recipe) -> None:
    """CLIP."""
    sizes = {"size": 8, "held_out": 4} if recipe.quick else {}
    scorer = train_clip(recipe.run("clip"), recipe.schedule("clip"), ClipTraining(), **sizes)
    save_clip(scorer, recipe.work / "clip" / "model")


def quality(recipe: Recipe) -> None:
    """The quality head on CLIP's embeddings."""
    run = recipe.run("quality")
    sizes = {"count": 20, "held_out": 8} if recipe.quick else {}
    save_quality(train_quality(run, recipe.work / "clip" / "model", **sizes), run.folder)


def viclip(recipe: Recipe) -> None:
    """ViCLIP."""
    sizes = {"size": 4, "held_out": 4} if recipe.quick else {}
    scorer = train_viclip(recipe.run("viclip"), recipe.schedule("viclip"), **sizes)
    save_viclip(scorer, recipe.work / "viclip" / "model")


def clips(recipe: Recipe) -> None:
    """Training stories as video files with captions, and masks of their people, for `prepare_data`."""
    stories = range(2 if recipe.quick else recipe.stories)
    write_clips(recipe.work / "clips", stories, masks=recipe.work / "masks")


def trained_vae(recipe: Recipe) -> AutoencoderKLWan:
    """The VAE as far as it is trained, with its latent statistics."""
    done = recipe.run("decoder" if (recipe.work / "decoder" / "checkpoint.pt").exists() else "vae")
    model = averaged(done, build_vae())
    assert isinstance(model, AutoencoderKLWan)
    model.register_to_config(**json.loads((recipe.work / "latents" / "statistics.json").read_text()))
    return model.eval()


def pipeline_of(recipe: Recipe, high_noise: Denoiser, low_noise: Denoiser) -> WanMemoryToVideoPipeline:
    """The pipeline of two experts, which share the text encoder."""
    pipe = WanMemoryToVideoPipeline(
        tokenizer=load_tokenizer(recipe.work / "tokenizer"),
        text_encoder=low_noise.text_encoder,
        vae=trained_vae(recipe),
        scheduler=wan_scheduler(SHIFT),
        transformer=high_noise.transformer,
        transformer_2=low_noise.transformer,
        boundary_ratio=BOUNDARY,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_samples(recipe: Recipe, model: Denoiser, path: Path, *, steps: int = 15) -> None:
    """Four held-out prompts with looks and two first frames: true above generated, first, middle and last frame."""
    pipe = pipeline_of(recipe, model, model)
    rows = []
    for i in (0, 5) if recipe.quick else range(6):
        shot = story(HELD_OUT + 50 + i, looks=True).shots[i % 8]
        first = shot.frames[0] if i >= 4 else None
        made = generate(pipe, shot.prompt, i, steps=2 if recipe.quick else steps, first=first)
        chosen = [0, FRAMES // 2, FRAMES - 1]
        rows.append(np.concatenate([shot.frames[chosen], made[chosen]]))
    picture(path, *rows)


def save(recipe: Recipe) -> None:
    """Everything trained so far as a diffusers folder and scorer folders, float16, ready to ship."""
    experts = {name: _fresh_denoiser(recipe) for name in ("high", "low")}
    for name, model in experts.items():
        done = name if (recipe.work / name / "checkpoint.pt").exists() else "base"
        averaged(recipe.run(done), model)
        model.eval()
    pipe = pipeline_of(recipe, experts["high"], experts["low"])
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(recipe.weights)
    write_known_words(recipe.weights / "tokenizer")
    for name in ("clip", "viclip"):
        shutil.copytree(recipe.work / name / "model", recipe.weights / name, dirs_exist_ok=True)
    shutil.copy(recipe.work / "quality" / "aesthetic_head.safetensors", recipe.weights / "clip")


def adapter(recipe: Recipe) -> None:
    """A memory adapter made by `train.py experiment=toy_m2v_cached`, if one is named: in float16, beside the models."""
    if recipe.adapter is None:
        return
    (recipe.weights / "adapter").mkdir(parents=True, exist_ok=True)
    for path in sorted(recipe.adapter.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
            save_file(tensors, recipe.weights / "adapter" / path.name, metadata=file.metadata())


def report(recipe: Recipe) -> None:
    """Figures on held-out stories, in `report.json`."""
    figures = measure(recipe.weights, count=2, steps=2) if recipe.quick else measure(recipe.weights)
    (recipe.work / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


STAGES: dict[str, Callable[[Recipe], None]] = {
    stage.__name__: stage
    for stage in (
        text,
        text_encoder,
        vae,
        latents,
        decoder,
        base,
        high,
        low,
        clip,
        quality,
        viclip,
        clips,
        save,
        adapter,
        report,
    )
}
