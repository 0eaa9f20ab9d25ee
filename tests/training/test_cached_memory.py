"""Training in the cached memory mode: what the network sees, what has a loss, and where gradients go."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storymem.config import ConfigError, build_settings
from storymem.data.prepare import prepare
from storymem.training.experts import prepare_expert, trained_parameters
from storymem.training.objectives.flow import noise_level
from storymem.training.objectives.memory import MemoryBatch, MemoryObjective
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.training.run import train
from storymem.training.settings import TrainSettings
from storymem.wan.conditioning import condition_channels
from storymem.wan.loading import load_pipeline
from storymem.wan.segments import memory_cached
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings
from storymem.wan.transformer import SegmentCache
from storymem.weights import Weights
from tests import stories
from tests.data import preparing
from tests.data.drawn_clips import scene, video
from tests.training.tiny import ADAPTER, Recorder, config, expert, run
from tests.wan import test_ti2v

VIDEO_ALONE = MemoryObjectiveSettings(memory_weight=0.0)
OBJECTIVE = MemoryObjective(settings=VIDEO_ALONE, boundary=0.9, rope_stride=5, memory_attention="cached")
CPU = RuntimeSettings(device="cpu")
FRAMES, SLOTS, TOKENS = 2, 3, 6  # of memory, of video, of a latent frame


def batch(memory_frames: int = FRAMES, x0: Tensor | None = None) -> MemoryBatch:
    generator = torch.Generator().manual_seed(0)
    drawn, noise = torch.randn(2, 1, 16, memory_frames + SLOTS, 4, 6, generator=generator)
    x0 = drawn if x0 is None else x0
    memory = x0[:, :, :memory_frames] if memory_frames else None
    return MemoryBatch(
        x0=x0,
        noise=noise,
        u=torch.tensor([0.2]),
        condition=condition_channels(memory, torch.zeros(1, 16, SLOTS, 4, 6), 0),
        mask=torch.zeros(1, SLOTS, 4, 6),
        text=torch.randn(1, 16, 16, generator=generator),
        memory_frames=memory_frames,
        ids=("a",),
    )


def trained(seed: int = 0) -> Any:
    """An expert with an adapter that is not zero any more, ready for a step."""
    network = expert()
    prepare_expert(network, replace(ADAPTER, dropout=0.0), seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in trained_parameters(network).values():
            nn.init.normal_(parameter, std=0.1)
    return network.train()


def test_memory_is_clean_at_timestep_zero_and_without_a_loss() -> None:
    network, of = Recorder(), batch()
    losses = OBJECTIVE(network, "high_noise", of)
    s = noise_level(of.u, expert="high_noise", boundary=0.9, shift=4.0).item()
    x, timestep, _, layout = network.seen
    assert layout == memory_cached(FRAMES, SLOTS, 5)
    assert torch.equal(x[:, :16, :FRAMES], of.x0[:, :, :FRAMES])
    torch.testing.assert_close(x[:, :16, FRAMES:], (1 - s) * of.x0[:, :, FRAMES:] + s * of.noise[:, :, FRAMES:])
    assert torch.equal(x[:, 16:], of.condition)
    assert timestep.tolist() == [pytest.approx(1000 * s)]
    expected = (of.noise - of.x0)[:, :, FRAMES:].square().mean()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "loss_memory" not in losses.sums


def test_without_memory_both_modes_are_the_same() -> None:
    joint = MemoryObjective(settings=VIDEO_ALONE, boundary=0.9, rope_stride=5)
    network = expert()
    ours, theirs = (objective(network, "low_noise", batch(0)).total for objective in (OBJECTIVE, joint))
    assert torch.equal(ours, theirs)


def test_training_computes_what_generation_computes() -> None:
    network, of = expert().eval(), batch()
    s = noise_level(of.u, expert="low_noise", boundary=0.9, shift=4.0)
    x0, noise = of.x0[:, :, FRAMES:], of.noise[:, :, FRAMES:]
    layout, cache = memory_cached(FRAMES, SLOTS, 5), SegmentCache()
    clean = torch.cat([of.x0, of.condition], dim=1)[:, :, :FRAMES]
    noisy = torch.cat([(1 - s) * x0 + s * noise, of.condition[:, :, FRAMES:]], dim=1)
    with torch.no_grad():
        network(clean, 0 * s, of.text, layout=layout.only(layout.constant), cache=cache)
        (prediction,) = network(noisy, 1000 * s, of.text, return_dict=False, layout=layout, cache=cache)
    expected = (prediction - (noise - x0)).square().mean()
    assert OBJECTIVE(network, "low_noise", of).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_reach_the_adapter_through_keys_and_values_of_memory() -> None:
    network = trained()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = output

        return hook

    names = ("to_q", "to_k", "to_v")
    for number, block in enumerate(network.blocks):
        for name in names:
            getattr(block.attn1, name).lora_B["memory"].register_forward_hook(keep(f"{number}.{name}"))
    OBJECTIVE(network, "high_noise", batch()).total.backward()
    of_memory = {name: output.grad[:, : FRAMES * TOKENS].abs().max().item() for name, output in seen.items()}
    last = len(network.blocks) - 1
    assert of_memory.pop(f"{last}.to_q") == 0, "queries of memory in the last block are not used"
    assert len(of_memory) == 2 * 3 - 1
    assert all(size > 0 for size in of_memory.values()), of_memory


def test_the_loss_feels_every_memory_latent() -> None:
    x0 = torch.randn(1, 16, FRAMES + SLOTS, 4, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    OBJECTIVE(expert(), "high_noise", batch(x0=x0)).total.backward()
    assert x0.grad is not None
    assert (x0.grad[:, :, :FRAMES] != 0).all()


@pytest.mark.parametrize("memory_frames", [0, FRAMES])
def test_checkpointing_changes_no_gradient(memory_frames: int) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        network = trained()
        if checkpointed:
            network.enable_gradient_checkpointing()
        OBJECTIVE(network, "high_noise", batch(memory_frames)).total.backward()
        return {name: p.grad for name, p in trained_parameters(network).items()}

    plain, again = gradients(False), gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_losses_keep_their_precision_under_autocast() -> None:
    network, of = Recorder(), batch()
    exact = OBJECTIVE(network, "high_noise", of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = OBJECTIVE(network, "high_noise", of)
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.total, exact.total)


# From settings to an adapter that is used


def test_a_loss_on_memory_is_refused(tmp_path: Path) -> None:
    message = r"objective\.memory_weight must be 0, not 0\.5"
    model = asdict(stories.MODEL) | {"memory_attention": "cached"}
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, config(tmp_path, model=model, objective={"memory_weight": 0.5}))
    with pytest.raises(ConfigError, match=r"runtime\.memory_cache: unknown key"):
        build_settings(TrainSettings, config(tmp_path, runtime={"device": "cpu", "memory_cache": "cpu"}))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_adapter_states_its_mode_and_is_refused_for_the_other(tmp_path: Path, checkpointed: bool) -> None:
    model = asdict(stories.MODEL) | {"memory_attention": "cached"}
    training = run(
        tmp_path / "run",
        model=model,
        steps=2,
        objective={"memory_weight": 0.0},
        parallel={"gradient_checkpointing": checkpointed},
    )
    training.trainer.run()
    training.finish()
    adapter = tmp_path / "run" / "storymem"

    def using(mode: Any) -> ModelSettings:
        weights = Weights(name="trained", source=str(adapter))
        return replace(stories.MODEL, memory_attention=mode, adapter=AdapterSettings(weights=weights))

    pipe = load_pipeline(using("cached"), runtime=CPU)
    assert pipe.config.memory_attention == "cached"
    with pytest.raises(ValueError, match=r"was trained for cached memory attention, not joint: set model\.memory_att"):
        load_pipeline(using("joint"), runtime=CPU)


def test_a_base_without_condition_channels_from_videos_to_a_sample_film(tmp_path: Path) -> None:
    model = asdict(test_ti2v.model())
    size = {"height": test_ti2v.HEIGHT, "width": test_ti2v.WIDTH}
    for number in range(3):
        video(tmp_path / "videos" / f"{number}.mp4", scene(number, 12, **size), caption="Tiles.")
    bucket = f"{{frames:{test_ti2v.FRAMES},height:{size['height']},width:{size['width']}}}"
    prepare(preparing.config(tmp_path, f"data.buckets=[{bucket}]") | {"model": model})
    (tmp_path / "story.yaml").write_text(stories.FOUR_SHOTS)
    values = config(
        tmp_path / "run",
        dataset=str(tmp_path / "set"),
        model=model,
        steps=1,
        conditioning="mi2v",
        objective={"memory_weight": 0.0},
        samples={"every": 1, "story": str(tmp_path / "story.yaml")},
    )
    train(values)
    assert (tmp_path / "run" / "samples" / "step_00000001.png").is_file()
    assert (tmp_path / "run" / "storymem" / "high_noise.safetensors").is_file()
