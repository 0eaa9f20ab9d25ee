"""On this machine's accelerator as on the CPU: films in every placement, training, preparation, evaluation, scorers.

Skipped where there is none; ``test_pretended`` runs these tests on a pretended one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from storymem.commands.benchmark import Case, measure, measure_shot
from storymem.data.prepare import prepare
from storymem.evaluation.stbench import evaluate
from storymem.film.generate import generate_films as make_films
from storymem.media.video import read_video
from storymem.scorers.dinov2 import Dinov2Embedder
from storymem.training.run import train
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.runtime import release_memory
from storymem.wan.segments import memento
from storymem.wan.settings import Offload, RuntimeSettings, SamplerSettings
from storymem.wan.transformer import enable_layouts
from tests.composing import composed
from tests.data.drawn_clips import FRAMES, HEIGHT, WIDTH
from tests.evaluation import small
from tests.scorers import tiny as tiny_scorers
from tests.training.commands import SMALL as SMALL_SET
from tests.training.commands import TRAIN, make_set
from tests.wan import test_ti2v, tiny
from tests.wan.test_step_adapter import write_adapter
from tests.wan.test_transformer import SHAPE, inputs

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason="needs an accelerator")

#: Bytes that cuBLAS keeps from its first call on, on Hopper; less on other cards.
CUBLAS = 33 << 20 if ACCELERATOR is not None and ACCELERATOR.type == "cuda" else 0
PLACEMENTS: tuple[Offload, ...] = ("none", "model", "group")
STORY = """\
title: A walk
overview: Ada walks.
{references}
scenes:
  - shots:
      - {{prompt: "Ada waits in the desert at noon. Medium shot."}}
      - {{prompt: "Close-up. Ada turns in the desert at noon."}}
      - {{prompt: "Ada turns in the forest at dusk. Medium shot.", cut: false}}
