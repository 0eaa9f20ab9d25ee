"""The loop: what it trains, what it saves, how it stops and resumes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from storymem.config import ConfigError, build_settings
from storymem.data.cache import LatentCache
from storymem.io import NotFiniteError
from storymem.stopping import Stopped
from storymem.training.checkpoints import Checkpoints
from storymem.training.experts import make_accelerator, prepare_expert
from storymem.training.optimization import MovingAverage
from storymem.training.resume import check_run_folder
from storymem.training.run import train
from storymem.training.run_settings import ParallelSettings
from storymem.training.session import open_cache
from storymem.training.settings import TrainSettings
from storymem.training.trainer import StepReport, Trainer
from tests import stories
from tests.training.tiny import (
    ADAPTER,
    BATCH,
    CPU,
    OPTIMIZER,
    Broken,
    Huge,
    MemoryLatents,
    config,
    expert,
    latents,
    method,
    read_metrics,
    run,
    trainer,
)


def test_the_loss_falls_on_a_set_seen_again_and_again() -> None:
    of = method("high_noise", adapter=replace(ADAPTER, rank=32, alpha=32.0, dropout=0.0), width=48)
    training = trainer(
        of,
        data=latents(groups=1, size=2, keyframes=1),
        batch=replace(BATCH, size=4, max_memory=1),
        steps=60,
        optimizer=replace(OPTIMIZER, lr=3e-3),
    )
    # The same batches before and after, with noise that training does not see.
    unseen = list(islice(training._batches(1000), 6))
    before = [of.evaluate("high_noise", batch).total.item() for batch in unseen]
    training.run()
    after = [of.evaluate("high_noise", batch).total.item() for batch in unseen]
    assert all(later < 0.9 * sooner for sooner, later in zip(before, after, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_gets_gradients_and_optimizer_state(checkpointing: bool) -> None:
    of = method("high_noise", parallel=ParallelSettings(gradient_checkpointing=checkpointing))
    training = trainer(of, steps=1)
    transformer = of.experts.transformers["high_noise"]
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    batch = next(training._batches(0))
    network = of.network(0)
    training.accelerator.backward(of.loss(0, batch).total)
    with_gradient = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name in before if ".lora_" in name}
    assert len(with_gradient) == 2 * 10 * 2  # matrices, linears, blocks
    # Checkpointing that cuts the graph loses the first block first. At the start only B has one: A is times B = 0.
    first = transformer.blocks[0]
    for linear in (first.attn1.to_q, first.attn2.to_k, first.ffn.net[2]):
        assert linear.lora_B["memory"].weight.grad.abs().max() > 0
    network.zero_grad()
    training.run()
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
    assert set(map(id, training.optimizer.state)) == set(map(id, of.parameters.values()))


def test_checkpointing_and_accumulation_change_no_gradient() -> None:
    adapter = replace(ADAPTER, dropout=0.0)

    def trained(parallel: ParallelSettings, **changes: Any) -> dict[str, torch.Tensor]:
        training = trainer(method("high_noise", adapter=adapter, parallel=parallel), batch=replace(BATCH, **changes))
        training.run()
        return training.whole_parameters()

    plain = trained(ParallelSettings(), size=4)
    for other in (
        trained(ParallelSettings(gradient_checkpointing=True), size=4),
        trained(ParallelSettings(), size=2, accumulation=2),
    ):
        for name, tensor in plain.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_precision_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        training = trainer(method("high_noise"), steps=2)
        training.run()
        return training.whole_parameters()

    before = trained()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch sets it by its own configuration
    after = trained()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(ValueError, match=r"mixed_precision=bf16.*train in a process of its own"):
            make_accelerator(CPU)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_experts_take_turns() -> None:
    of = method("high_noise", "low_noise", parallel=ParallelSettings(alternate_every=2))
    assert [of.turn(step) for step in range(6)] == [
        *["high_noise"] * 2,
        *["low_noise"] * 2,
        *["high_noise"] * 2,
    ]
    start = {name: p.detach().clone() for name, p in of.parameters.items()}
    training = trainer(of, steps=2, optimizer=replace(OPTIMIZER, ema_decay=0.5))
    training.run()
    assert training.average is not None
    for name, parameter in of.parameters.items():
        moved = name.startswith("high_noise") and ".lora_B" in name
        assert torch.equal(parameter, start[name]) != moved or ".lora_A" in name
        assert (training.average.updates[name] == 2) == name.startswith("high_noise")


@pytest.mark.parametrize("which", ["high", "both"])
def test_a_resumed_run_gives_the_same_losses(tmp_path: Path, which: str) -> None:
    """Dropout, warm-up, average and turns included; the second half is another process's for all that it knows."""
    whole = run(tmp_path / "whole", expert=which)
    whole.trainer.run()
    whole.finish()

    class Killed(Exception):
        pass

    def kill(trainer: Trainer, report: StepReport) -> None:
        if report.step == 5:
            raise Killed

    first = run(tmp_path / "halves", expert=which)
    first.trainer.callbacks.append(kill)
    with pytest.raises(Killed):
        first.trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path / "halves")] == [1, 2, 3, 4, 5]
    second = run(tmp_path / "halves", expert=which)
    assert second.trainer.step == 3
    assert [row["step"] for row in read_metrics(tmp_path / "halves")] == [1, 2, 3]
    second.trainer.run()
    second.finish()

    def printed(folder: Path) -> list[dict[str, Any]]:
        timed = ("seconds_", "samples_per_second", "peak_gb")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(tmp_path / folder)]

    assert printed(Path("halves")) == printed(Path("whole"))
    for file in sorted((tmp_path / "whole" / "storymem").iterdir()):
        one, other = load_file(file), load_file(tmp_path / "halves" / "storymem" / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_last_step_and_ends(tmp_path: Path, number: signal.Signals) -> None:
    def send(trainer: Trainer, report: StepReport) -> None:
        if report.step == 2:
            # A launcher passes on what a terminal or a cluster has sent to the whole group already.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    checkpoints = Checkpoints(tmp_path, keep=2)
    batch = replace(BATCH, workers=1)
    training = trainer(method("high_noise"), batch=batch, checkpoints=checkpoints, callbacks=[send], steps=20)
    with pytest.raises(Stopped) as stopped:
        training.run()
    assert stopped.value.status == 128 + number
    assert checkpoints.steps() == [2]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Broken, r"step (\d+): latents of clip clip1_0: NaN or infinite values; draw them again"),
        (Huge, r"step (\d+): the loss is (?:inf|nan); .*clip1_0.* optimizer\.lr=0\.0025"),
    ],
)
def test_lost_numbers_stop_the_run_name_the_clips_and_are_not_saved(
    tmp_path: Path, broken: type[MemoryLatents], message: str, workers: int
) -> None:
    batch = replace(BATCH, workers=workers)
    data, checkpoints = broken(latents().clips), Checkpoints(tmp_path, keep=9)
    of = method("high_noise")
    training = trainer(of, data=data, checkpoints=checkpoints, checkpoint_every=1, steps=50, batch=batch)
    with pytest.raises(NotFiniteError, match=message) as stopped:
        training.run()
    reached = int(str(stopped.value).split()[1].rstrip(":"))
    assert checkpoints.steps() == list(range(1, reached))
    assert all(parameter.isfinite().all() for parameter in of.parameters.values())


