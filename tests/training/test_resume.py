"""Resuming a run: from a damaged folder, with other settings, or in a folder of another kind."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from storymem.config import build_settings
from storymem.io import FileError, NotFiniteError
from storymem.training.checkpoints import Checkpoints
from storymem.training.resume import check_run_folder
from storymem.training.run import train
from storymem.training.run_log import RunLog
from storymem.training.run_settings import LogSettings
from storymem.training.session import Run
from storymem.training.settings import TrainSettings
from storymem.training.trainer import StepReport, Trainer
from tests.training.tiny import ADAPTER, BATCH, Huge, config, latents, read_metrics, run

CHANGES: dict[str, Any] = {"expert": "high", "optimizer": {"lr": 0.01, "warmup_steps": 0}}


def finished(folder: Path, **changes: Any) -> Run:
    ready = run(folder, **CHANGES | changes)
    ready.trainer.run()
    ready.finish()
    return ready


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "storymem" / "high_noise.safetensors")


def equal(one: Path, other: Path) -> bool:
    mine, theirs = adapter(one), adapter(other)
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints after 2, 4 and 6, which has not been exported."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(folder, **CHANGES, checkpoint={"every": 2, "keep": 3}).trainer.run()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, resumed to 8 steps and finished."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finished(folder, steps=8)
    return folder


def copy(begun: Path, folder: Path) -> Path:
    shutil.copytree(begun, folder / "run")
    return folder / "run"


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x01" + path.read_bytes()[-8:]),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: [path.unlink(), os.mkdir(path)],  # type: ignore[func-returns-value]
    "a list": lambda path: path.write_text("[1, 2]"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe{"),
    "another step": lambda path: path.write_text('{"format": 1, "step": "-3", "files": {}, "about": {}, "state": {}}'),
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("checkpoint.json", damage) for damage in DAMAGES),
        *(("optimizer.safetensors", damage) for damage in ("one bit", "missing", "a folder")),
        *(("adapter/high_noise.safetensors", damage) for damage in ("truncated", "one bit")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    begun: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture, file: str, damage: str
) -> None:
    folder = copy(begun, tmp_path)
    DAMAGES[damage](folder / "checkpoints" / "step_00000006" / file)
    finished(folder, steps=8, checkpoint={"every": 2, "keep": 2})
    printed = capsys.readouterr().err
    assert re.search(r"step_00000006 is damaged .* is skipped: \S*step_00000006/", printed), printed
    assert "resuming after step 4" in printed
    assert equal(folder, whole)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    assert checkpoints.steps()[-2:] == [6, 8]
    assert checkpoints.newest() is not None


def test_if_all_checkpoints_are_damaged_all_are_named(begun: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    for path in folder.glob("checkpoints/*/optimizer.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(FileError, match=r"(?s)step_00000006.*step_00000004.*step_00000002.*from a backup.*output"):
        run(folder, **CHANGES)
    assert len(list(folder.glob("checkpoints/*"))) == 3


def test_damaged_settings_are_written_again(begun: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    values = config(folder, **CHANGES)
    for content in (b"", b"steps: [", b"\xff\xff", b"- a\n", b"[" * 2_000):
        (folder / "config.yaml").write_bytes(content)
        assert check_run_folder(folder, build_settings(TrainSettings, values), values)
    run(folder, **CHANGES)
    assert yaml.safe_load((folder / "config.yaml").read_text())["expert"] == "high"
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.yaml").write_text("")
    with pytest.raises(FileError, match=r"there is no checkpoint of a run in it .*: choose another output"):
        check_run_folder(folder, build_settings(TrainSettings, values), values)


def test_damaged_rows_are_reported_and_copied(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copy(begun, tmp_path)
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    bad = [b"garbage", b"[]", b'{"step": "two"}', b'{"step": -1}', b'{"step": NaN}', b"\xff", b"{" * 50_000]
    damaged = b"\n".join([lines[0], *bad, *lines[1:-1], b'{"step": 6, "lo'])
    (folder / "metrics.jsonl").write_bytes(damaged)
    run(folder, **CHANGES)
    assert "lines 2, 3, 4, 5, 6, 7, 8 are no rows" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert (folder / "metrics.damaged-1.jsonl").read_bytes() == damaged


def test_a_checkpoint_with_files_of_the_user_stays(begun: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    (folder / "checkpoints" / "step_00000002" / "notes.txt").write_text("the best so far")
    elsewhere = tmp_path / "elsewhere"
    (folder / "checkpoints" / "step_00000004").rename(elsewhere)
    (folder / "checkpoints" / "step_00000004").symlink_to(elsewhere)
    (folder / "checkpoints" / ".step_00000008.partial" / "adapter").mkdir(parents=True)
    finished(folder, steps=8, checkpoint={"every": 2, "keep": 1})
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000008"]
    assert (elsewhere / "checkpoint.json").exists()


# --- other settings -------------------------------------------------------------------------------------------------


def test_changed_optimizer_settings_are_reported(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copy(begun, tmp_path)
    optimizer = {"lr": 0.001, "warmup_steps": 0, "max_grad_norm": 0.5}
    taken = run(folder, **CHANGES | {"optimizer": optimizer}, steps=7)
    printed = capsys.readouterr().err
    assert "resuming after step 6, with changes:" in printed
    assert "optimizer.lr: 0.01 before, 0.001 now" in printed
    assert "optimizer.max_grad_norm: nothing before, 0.5 now" in printed
    assert (
        "the learning rate of step 7 is 0.001, and would have been 0.01; to keep the old rate, write optimizer.lr=0.01"
        in printed
    )
    taken.trainer.run()
    assert read_metrics(folder)[-1]["lr"] == 0.001


def test_a_longer_schedule_is_reported_and_the_advice_keeps_the_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    optimizer = {"lr": 0.01, "warmup_steps": 0, "schedule": "cosine"}

    def rate(folder: Path, **changes: Any) -> float:
        run(folder, expert="high", steps=6, optimizer=optimizer, checkpoint={"every": 4, "keep": 2}).trainer.run()
        shutil.rmtree(folder / "checkpoints" / "step_00000006")
        later: dict[str, Any] = {"expert": "high", "steps": 6, "optimizer": optimizer} | changes
        run(folder, **later).trainer.run()
        return read_metrics(folder)[4]["lr"]

    planned = rate(tmp_path / "planned")
    assert "learning rate" not in capsys.readouterr().err
    longer = rate(tmp_path / "longer", steps=20)
    printed = capsys.readouterr().err
    assert re.search(
        r"rate of step 5 is 0.0090\d, and would have been 0.0025 \(schedule=cosine, steps: 6 before, 20 now\)", printed
    )
    lr = float(re.search(r"to keep the old rate, write optimizer.lr=(\S+)", printed)[1])  # type: ignore[index]
    kept = rate(tmp_path / "kept", steps=20, optimizer=optimizer | {"lr": lr})
    assert (kept, longer) == (pytest.approx(planned, rel=0.01), pytest.approx(0.0090, rel=0.01))


def test_a_step_keeps_its_samples_however_they_are_cut(begun: Path, whole: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    one = asdict(replace(BATCH, size=1))
    with pytest.raises(
        ValueError, match=r"has 2 samples, and now it would have 1 .*write (batch.size=1 batch.acc\S+=2)"
    ):
        run(folder, **CHANGES, batch=one)
    finished(folder, **CHANGES, steps=8, batch=one | {"accumulation": 2})
    for mine, theirs in zip(read_metrics(folder)[6:], read_metrics(whole)[6:], strict=True):
        assert mine["memory_frames"] == theirs["memory_frames"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # dropout is another


def test_fewer_steps_than_were_done_are_refused(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at step 6 already: write steps=6 or more, or choose another output"):
        run(copy(begun, tmp_path), **CHANGES, steps=5)


@pytest.mark.parametrize("change", [{"seed": 1}, {"adapter": asdict(replace(ADAPTER, dropout=0.0))}])
def test_another_run_can_begin_from_what_this_one_has_learnt(
    begun: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = copy(begun, tmp_path)
    values = config(folder, **CHANGES, **change)
    with pytest.raises(
        ValueError, match=r"(?s)cannot be resumed with.*another output; to start .* adapter.start="
    ) as refusal:
        check_run_folder(folder, build_settings(TrainSettings, values), values)
    start = re.search(r"adapter\.start=(\S+)", str(refusal.value))[1]  # type: ignore[index]
    learnt = load_file(Path(start) / "high_noise.safetensors")
    settings = values["adapter"] | {"start": start}
    again = run(tmp_path / "new", **CHANGES, **change | {"adapter": settings})
    for name, tensor in again.trainer.whole_parameters().items():
        assert torch.equal(tensor, learnt[name.partition("/")[2]])


def test_another_training_set_is_reported(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(copy(begun, tmp_path), data=latents(groups=3), **CHANGES)
    assert "the training set is not the one of the steps before" in capsys.readouterr().err


# --- numbers that are lost ------------------------------------------------------------------------------------------


def test_the_advice_after_a_lost_loss_works(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(NotFiniteError) as lost:
        run(tmp_path, data=Huge(latents().clips), **CHANGES, steps=50, checkpoint={"every": 1, "keep": 2}).trainer.run()
    lr = float(re.search(r"same command with optimizer\.lr=(\S+) resumes", str(lost.value))[1])  # type: ignore[index]
    finished(tmp_path, steps=12, optimizer=CHANGES["optimizer"] | {"lr": lr})
    assert "resuming after step" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))
    assert read_metrics(tmp_path)[-1]["lr"] == lr == pytest.approx(0.0025)


def spoil(trainer: Trainer, report: StepReport) -> None:
    if report.step == 5:
        with torch.no_grad():
            next(iter(trainer.parameters.values()))[0, 0] = float("nan")


def test_lost_parameters_are_never_saved_nor_exported(tmp_path: Path) -> None:
    ready = run(tmp_path, **CHANGES, checkpoint={"every": 5, "keep": 2}, steps=5)
    ready.trainer.callbacks.append(spoil)
    with pytest.raises(NotFiniteError, match=r"after step 5, high_noise/\S+: NaN .* nothing of it was saved"):
        ready.trainer.run()
    with pytest.raises(NotFiniteError, match="after step 5"):
        ready.finish()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_log_has_null_for_what_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = RunLog(tmp_path, LogSettings(wandb="disabled"))
    log.begin({})
    for step in (1, 2):
        log.row(step, {"loss": float("nan"), "by": [1.0, float("inf"), None], "lr": 0.1})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path)[0] == {"step": 1, "loss": None, "by": [1.0, None, None], "lr": 0.1}
    assert capsys.readouterr().err.count("loss is nan: written as null") == 1


# --- folders of another kind ----------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("content", ["notes.txt", "film.json", "checkpoints/step_00000001/mine", "config.yaml"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "mine"
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text("a: 1")
    before = _files(folder)
    with pytest.raises(ValueError, match=rf"{folder}.*choose another output"):
        train(config(folder, **CHANGES))
    assert _files(folder) == before


def test_a_file_where_a_folder_must_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is not a folder"):
        train(config(tmp_path / "file", **CHANGES))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "storymem").write_text("")
    with pytest.raises(FileError, match="run/storymem is not a folder"):
        train(config(tmp_path / "run", **CHANGES))


def test_an_export_replaces_its_own_files_alone(begun: Path, whole: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    finished(folder)
    (folder / "storymem" / "notes.txt").write_text("mine")
    finished(folder, steps=8)
    assert equal(folder, whole)
    assert (folder / "storymem" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", r"start does not exist"),
        ("rank", r"has rank=4, and the settings have adapter.rank=8: write adapter.rank=4"),
        ("truncated", r"high_noise.safetensors"),
        ("empty", r"no adapter file"),
        ("another network", r"high_noise.safetensors"),
    ],
)
def test_an_adapter_to_start_from_that_does_not_fit_is_refused_before_anything_is_touched(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, message: str
) -> None:
    start = tmp_path / "start"
    if wrong != "missing":
        shutil.copytree(begun / "checkpoints" / "step_00000006" / "adapter", start)
    file = start / "high_noise.safetensors"
    settings = asdict(ADAPTER) | {"start": str(start)}
    if wrong == "rank":
        settings["rank"] = 8
    elif wrong == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif wrong == "empty":
        file.unlink()
    elif wrong == "another network":
        save_file({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 5)}, file)
    monkeypatch.setattr("storymem.training.session.open_cache", lambda _: latents())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config(tmp_path / "run", **CHANGES, adapter=settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        *("optimizer.lr=nan", "optimizer.lr=inf", "optimizer.lr=-1", "optimizer.lr=2", "optimizer.betas=[0.9,1.0]"),
        *("optimizer.weight_decay=nan", "optimizer.warmup_steps=1000000000", "steps=1000000000", "seed=-1"),
        *(
            "adapter.rank=100000",
            "adapter.alpha=inf",
            "batch.size=1000000",
            "batch.workers=100000",
            "checkpoint.keep=0",
        ),
        *("objective.shift=nan", "objective.bins=10000000", "validation.samples=0"),
    ],
)
def test_settings_beyond_sense_are_refused(tmp_path: Path, wrong: str) -> None:
    from tests.composing import composed

    key = wrong.partition("=")[0].rpartition(".")[2]
    values = composed("model=tiny", f"dataset={tmp_path}", f"output={tmp_path / 'run'}", wrong, name="train")
    with pytest.raises(ValueError, match=key):
        train(values)
    assert not (tmp_path / "run").exists()