"""
SMALL = ("model.video.height=32", "model.video.width=48", "model.video.frames=9", "sampler.steps=2")
TOY = SMALL  # cached memory, hidden from one pass, and an adapter
TINY = ("model=tiny", *SMALL)  # joint; first shot from text
FILMS: dict[str, tuple[str, ...]] = {
    "cached on the device": TOY,
    "cached on the CPU": (*TOY, "runtime.memory_cache=cpu"),
    "cached, recomputed": (*TOY, "runtime.memory_cache=recompute", "sampler.negative_sees_memory=true"),
    "joint": (*TINY, "continuity=mm2v"),
    "joint, hidden": (*TINY, "sampler.negative_sees_memory=false", "runtime.vae_tiling=true"),
    "joint, in turn": (*TINY, "runtime.experts=in_turn", "scorer/quality=tiny"),
    "joint, 8 bits": (*TINY, "runtime.precision=fp8_storage", "runtime.cache=first_block"),
}


def film(folder: Path, *overrides: str) -> np.ndarray:
    """The frames of a film of three shots."""
    references = ""
    if not any(override.startswith("model=tiny") for override in overrides):  # else the first shot is made from text
        tiny.images(1)[0].save(folder / "ada.png")
        references = "characters: [{name: Ada, references: [ada.png]}]"
    (folder / "story.yaml").write_text(STORY.format(references=references))
    (made,) = make_films(
        composed(f"story={folder / 'story.yaml'}", f"output={folder / 'film'}", "memory/selector=uniform", *overrides)
    )
    return np.concatenate([read_video(made.folder / shot.file) for shot in made.shots]).astype(float)


@pytest.mark.parametrize("name", FILMS)
def test_a_film_is_the_cpus_in_every_placement(name: str, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    expected = film(tmp_path / "cpu", *FILMS[name], "runtime=cpu")
    for offload in PLACEMENTS:
        (tmp_path / offload).mkdir()
        found = film(tmp_path / offload, *FILMS[name], f"runtime.offload={offload}")
        assert np.abs(found - expected).mean() < 2, offload
    release_memory()
    assert torch.accelerator.memory_allocated() - CUBLAS < 1 << 14, "a film leaves nothing on the device"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(tiny.settings(), folder / name, "storymem", seed=seed)
        for seed, name in enumerate(("memory", "steps"))
    }


@pytest.mark.parametrize("offload", PLACEMENTS)
def test_adapters_are_loaded_before_or_after_the_networks_are_placed(
    offload: Offload, adapters: Mapping[str, Path]
) -> None:
    weights = {name: {"name": name, "source": str(path)} for name, path in adapters.items()}
    model = tiny.settings(adapter={"weights": weights["memory"]})
    sampler = SamplerSettings(adapter={"weights": weights["steps"]})
    shots = {}
    for where in (RuntimeSettings(device="cpu"), RuntimeSettings(offload=offload)):
        before = load_pipeline(model, runtime=where, sampler=sampler)
        after = load_pipeline(tiny.settings(), runtime=where)
        load_memory_lora(after, adapters["memory"])
        load_memory_lora(after, adapters["steps"], adapter_name="steps", strict=False)
        shots[where.device] = [tiny.generate(pipe, memory=tiny.images(2)).cpu() for pipe in (before, after)]
    for found, expected in zip(shots["auto"], shots["cpu"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offload", PLACEMENTS)
@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_tensors_may_come_from_anywhere(mode: str, offload: Offload) -> None:
    """Embeddings, noise and memory on the CPU or on the device, and given frames as images."""
    slots = tiny.SLOTS + (2 if mode == "joint" else 0)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "latents": torch.randn(1, 16, slots, *tiny.LATENT, generator=generator),
        "memory": torch.randn(2, 16, 1, *tiny.LATENT, generator=generator),
    }
    rest = {"guidance_scale": 3.0, "negative_sees_memory": False, "first_frame": tiny.images(1)[0]}
    model = tiny.settings(memory_attention=mode)
    expected = tiny.generate(load_pipeline(model, runtime=tiny.CPU), **tensors, **rest)
    pipe = load_pipeline(model, runtime=RuntimeSettings(offload=offload))
    for device in (torch.device("cpu"), ACCELERATOR):
        shot = tiny.generate(pipe, **{name: value.to(device) for name, value in tensors.items()}, **rest)
        torch.testing.assert_close(shot.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offload", PLACEMENTS)
def test_the_pipeline_alone_takes_texts_and_gives_frames(offload: Offload) -> None:
    given = {"memory": tiny.images(2), "motion_frames": tiny.images(5), "output_type": "np"}
    expected = tiny.generate(load_pipeline(tiny.settings(), runtime=tiny.CPU), **given)
    found = tiny.generate(load_pipeline(tiny.settings(), runtime=RuntimeSettings(offload=offload)), **given)
    assert ACCELERATOR is not None
    tolerance = 1e-2 if ACCELERATOR.type == "cuda" else 1e-3  # convolutions compute in TF32 on CUDA
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("offload", PLACEMENTS)
def test_a_base_without_condition_channels_runs_there(offload: Offload) -> None:
    given = {"memory": torch.ones(2, 48, 1, 4, 6), "first_frame": tiny.images(1, size=(96, 64))[0]}
    pipes = [load_pipeline(test_ti2v.model(), runtime=where) for where in (tiny.CPU, RuntimeSettings(offload=offload))]
    expected, found = (test_ti2v.shot(pipe, **given) for pipe in pipes)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_offloading_leaves_room_on_the_device() -> None:
    """A network, or a block of one, is there at a time."""
    peaks = {}
    for offload in PLACEMENTS:
        release_memory()
        pipe = load_pipeline(deep(), runtime=RuntimeSettings(offload=offload))
        torch.accelerator.reset_peak_memory_stats()
        tiny.generate(pipe, memory=tiny.images(2))
        peaks[offload] = torch.accelerator.max_memory_allocated() - CUBLAS
        del pipe
    assert peaks["none"] > 1.3 * peaks["model"] > 1.3 * peaks["group"]


def deep() -> Any:
    """Experts that are larger than all else."""
    model = tiny.settings()
    model.network.transformer.update(num_layers=6, ffn_dim=4096)
    return model


@pytest.mark.parametrize("offload", PLACEMENTS)
def test_the_benchmark_measures_a_shot(offload: Offload) -> None:
    runtime = RuntimeSettings(offload=offload, cache="first_block", cache_threshold=0)
    model = tiny.settings()
    model.network.transformer["num_layers"] = 2
    case = Case(name="it", model=model, runtime=runtime)
    rows = list(measure(case, memory_sizes=[0, 2], ceiling=1.0, repeats=1))
    assert [(row.memory, row.refused) for row in rows] == [(0, ""), (2, "")]
    assert rows[1].measured_gb
    assert measure_shot(case, memory=2, steps=2).measured_gb > 0


# Scorers


@pytest.mark.parametrize("kind", ["clip", "aesthetic", "viclip", "hpsv3", "dinov2"])
def test_scorers_agree_with_the_cpu(kind: str, tmp_path: Path) -> None:
    images, clips = tiny_scorers.images(3, 3, 40, 60), tiny_scorers.images(2, 8, 3, 40, 60)

    def build(device: str) -> Any:
        if kind != "dinov2":
            return getattr(tiny_scorers, kind)(device=device)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(hidden_size=16, **sizes)).save_pretrained(tmp_path / device)
        return Dinov2Embedder.from_pretrained(str(tmp_path / device), resolution=28, device=device)

    def results(scorer: Any, device: torch.device) -> list[Tensor]:
        calls = {"embed_images": images.to(device), "embed_clips": clips.to(device), "score": images.to(device)}
        calls |= {"embed_texts": ["a fox", "an owl in the fog"]}
        return [getattr(scorer, name)(value).cpu() for name, value in calls.items() if hasattr(scorer, name)]

    on_cpu, there = build("cpu"), build("auto")
    expected = results(on_cpu, torch.device("cpu"))
    assert expected
    for device in (torch.device("cpu"), ACCELERATOR):
        assert device is not None
        for found, wanted in zip(results(there, device), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    if hasattr(there, "to"):
        for found, wanted in zip(results(there.to("cpu"), torch.device("cpu")), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Training


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("clips"))  # on the CPU


def test_a_training_set_is_the_cpus(training_set: Path, tmp_path: Path) -> None:
    settings = composed(
        *(f"videos={training_set.parent / 'videos'}", f"output={tmp_path / 'set'}", *SMALL_SET, "runtime.device=auto"),
        *("scorer/quality=none", "cache.given=[1]"),
        f"data.buckets=[{{frames:{FRAMES},height:{HEIGHT},width:{WIDTH}}}]",
        *("group.within=folder", "group.similarity=-1", "group.near_duplicate=0.999999", "group.valid_fraction=0.3"),
        name="prepare_data",
    )
    prepare(settings)
    files = sorted((tmp_path / "set").rglob("*.safetensors"))
    assert [path.name for path in files] == ["shard-w000-00000.safetensors", "shard-w000-00001.safetensors"]
    for path in files:
        found, expected = load_file(path), load_file(next(training_set.rglob(path.name)))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("variant", ["joint", "cached", "bfloat16"])
def test_a_run_with_validation_samples_and_resume_is_the_cpus(variant: str, training_set: Path, tmp_path: Path) -> None:
    options = {
        "joint": ("expert=both", "optimizer.ema_decay=0.5"),
        "cached": ("model.memory_attention=cached", "objective.memory_weight=0", "conditioning=mi2v"),
        "bfloat16": ("model.dtype=bfloat16", "parallel.gradient_checkpointing=true"),
    }[variant]
    (tmp_path / "story.yaml").write_text(STORY.format(references=""))
    losses, used = {}, {}
    for device in ("cpu", "auto"):
        release_memory()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()  # what cuBLAS keeps
        run = [
            *(*TRAIN, *options, f"dataset={training_set}", f"output={tmp_path / device}", f"runtime.device={device}"),
            *("validation.every=2", "validation.samples=2", "samples.every=2", "sampler.steps=2"),
            *(f"samples.story={tmp_path / 'story.yaml'}", "adapter.dropout=0", "batch.workers=0"),
        ]
        train(composed(*run, "steps=2", "checkpoint.every=2", name="train"))
        train(composed(*run, "steps=4", "checkpoint.every=2", name="train"))  # resumes
        assert len(list((tmp_path / device / "storymem").glob("*.safetensors"))) >= 1
        assert len(list((tmp_path / device / "samples").glob("*.png"))) == 2
        used[device] = torch.accelerator.max_memory_allocated() - before
        rows = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        losses[device] = [row[key] for row in rows for key in row if key == "loss" or key.startswith("valid_loss")]
    assert used["auto"] > 1 << 20 > used["cpu"]
    assert len(losses["auto"]) >= 6
    assert losses["auto"] == pytest.approx(losses["cpu"], rel=2e-2 if variant == "bfloat16" else 1e-3)


@pytest.mark.parametrize("memory", [1, 2])
def test_gradients_of_several_reads_are_the_cpus(memory: int) -> None:
    """In 16 bits and with several samples: a fused backward pass is built once for all reads of the same form."""
    gradients = []
    for device in (torch.device("cpu"), ACCELERATOR):
        network = WanTransformer3DModel(**SHAPE | {"attention_head_dim": 24})
        values = torch.Generator().manual_seed(0)
        for weight in network.parameters():
            weight.data = torch.randn(weight.shape, generator=values) / max(1, weight[0].numel()) ** 0.5
        enable_layouts(network.to(device, torch.bfloat16))
        network.patch_embedding.requires_grad_(False)  # a pretended device has no backward pass of convolutions
        layout = memento(range(-memory, 0), 2)
        given = inputs(layout.frames, batch=3)
        texts = dict.fromkeys(("prompt", "subject"), given["encoder_hidden_states"].to(device, torch.bfloat16))
        x, time = given["hidden_states"].to(device, torch.bfloat16), given["timestep"].to(device)
        prediction = network(x, time, texts, layout=layout).sample
        prediction.float().square().mean().backward()
        gradients.append(network.blocks[0].attn1.to_q.weight.grad.float().cpu())
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


# Evaluation

SCORERS = ("aesthetic.scorer", "viclip.scorer", "identity.embedder")


def test_films_are_made_and_scored_as_on_the_cpu(tmp_path: Path) -> None:
    stories = small.stories(tmp_path / "stories")
    films = small.write_films(tmp_path / "films", stories)
    rows = {}
    for device in ("cpu", "auto"):
        config = composed(
            *(f"stbench.stories={tmp_path / 'stories'}", f"output={tmp_path / device}", f"films={films}"),
            *(f"++metrics.{scorer}.device={device}" for scorer in SCORERS),
            *("metrics=tiny", "statistics.resamples=100"),
            name="eval_stbench",
        )
        results = evaluate(config)
        assert results is not None
        rows[device] = json.loads((tmp_path / device / "results.json").read_text())
    found, expected = (numbers(rows[device]) for device in ("auto", "cpu"))
    assert len(found) > 5
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """The scores in a result file by their paths."""
    if isinstance(value, dict):
        return {key: number for k, v in value.items() for key, number in numbers(v, f"{name}.{k}").items()}
    if isinstance(value, list):
        return {key: number for k, v in enumerate(value) for key, number in numbers(v, f"{name}.{k}").items()}
    scored = isinstance(value, float) and "seconds" not in name
    return {name: value} if scored else {}


# The device itself


def test_operations_that_mix_devices_fail() -> None:
    there, here = torch.ones(2, 3, device=ACCELERATOR), torch.ones(2, 3)
    for mixing in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.linear(there, here),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
        lambda: torch.nn.functional.conv1d(there[None], here[None]),
        lambda: torch.nn.functional.scaled_dot_product_attention(there[None], there[None], here[None]),
        lambda: here[torch.tensor([0], device=ACCELERATOR)],
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            mixing()
    assert (there + torch.tensor(1.0)).sum().item() == 12, "a number may lie on the CPU"


def test_a_pipeline_given_a_network_on_the_cpu_fails() -> None:
    """What these tests would miss if devices could be mixed."""
    pipe: WanMemoryToVideoPipeline = load_pipeline(tiny.settings(), runtime=RuntimeSettings(offload="none"))
    pipe.transformer.condition_embedder.to("cpu")
    with pytest.raises(RuntimeError, match=r"same device|device type"):
        tiny.generate(pipe)