def test_lost_gradients_of_a_finite_loss_stop_the_run_and_kernels_are_named() -> None:
    of = method("high_noise")
    next(iter(of.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NotFiniteError, match=r"step 1: the norm of the gradients is nan; .* model\.dtype=float32 uses"):
        trainer(of, steps=2).run()
    assert all(parameter.isfinite().all() for parameter in of.parameters.values())


def test_the_moving_average_follows_and_changes_places() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage({"p": parameter}, decay=0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(["p"])
    assert average.values["p"].tolist() == pytest.approx([1 - 2 / 11] * 3)  # warm-up: (1 + 1) / (10 + 1)
    for _ in range(500):
        average.update(["p"])
    assert average.values["p"].tolist() == pytest.approx([1.0] * 3)
    with torch.no_grad():
        parameter.fill_(5.0)
    with average.in_place():
        assert parameter.tolist() == pytest.approx([1.0] * 3)
    assert parameter.tolist() == [5.0] * 3
    assert average.values["p"].tolist() == pytest.approx([1.0] * 3)


def test_the_run_folder_holds_everything(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(stories.FOUR_SHOTS)
    samples = {"every": 2, "story": str(tmp_path / "story.yaml")}
    validation = {"every": 2, "samples": 3}
    ready = run(
        tmp_path / "run",
        steps=2,
        samples=samples,
        validation=validation,
        conditioning="mi2v",
        export=["storymem", "comfyui"],
    )
    ready.trainer.run()
    ready.finish()
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "storymem", "comfyui"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 2
    rows: dict[str, Any] = {}
    for row in read_metrics(folder):
        rows |= row
    assert {"loss", "loss_by_level", "lr", "grad_norm", "samples_per_second", "peak_gb"} <= rows.keys()
    assert {"valid_loss_high_noise", "valid_loss_low_noise"} <= rows.keys()
    assert -1 <= rows["cross_shot"] <= 1
    from storymem.media.images import read_image

    assert read_image(folder / "samples" / "step_00000002.png").shape == (4 * 32, 4 * 48, 3)
    assert len(list((folder / "samples" / "step_00000002" / "shots").glob("*/take_001.mp4"))) == 4


def test_the_seconds_of_a_step_are_those_of_training(tmp_path: Path) -> None:
    ready, seconds = run(tmp_path, expert="high", steps=3), []
    ready.trainer.callbacks.append(lambda trainer, report: seconds.append(report.seconds))
    ready.trainer.run()
    rows = [row for row in read_metrics(tmp_path) if "seconds_step" in row]
    assert [row["seconds_step"] for row in rows] == seconds
    assert [row["samples_per_second"] for row in rows] == [pytest.approx(2 / one) for one in seconds], (
        "of a batch of two"
    )


def test_validation_is_the_same_each_time_and_moves_with_the_adapter(tmp_path: Path) -> None:
    ready = run(tmp_path, validation={"every": 5, "samples": 3}, expert="low")
    validation = ready.trainer.callbacks[1]
    before, again = validation.losses(ready.trainer), validation.losses(ready.trainer)  # type: ignore[attr-defined]
    assert before == again
    ready.trainer.run()
    assert validation.losses(ready.trainer) != before  # type: ignore[attr-defined]


def test_the_loss_of_the_video_does_not_depend_on_weights(tmp_path: Path) -> None:
    def losses(weight: float) -> dict[str, float]:
        ready = run(
            tmp_path / f"{weight}",
            validation={"every": 5, "samples": 3},
            expert="low",
            objective={"memory_weight": weight},
        )
        return ready.trainer.callbacks[1].losses(ready.trainer)  # type: ignore[attr-defined]

    both, video = losses(1.0), losses(0.0)
    assert video["valid_video_loss_low_noise"] == pytest.approx(video["valid_loss_low_noise"])
    assert both["valid_video_loss_low_noise"] == pytest.approx(video["valid_video_loss_low_noise"])
    assert both["valid_loss_low_noise"] != pytest.approx(video["valid_loss_low_noise"], rel=1e-3)


def test_the_loss_of_the_subject_is_logged_with_masks(tmp_path: Path) -> None:
    ready = run(tmp_path, validation={"every": 5, "samples": 4}, expert="low", objective={"mask_weight": 4.0})
    plain = run(tmp_path / "plain", validation={"every": 5, "samples": 4}, expert="low")
    weighted, before = (one.trainer.callbacks[1].losses(one.trainer) for one in (ready, plain))  # type: ignore[attr-defined]
    assert weighted["valid_video_loss_low_noise"] == pytest.approx(before["valid_video_loss_low_noise"])
    assert weighted["valid_loss_low_noise"] != before["valid_loss_low_noise"]
    assert weighted["valid_subject_loss_low_noise"] != pytest.approx(before["valid_video_loss_low_noise"], rel=1e-4)
    assert "valid_subject_loss_low_noise" not in before
    ready.trainer.run()


def test_wandb_offline_writes_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ready = run(tmp_path, expert="high", steps=1, log={"every": 1, "wandb": "offline"})
    ready.trainer.run()
    ready.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_each_run_of_a_process_has_its_own_device() -> None:
    names = ["cpu", "meta", "cpu"]
    assert [make_accelerator(torch.device(name)).device.type for name in names] == names


def test_the_adapter_is_float32_on_a_bfloat16_base() -> None:
    transformer = expert().to(torch.bfloat16)
    prepare_expert(transformer, ADAPTER, seed=0)
    dtypes = {name: p.dtype for name, p in transformer.named_parameters() if p.requires_grad}
    assert set(dtypes.values()) == {torch.float32}
    assert transformer.dtype == torch.bfloat16


def test_a_run_can_begin_from_an_adapter_of_its_own_rank(tmp_path: Path) -> None:
    of = method("high_noise")
    trainer(of).run()
    trained = {name: p.detach().clone() for name, p in of.parameters.items()}
    of.save(trained, tmp_path)
    start = replace(ADAPTER, start=str(tmp_path))
    for name, parameter in method("high_noise", adapter=start).parameters.items():
        assert torch.equal(parameter, trained[name])


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    ours = config(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(ours))))
    check_run_folder(tmp_path, build_settings(TrainSettings, ours), ours)
    longer = ours | {"steps": 99}
    check_run_folder(tmp_path, build_settings(TrainSettings, longer), longer)
    other = ours | {"seed": 1}
    with pytest.raises(ValueError, match=r"seed: 0 before, 1 now"):
        check_run_folder(tmp_path, build_settings(TrainSettings, other), other)
    never = ours | {"resume": "never"}
    with pytest.raises(ValueError, match="holds a run: choose another output"):
        check_run_folder(tmp_path, build_settings(TrainSettings, never), never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"rank": 0}}, "rank must be 1 or more"),
        ({"batch": {"text_dropout": 1.5}}, "text_dropout must be 1 or less"),
        ({"batch": {"max_memori": 3}}, "did you mean 'max_memory'"),
        ({"objective": {"shift": 0}}, "shift must be 1e-12 or more"),
        ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule"),
        ({"samples": {"every": 5}}, "story must name a story file"),
        ({"export": ["storymem", "storymem"]}, "each once"),
        ({"runtime": {"offload": "group"}}, "runtime.offload: unknown key"),
    ],
)
def test_mistakes_in_settings_are_reported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, config(tmp_path, **change))


