"""Two processes train what one trains with the double batch, whole or sharded; and they stop together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from storymem.training.checkpoints import Checkpoint, Checkpoints
from storymem.training.experts import make_accelerator
from storymem.training.run_settings import ParallelSettings
from tests.training import processes
from tests.training.tiny import BATCH, CPU, method, read_metrics, run, trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.training.processes", str(folder)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process_with_the_double_batch(folder: Path, strategy: str) -> None:
    alone = processes.gradients(ParallelSettings(), make_accelerator(CPU), size=4)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    for rank in range(processes.WORLD):
        close(load_file(folder / f"gradients_{strategy}_{rank}.safetensors"), alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_training_ends_where_one_process_ends(folder: Path, tmp_path: Path, strategy: str) -> None:
    alone = processes.trained(tmp_path, ParallelSettings(), make_accelerator(CPU), size=4)
    for rank in range(processes.WORLD):
        found = load_file(folder / f"trained_{strategy}_{rank}.safetensors")
        for name, tensor in alone.whole_parameters().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
    for kind in ("adapter", "average"):
        for file in sorted((tmp_path / "step_00000003" / kind).iterdir()):
            saved = load_file(folder / strategy / "step_00000003" / kind / file.name)
            expected = load_file(file)
            assert saved.keys() == expected.keys()
            assert all(saved[name].shape == tensor.shape for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_resumes_a_checkpoint_of_two(folder: Path, strategy: str) -> None:
    of = method("high_noise", "low_noise", adapter=processes.PLAIN)
    training = trainer(of, batch=replace(BATCH, size=4), optimizer=processes.AVERAGED, steps=processes.STEPS)
    checkpoints = Checkpoints(folder / strategy, keep=2)
    training.load(Checkpoint.read(checkpoints.path(2)))
    assert training.step == 2
    training.run()
    for name, tensor in load_file(folder / f"trained_{strategy}_0.safetensors").items():
        torch.testing.assert_close(of.parameters[name].detach(), tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Broken", "latents of clip clip1_0: NaN or infinite"), ("Huge", "the clips of this batch are clip1_0")],
)
def test_numbers_lost_on_one_process_stop_both(folder: Path, kind: str, message: str) -> None:
    printed = [(folder / f"{kind}_{rank}").read_text() for rank in range(processes.WORLD)]
    assert printed[0] == printed[1]
    assert message in printed[0]


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder: Path) -> None:
    printed = {(folder / f"stopped_{rank}").read_text() for rank in range(processes.WORLD)}
    assert printed == {"1 143"}


def test_a_sharded_run_validates_samples_and_exports_as_a_whole_one(folder: Path, tmp_path: Path) -> None:
    alone = run(
        tmp_path,
        steps=processes.STEPS,
        adapter=vars(processes.PLAIN),
        validation=processes.VALIDATION,
    )
    alone.trainer.run()
    alone.finish()
    for one, two in zip(read_metrics(tmp_path), read_metrics(folder / "run"), strict=False):
        for name in (name for name in one if "loss" in name and name != "loss_by_level"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)
    assert any("valid_loss_low_noise" in row for row in read_metrics(folder / "run"))
    assert (folder / "run" / "samples" / "step_00000003.png").is_file()
    for file in sorted((tmp_path / "storymem").iterdir()):
        assert load_file(folder / "run" / "storymem" / file.name).keys() == load_file(file).keys()
