"""Train the toy models; every stage resumes where it stopped.

python -m toyworld.train --minutes 60                               # everything, in build/toy
python -m toyworld.train base --minutes 9 --device cuda             # one stage, 9 minutes in all
python -m toyworld.train --start toyworld/weights --minutes 60      # from the shipped weights instead of from nothing
python -m toyworld.train save --weights toyworld/weights            # the result as a folder for model=toy

The memory adapter is trained by `scripts/train.py experiment=toy_m2v_cached` on clips by `python -m toyworld.clips`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel

from storymem.scorers.clip import VOCABULARY_FILE, ClipScorer, ClipTokenizer
from storymem.scorers.viclip import ViclipScorer
from storymem.wan.schedule import wan_scheduler
from storymem.wan.spec import COMPONENTS, Expert
from storymem.wan.transformer import enable_layouts
from toyworld.base import BOUNDARY, base_loss, build_transformer
from toyworld.contrast import (
    ClipTraining,
    build_viclip,
    save_clip,
    save_viclip,
    top1,
    train_quality,
    viclip_loss,
    write_vocabulary,
)
from toyworld.fitting import Fit, averaged, checkpoints_of
from toyworld.latents import channel_statistics, fill_cache, load_cache
from toyworld.text import TextEmbedder, build_text_encoder, load_tokenizer, train_tokenizer, write_known_words
from toyworld.text_reading import Reader, read_right, reading_loss
from toyworld.vae import build_vae, decoded, vae_loss
from toyworld.world import HELD_OUT, story

SHIFT = 4.0  # of the sampler


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where training happens and how long.

    Args:
        work: folder of all stages.
        minutes: of the stage that is run, earlier runs included.
        device: "cpu", "cuda" or None for what there is.
        start: a folder of weights to start from; None: fresh networks.
        weights: the folder that `save` writes.
        shards: of 32 stories each, how many are encoded.
        batch_scale: of the base on a GPU: how many times the samples of a batch on a CPU.
        quick: tiny batches and no compiling, to see that everything runs.
    """

    work: Path
    minutes: float
    device: str | None = None
    start: Path | None = None
    weights: Path
    shards: int = 60
    batch_scale: float = 16
    quick: bool = False

    def fit(self, stage: str, model: nn.Module, *, rate: float, decay: float = 0.999) -> Fit:
        """The training of a stage."""
        return Fit(model, self.work / stage, rate=rate, decay=decay, device=self.device)

    def began(self, stage: str) -> bool:
        """Whether a stage has a checkpoint."""
        return bool(checkpoints_of(self.work / stage).steps())

    def tokenizer_folder(self) -> Path:
        """The vocabulary: that of the weights to start from, or one of our own."""
        return self.start / "tokenizer" if self.start else self.work / "tokenizer"

    def text_encoder(self) -> UMT5EncoderModel:
        """The text encoder as far as it is trained."""
        if self.began("text"):
            return averaged(self.work / "text", Reader(build_text_encoder(self.vocabulary()))).encoder
        if self.start:
            return UMT5EncoderModel.from_pretrained(self.start / "text_encoder", torch_dtype=torch.float32)
        return build_text_encoder(self.vocabulary())

    def vocabulary(self) -> int:
        """Tokens of the text encoder."""
        return len(load_tokenizer(self.tokenizer_folder()))

    def vae(self, *stages: str) -> AutoencoderKLWan:
        """The VAE after the last of some stages that was run, with its latent statistics."""
        model = build_vae(self.start / "vae" if self.start else None)
        for stage in stages:
            if self.began(stage):
                averaged(self.work / stage, model)
        statistics = self.work / "latents" / "statistics.json"
        if statistics.exists():
            model.register_to_config(**json.loads(statistics.read_text()))
        return model

    def expert(self, name: Expert = "low_noise") -> WanTransformer3DModel:
        """An expert as far as it is trained: by its own stage, or by that of both."""
        if self.start:
            folder = self.start / COMPONENTS[name]
            model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
        else:
            model = build_transformer()
        stages = [stage for stage in (name, "base") if self.began(stage)]
        return averaged(self.work / stages[0], model) if stages else model