def test_frames_that_are_not_4n_plus_1_are_refused(tmp_path: Path) -> None:
    values = config(tmp_path)
    values["model"]["video"]["frames"] = 10
    with pytest.raises(ConfigError, match=r"model: a shot has 4n \+ 1 frames, not 10: the nearest are 9 and 13"):
        build_settings(TrainSettings, values)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[MemoryLatents], None]:
    """Lets a training set in memory be what a run opens."""
    return lambda data: monkeypatch.setattr(LatentCache, "open", lambda *_, **__: data)


def test_a_cache_of_another_size_is_refused(tmp_path: Path, opened: Callable[[MemoryLatents], None]) -> None:
    values = config(tmp_path)
    values["model"]["video"] |= {"height": 64}
    opened(latents())
    with pytest.raises(ValueError, match=r"holds clips of 9x32x48 .* none of them of the model's 9x64x48"):
        open_cache(build_settings(TrainSettings, values))


def test_masks_with_a_weight_must_exist(tmp_path: Path, opened: Callable[[MemoryLatents], None]) -> None:
    settings = build_settings(TrainSettings, config(tmp_path, objective={"mask_weight": 2.0}))
    bare = replace(latents(), clips=tuple(replace(clip, mask=clip.split == "valid") for clip in latents().clips))
    opened(bare)
    with pytest.raises(ValueError, match=r"mask_weight=2, but .* has no masks: run prepare_data with masks=FOLDER"):
        open_cache(settings)
    open_cache(build_settings(TrainSettings, config(tmp_path)))
    opened(latents())
    open_cache(settings)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, opened: Callable[[MemoryLatents], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    values = config(folder, dry_run=True)
    opened(latents())
    assert train(values) == folder
    trains, data, steps, vram, disk, *writes = capsys.readouterr().out.splitlines()
    real = run(tmp_path / "real").trainer.parameters
    count = sum(parameter.numel() for parameter in real.values())
    trained = f"trains   an adapter of rank 4 ({count:,} parameters) of test, high_noise and low_noise, for memory"
    assert trains == trained
    assert data == "data     6 clips in 2 groups, 9x32x48 (frames x height x width), in in memory"
    assert steps == "steps    6, each of 2 samples (batch.size=2 x batch.accumulation=1 x 1 process)"
    assert vram.startswith("VRAM     0.0")
    assert disk.endswith(f" in {folder}")
    names = ("config.yaml", "metrics.jsonl", "checkpoints", "storymem")
    assert [line.split()[1] for line in writes] == [str(folder / name) for name in names]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"strategy": "fsdp"}}, "torchrun"),
        ({"runtime": {"device": "cuda:77"}}, "runtime.device=cuda:77 cannot be used here"),
        ({"memory": {"recall": {"_target_": "builtins.dict"}, "selector": {}}}, "memory.selector names no class"),
        (
            {"memory": {"recall": {"_target_": "builtins.dict"}, "selector": {"_target_": "builtins.dict"}}},
            "memory.recall: builtins.dict has no capacity and no recall",
        ),
    ],
)
def test_a_dry_run_reports_mistakes_that_a_run_finds_later(
    tmp_path: Path, opened: Callable[[MemoryLatents], None], change: dict[str, Any], message: str
) -> None:
    story = stories.story(tmp_path, stories.TWO_SHOTS)
    samples = {"every": 3, "story": str(tmp_path / "story.yaml")}
    opened(latents())
    assert story.shots
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", dry_run=True, samples=samples, **change))
    assert not (tmp_path / "run").exists()


def test_what_cannot_run_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun"):
        run(tmp_path, parallel={"strategy": "fsdp"})
