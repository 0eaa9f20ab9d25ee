"""Step-distilled adapters: stacked on the memory adapter, four steps, one pass each, and reported when missing."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from storymem.config import build_settings
from storymem.film.plan import make_plan
from storymem.wan import transformer
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import save_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, SamplerSettings, StepAdapterSettings
from storymem.wan.sources import STEP_ADAPTER, check_weights
from storymem.weights import MissingWeights
from tests.composing import generate_settings
from tests.stories import MODEL, TWO_SHOTS, story, storyteller
from tests.wan.tiny import CPU, adapt, generate, images, settings

FOLDERS = {"i2v": "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1", "t2v": "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"}


def write_adapter(model: ModelSettings, folder: Path, layout: Any, seed: int) -> Path:
    """A LoRA of rank 2 for the networks of ``model``, whose product is not zero."""
    pipe = adapt(load_pipeline(model, runtime=CPU, text_encoder=False), seed=seed)
    save_memory_lora(pipe, folder, layout=layout)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A memory adapter as released, and a step-distilled one in the keys that ComfyUI's files have."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "memory": write_adapter(settings(), folder / "memory", "released", seed=1),
        "steps": write_adapter(settings(), folder / "steps", "comfyui", seed=2),
    }


def local(path: Path) -> dict[str, Any]:
    return {"name": path.name, "source": str(path)}


def loaded(files: dict[str, Path], *names: str, **step_weights: Any) -> WanMemoryToVideoPipeline:
    adapter = {"weights": local(files["memory"]), "alpha": 2, "use_rslora": True} if "memory" in names else None
    steps = {"weights": local(files["steps"])} | step_weights if "steps" in names else None
    sampler = SamplerSettings(adapter=None if steps is None else StepAdapterSettings(**steps))
    return load_pipeline(settings(adapter=adapter), runtime=CPU, sampler=sampler, text_encoder=True)


def shot(pipe: WanMemoryToVideoPipeline) -> Tensor:
    return generate(pipe, memory=images(2), guidance_scale=1.0)


def strengths(expert: Any, adapter: str) -> set[float]:
    """By how much B @ A is multiplied in the linears of an expert."""
    return {round(layer.scaling[adapter], 4) for layer in expert.modules() if isinstance(layer, LoraLayer)}


def test_both_adapters_are_active_each_with_its_own_weight(files: dict[str, Path]) -> None:
    pipe = loaded(files, "memory", "steps", weight=0.5, weight_low=0.25)
    for expert, weight in ((pipe.transformer, 0.5), (pipe.transformer_2, 0.25)):
        assert expert.active_adapters() == ["memory", STEP_ADAPTER]
        as_trained = round(2 / 2**0.5, 4)  # alpha 2 and rank 2 under rsLoRA
        assert strengths(expert, "memory") == {as_trained}
        assert strengths(expert, STEP_ADAPTER) == {round(2 / 2**0.5 * weight, 4)}


def test_each_adapter_changes_the_shot_and_taking_one_away_restores_it(files: dict[str, Path]) -> None:
    both = loaded(files, "memory", "steps")
    memory, steps, neither = (shot(loaded(files, *names)) for names in (("memory",), ("steps",), ()))
    together = shot(both)
    for one in (memory, steps, neither):
        assert (together - one).norm() > 1e-3 * one.norm()
    both.delete_adapters(STEP_ADAPTER)
    torch.testing.assert_close(shot(both), memory, rtol=1e-5, atol=1e-5)
    both.delete_adapters("memory")
    torch.testing.assert_close(shot(both), neither, rtol=1e-5, atol=1e-5)


def test_diffusers_sets_the_weights_of_both_again(files: dict[str, Path]) -> None:
    pipe = loaded(files, "memory", "steps")
    pipe.set_adapters(["memory", STEP_ADAPTER], [1.0, 0.0])
    torch.testing.assert_close(shot(pipe), shot(loaded(files, "memory")), rtol=1e-5, atol=1e-5)


def lightning(i2v: Path, t2v: Path | None = None) -> SamplerSettings:
    """``sampler=lightning`` with files of this machine."""
    overrides = [f"sampler.adapter.weights.source={i2v}", "sampler.adapter.weights.file=null"]
    if t2v is None:
        overrides.append("sampler.adapter.text_to_video=null")
    else:
        overrides += [f"sampler.adapter.text_to_video.source={t2v}", "sampler.adapter.text_to_video.file=null"]
    return generate_settings("sampler=lightning", *overrides).sampler


def test_a_film_takes_four_steps_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = transformer.forward, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = list(getattr(self, "peft_config", {}))
        seen.append((self.config.in_channels, adapters, round(kwargs["timestep"][0].item(), 1)))
        return forward(self, *args, **kwargs)

    files = write_adapter(MODEL, tmp_path / "steps", "comfyui", seed=3)
    monkeypatch.setattr(transformer, "forward", counted)
    teller = storyteller(sampler=lightning(files, files))
    film = teller.tell(story(tmp_path, TWO_SHOTS), tmp_path / "film")
    assert len(film.shots) == 2
    steps = [1000.0, 937.5, 833.3, 625.0]  # those that the published adapters were trained at
    assert seen == [(16, [STEP_ADAPTER], t) for t in steps] + [(36, [STEP_ADAPTER], t) for t in steps]


def test_a_first_shot_by_text_needs_an_adapter_of_its_own(files: dict[str, Path]) -> None:
    sampler = lightning(files["steps"])
    check_weights(settings(), text_to_video=False, sampler=sampler)
    check_weights(settings(has_text_to_video=False), text_to_video=True, sampler=sampler)
    with pytest.raises(ValueError, match=r"no weights for text-to-video.*set sampler\.adapter\.text_to_video"):
        check_weights(settings(), text_to_video=True, sampler=sampler)


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_empty_cache")
def test_missing_adapters_are_reported_with_their_commands() -> None:
    made = generate_settings("model=wan2.2-a14b", "sampler=lightning")
    with pytest.raises(MissingWeights) as error:
        check_weights(made.model, text_to_video=True, continuity="mi2v", sampler=made.sampler)
    for folder in FOLDERS.values():
        assert (
            f'download: hf download lightx2v/Wan2.2-Lightning --include "{folder}/*.safetensors"\n'
            in f"{error.value}\n"
        )
    assert "1.2 GB" in str(error.value)


@pytest.mark.usefixtures("_empty_cache")
def test_the_plan_shows_them(tmp_path: Path) -> None:
    made = generate_settings("model=tiny", "sampler=lightning", "runtime=cpu")
    plan, problems = make_plan(story(tmp_path, TWO_SHOTS), made, tmp_path / "film")
    assert len(problems) == 2
    assert "4 forwards a shot (4 steps)" in plan
    assert "weights  MISSING Wan2.2-Lightning for image-to-video" in plan
    assert "weights  MISSING Wan2.2-Lightning for text-to-video" in plan
    assert "attention native" in plan


# Other adapters beside the memory adapter


def test_adapters_of_a_list_add_up_each_with_its_weight_and_expert(files: dict[str, Path]) -> None:
    source = str(files["steps"])
    model = settings()
    plain = load_pipeline(model, runtime=CPU)
    both = [{"source": source, "weight": 0.5}, {"source": source, "weight": 0.25, "expert": "low_noise"}]
    pipe = load_pipeline(build_settings(ModelSettings, asdict(model) | {"adapters": both}), runtime=CPU)
    assert [list(expert.peft_config) for expert in pipe.experts.values()] == [["extra_1"], ["extra_1", "extra_2"]]
    inputs = {"memory": images(1), "num_inference_steps": 4}
    assert not torch.equal(generate(pipe, **inputs), generate(plain, **inputs))
    for expert, names in zip(pipe.experts.values(), (["extra_1"], ["extra_1", "extra_2"]), strict=True):
        scales = {name: expert.blocks[0].attn1.to_q.scaling[name] for name in names}
        assert scales == {
            name: pytest.approx(weight * 2**0.5) for name, weight in zip(names, (0.5, 0.25), strict=False)
        }


def test_an_adapter_of_a_list_that_is_absent_is_named_before_anything_loads(tmp_path: Path) -> None:
    absent = {"source": str(tmp_path / "style.safetensors")}
    model = build_settings(ModelSettings, asdict(MODEL) | {"adapters": [absent]})
    with pytest.raises(MissingWeights, match=r"style\.safetensors"):
        check_weights(model, text_to_video=False)
    with pytest.raises(ValueError, match=r"adapters\.0\.weight|weight must be"):
        build_settings(ModelSettings, asdict(MODEL) | {"adapters": [{"source": "x", "weight": 99}]})


@pytest.mark.parametrize("name", ["steps_high_noise", "steps_low_noise"])
def test_experts_that_take_turns_get_their_own_adapters(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The memory adapter, an extra one for one expert, and a step-distilled one that is named after one expert."""
    (only,) = (path for path in files["steps"].rglob("*.safetensors") if name.removeprefix("steps_") in path.name)
    shutil.copy(only, alone := tmp_path / f"{name}.safetensors")
    model = settings(
        adapter={"weights": local(files["memory"]), "alpha": 2, "use_rslora": True},
        adapters=[{"source": str(files["steps"]), "expert": name.removeprefix("steps_")}],
    )
    sampler = SamplerSettings(adapter=StepAdapterSettings(weights=local(alone)))
    together, turns = (
        load_pipeline(model, runtime=replace(CPU, experts=experts), sampler=sampler)
        for experts in ("together", "in_turn")
    )
    assert torch.equal(generate(turns, memory=images(2)), generate(together, memory=images(2)))