def text(recipe: Recipe) -> None:
    """The vocabulary, and the text encoder, which learns to read prompts and is then frozen."""
    if not recipe.tokenizer_folder().exists():
        train_tokenizer(recipe.tokenizer_folder(), stories=100 if recipe.quick else 2000)
    tokenizer = load_tokenizer(recipe.tokenizer_folder())
    reader = Reader(recipe.text_encoder())
    fit = recipe.fit("text", reader, rate=2e-3, decay=0.99)
    fit.run(lambda rng: reading_loss(reader, tokenizer, rng, 8 if recipe.quick else 64), recipe.minutes)
    fit.log(**read_right(reader, tokenizer))


def vae(recipe: Recipe) -> None:
    """Encoder and decoder; not run where training starts from weights, whose latents base and adapter know."""
    if recipe.start is None:
        model = recipe.vae()
        recipe.fit("vae", model, rate=2e-3).run(lambda rng: vae_loss(model, rng), recipe.minutes)


def latents(recipe: Recipe) -> None:
    """Statistics of the latents, and the latents of training stories and of some held-out ones."""
    model, folder = recipe.vae("vae"), recipe.work / "latents"
    model.to("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    stories = 2 if recipe.quick else 32
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.start is None and not (folder / "statistics.json").exists():
        values = channel_statistics(model, range(stories))
        (folder / "statistics.json").write_text(json.dumps(values, indent=2) + "\n")
        model.register_to_config(**values)
    for part, shards, start in (("held_out", 1, HELD_OUT + 100_000), ("train", recipe.shards, 0)):
        for path in fill_cache(
            model, folder / part, range(1 if recipe.quick else shards), stories=stories, start=start
        ):
            print(path, flush=True)


def decoder(recipe: Recipe) -> None:
    """The decoder alone: latents keep their meaning while images get sharper."""
    model = recipe.vae("vae")
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
    fit = recipe.fit("decoder", model, rate=6e-4, decay=0.99)
    fit.run(lambda rng: vae_loss(model, rng), recipe.minutes)
    model = recipe.vae("vae", "decoder")
    shots = [story(HELD_OUT + i).shots[i % 8] for i in range(2 if recipe.quick else 24)]
    fit.log(psnr_db=sum(decoded(model, shot)[1] for shot in shots) / len(shots))


def _train_expert(recipe: Recipe, expert: Expert | None = None) -> None:
    """Train a network for the noise levels of an expert; None: for all."""
    model = recipe.expert(expert or "low_noise")
    enable_layouts(model)
    fit = recipe.fit(expert or "base", model, rate=1e-3)
    on_cpu = fit.accelerator.device.type == "cpu"
    if on_cpu and not recipe.quick:  # an H200 took as long for a compiled step
        torch._dynamo.config.recompile_limit = 64
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    embed = TextEmbedder(load_tokenizer(recipe.tokenizer_folder()), recipe.text_encoder().to(fit.accelerator.device))
    data = load_cache(recipe.work / "latents" / "train").to(fit.accelerator.device)
    scale = 0.1 if recipe.quick else 1 if on_cpu else recipe.batch_scale
    # On CPUs the fused attention's backward pass takes ten times as long as the plain one at this size.
    with sdpa_kernel(SDPBackend.MATH if on_cpu else [*SDPBackend.__members__.values()]):
        fit.run(lambda rng: base_loss(model, data, embed, rng, expert, scale=scale), recipe.minutes)


def base(recipe: Recipe) -> None:
    """One network for all noise levels, from which both experts begin."""
    _train_expert(recipe)


def high_noise(recipe: Recipe) -> None:
    """The expert of noise levels from `BOUNDARY` up."""
    _train_expert(recipe, "high_noise")


def low_noise(recipe: Recipe) -> None:
    """The expert of noise levels below `BOUNDARY`."""
    _train_expert(recipe, "low_noise")


def _tokenizer(recipe: Recipe, name: str) -> ClipTokenizer:
    """That of the weights to start from, or the world's, beside the model of a stage."""
    folder = recipe.work / name / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.start:
        shutil.copy(recipe.start / name / VOCABULARY_FILE, folder)
    else:
        write_vocabulary(folder)
    return ClipTokenizer(77 if name == "clip" else 32, folder / VOCABULARY_FILE)


def clip(recipe: Recipe) -> None:
    """CLIP, and the quality head on it."""
    training = ClipTraining(_tokenizer(recipe, "clip"))
    if recipe.start:
        training.network.load_state_dict(load_file(recipe.start / "clip" / "open_clip_model.safetensors"))
    fit = recipe.fit("clip", training, rate=1e-3, decay=0.995)
    fit.run(lambda rng: training.loss(rng, 8 if recipe.quick else 64), recipe.minutes)
    folder = fit.folder / "model"
    save_clip(averaged(fit.folder, ClipTraining(training.tokenizer)).network, folder)
    train_quality(folder, count=20 if recipe.quick else 1500)
    fit.log(top1=top1(ClipScorer.from_folder(folder), 8 if recipe.quick else 100))


def viclip(recipe: Recipe) -> None:
    """ViCLIP."""
    tokenizer = _tokenizer(recipe, "viclip")
    network = build_viclip(tokenizer.vocab_size)
    if recipe.start:
        network.load_state_dict(load_file(recipe.start / "viclip" / "model.safetensors"))
    fit = recipe.fit("viclip", network, rate=1e-3, decay=0.995)
    fit.run(lambda rng: viclip_loss(network, tokenizer, rng, 4 if recipe.quick else 32), recipe.minutes)
    scorer = ViclipScorer(averaged(fit.folder, build_viclip(tokenizer.vocab_size)), tokenizer=tokenizer)
    save_viclip(scorer, fit.folder / "model")
    fit.log(top1=top1(scorer, 8 if recipe.quick else 100))


def save(recipe: Recipe) -> None:
    """Everything trained so far as a folder of a diffusers pipeline and scorers, in float16, ready to ship."""
    from storymem.wan.pipeline import WanMemoryToVideoPipeline

    pipe = WanMemoryToVideoPipeline(
        tokenizer=load_tokenizer(recipe.tokenizer_folder()),
        text_encoder=recipe.text_encoder(),
        vae=recipe.vae("vae", "decoder"),
        scheduler=wan_scheduler(SHIFT),
        transformer=recipe.expert("high_noise"),
        transformer_2=recipe.expert("low_noise"),
        boundary_ratio=BOUNDARY,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(recipe.weights)
    for path in recipe.weights.glob("*/config.json"):  # without the folder that training started from
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_known_words(recipe.weights / "tokenizer")
    for name in ("clip", "viclip"):
        if recipe.began(name):
            shutil.copytree(recipe.work / name / "model", recipe.weights / name, dirs_exist_ok=True)


#: In the order in which they need each other, each with its share of the minutes of a run of all.
STAGES: dict[str, tuple[Callable[[Recipe], None], float]] = {
    "text": (text, 0.04),
    "vae": (vae, 0.2),
    "latents": (latents, 0),
    "base": (base, 0.43),
    "high_noise": (high_noise, 0.1),
    "low_noise": (low_noise, 0.1),
    "decoder": (decoder, 0.07),
    "clip": (clip, 0.03),
    "viclip": (viclip, 0.03),
    "save": (save, 0),
}


def main() -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument("--minutes", type=float, default=60, help="of training, shared by the stages by need")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what there is")
    parser.add_argument("--work", type=Path, default=Path("build/toy"), help="checkpoints, latents and logs")
    parser.add_argument("--start", type=Path, help="a folder of weights to start from")
    parser.add_argument("--weights", type=Path, help="where `save` writes; default: WORK/weights")
    parser.add_argument("--shards", type=int, default=60, help="of 32 training stories each")
    parser.add_argument("--batch-scale", type=float, default=16, help="of the base on a GPU; 1: batches as on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny batches, to see that everything runs")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}: write some of {', '.join(STAGES)}")
    given = vars(args)
    chosen, minutes = given.pop("stages") or list(STAGES), given.pop("minutes")
    given["weights"] = args.weights or args.work / "weights"
    whole = sum(STAGES[name][1] for name in chosen) or 1.0
    for name in chosen:
        stage, share = STAGES[name]
        stage(Recipe(minutes=minutes * share / whole, **given))


if __name__ == "__main__":
    main()
