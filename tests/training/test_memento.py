"""Training of Memento: which samples are drawn, what has a loss, where gradients go, and what is saved."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from storymem.config import ConfigError, build_settings
from storymem.training.experts import prepare_expert, trained_parameters
from storymem.training.objectives.memento import MementoBatch, MementoObjective, MementoSamples
from storymem.training.objectives.samples import Source, collate, samples_of
from storymem.training.objectives.settings import MementoObjectiveSettings
from storymem.training.settings import TrainSettings
from storymem.wan.keyframe_query import KeyframeQuery
from storymem.wan.lora import read_memory_lora
from storymem.wan.segments import memento
from storymem.wan.spec import A14B
from tests import stories
from tests.training.tiny import ADAPTER, BATCH, MemoryLatents, config, expert, latents, run, source

SETTINGS = MementoObjectiveSettings(local=2, whole=1, subject_probability=1.0, recent_probability=0.0)
NODE = {"_target_": "storymem.training.objectives.settings.MementoObjectiveSettings", "local": 2, "whole": 1}
EXPORT = ("storymem", "released")


def samples(settings: MementoObjectiveSettings = SETTINGS) -> MementoSamples:
    data = latents(groups=2, size=4)  # no caption is tagged
    return MementoSamples(settings, source(data, batch=BATCH, conditioning="mi2v", count=2))


def batch(step: int = 0, settings: MementoObjectiveSettings = SETTINGS) -> MementoBatch:
    drawn = samples(settings)
    return collate([drawn.read(plan) for plan in drawn.plan(step)])  # type: ignore[return-value]


def objective(settings: MementoObjectiveSettings = SETTINGS, mode: Any = "joint") -> MementoObjective:
    return MementoObjective(settings=settings, boundary=0.9, rope_stride=5, memory_attention=mode, spec=A14B)


def network(settings: MementoObjectiveSettings = SETTINGS) -> Any:
    """An expert with an adapter that is not zero, and a query, if the settings have one."""
    made = expert()
    prepare_expert(made, replace(ADAPTER, dropout=0.0), seed=0)
    settings.prepare(made, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in trained_parameters(made).items():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return made.train()


def test_targets_have_clips_before_them_and_candidates_are_in_their_order() -> None:
    drawn = samples()
    seen = set()
    for step in range(20):
        plans = drawn.plan(step)
        assert len({len(plan.pool) for plan in plans}) == 1
        for plan in plans:
            seen.add(plan.clip)
            assert all(place < 0 for place in plan.frames)
            assert list(plan.frames) == sorted(plan.frames)
            assert all(clip // 4 == plan.clip // 4 and clip < plan.clip for clip, _ in plan.pool)
            assert {(plan.clip - 1, 0), (plan.clip - 1, 1)} & set(plan.pool), "the clip before is among them"
            assert plan.subject is not None
    assert seen == {1, 2, 3, 5, 6, 7}
    assert drawn.plan(3) == samples().plan(3)
    recent = samples(replace(SETTINGS, recent_probability=1.0)).plan(0)
    assert all(clip == plan.clip - 1 for plan in recent for clip, _ in plan.pool)
    assert all(plan.subject is None for plan in recent)


@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_gradients_reach_the_adapter_and_through_the_choice_the_query(mode: Any) -> None:
    made = network()
    step = next(step for step in range(20) if len(samples().plan(step)[0].pool) > 3)
    losses = objective(mode=mode)(made, "high_noise", batch(step))
    losses.total.backward()
    assert losses.sums["memory_frames"][0] / losses.sums["memory_frames"][1] == 3
    grown = {name for name, parameter in trained_parameters(made).items() if parameter.grad.abs().max() > 0}
    assert {name for name in grown if name.startswith("keyframe_query.")} >= {
        "keyframe_query.queries",
        "keyframe_query.queries_global",
        "keyframe_query.memory_patcher.weight",
        "keyframe_query.query_to_visual.q.weight",
    }
    assert "blocks.0.attn1.to_q.lora_A.weight" in grown
    assert all(parameter.grad is None for parameter in made.parameters() if not parameter.requires_grad)


def test_the_subject_weighs_lambda() -> None:
    made, of = network(), batch()
    sums = objective()(made, "high_noise", of).sums
    half = objective(replace(SETTINGS, subject_weight=0.5))(made, "high_noise", of)
    video, subject = (sums[name][0] / sums[name][1] for name in ("loss_video", "loss_reconstruction"))
    torch.testing.assert_close(half.total.detach(), video + 0.5 * subject)


def test_with_cached_memory_the_subject_does_not_reach_the_video() -> None:
    made = network().eval()
    seen, text = torch.randn(1, 36, 6, 4, 6), torch.randn(1, 16, 16)
    times = torch.tensor([500.0])
    with torch.no_grad():
        layout = memento((-10, -5), 3, cached=True)
        both = made(seen, times, {"prompt": text, "subject": -text}, return_dict=False, layout=layout)[0]
        alone = memento((-10, -5), 3, cached=True, subject=False)
        without = made(seen[:, :, [0, 1, 3, 4, 5]], times, text, return_dict=False, layout=alone)[0]
    torch.testing.assert_close(both[:, :, 3:], without[:, :, 2:])
    assert layout.constant == {"memory"}


def test_a_run_saves_the_query_with_the_adapter_and_resumes_the_same(tmp_path: Path) -> None:
    data = latents(groups=1, size=4, valid=0)
    options = {"objective": NODE, "export": EXPORT, "steps": 4, "conditioning": "mi2v"}
    whole = run(tmp_path / "whole", data, **options, checkpoint={"every": 2, "keep": 2})
    whole.trainer.run()
    whole.finish()
    networks = whole.method.experts.transformers
    for name in reversed(EXPORT):
        adapter = read_memory_lora(networks, tmp_path / "whole" / name)["high_noise"]
        assert adapter.info.objective == "memento"
        saved = KeyframeQuery.from_tensors(adapter.query(), networks["high_noise"], where=name)
        with whole.trainer.averaged():
            assert torch.equal(saved.queries, whole.trainer.parameters["high_noise/keyframe_query.queries"])
    start = asdict(replace(ADAPTER, start=str(tmp_path / "whole" / "storymem")))
    onward = run(tmp_path / "onward", data, **options, adapter=start)
    assert torch.equal(onward.trainer.parameters["high_noise/keyframe_query.queries"], saved.queries)

    (tmp_path / "whole" / "checkpoints" / "step_00000004").rename(tmp_path / "later")
    resumed = run(tmp_path / "whole", data, **options, checkpoint={"every": 2, "keep": 2})
    assert resumed.trainer.step == 2
    resumed.trainer.run()
    for name, parameter in whole.trainer.parameters.items():
        assert torch.equal(parameter, resumed.trainer.parameters[name]), name


class Fingerprinted(MemoryLatents):
    fingerprint = {"vae": "drawn", "text_encoder": "drawn"}  # noqa: RUF012


def test_the_global_queries_read_the_caption_of_the_whole_film(tmp_path: Path) -> None:
    clips = latents(groups=1, size=3, valid=0).clips
    data = Fingerprinted(tuple(replace(clip, caption=f"global caption: A; shot caption: {clip.id}") for clip in clips))
    node = NODE | {"recent_probability": 0.0}
    training = run(tmp_path, data, objective=node, export=EXPORT, steps=1, conditioning="mi2v")
    training.trainer.run()
    settings: Any = training.settings
    encodings = training._encodings(data)  # type: ignore[arg-type]
    drawn = samples_of(settings.objective)(
        settings.objective, Source(train=settings, latents=data, encodings=encodings, count=1)
    )  # type: ignore[arg-type]
    first = drawn.read(drawn.plan(0)[0])
    assert first.caption.shape == first.text.shape
    assert not torch.equal(first.caption, first.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export": ("storymem", "comfyui")}, "comfyui cannot hold a KeyframeQuery"),
        ({"samples": {"every": 5, "story": "x"}}, "no film can be sampled while memento is trained"),
        ({"adapter": None}, "trains an adapter"),
        ({"parallel": {"strategy": "fsdp"}}, "use parallel.strategy=ddp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = config(tmp_path, **{"objective": NODE, "export": EXPORT, "model": asdict(stories.MODEL)} | changes)
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, values)
