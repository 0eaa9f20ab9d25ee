"""What a run's folder holds, and whether a run with these settings can resume it. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storymem.config import build_settings
from storymem.film.differences import differences
from storymem.io import FileError, read_yaml
from storymem.training.checkpoints import Checkpoint, Checkpoints
from storymem.training.run_settings import OptimizerSettings
from storymem.training.settings import TrainSettings
from storymem.wan.processes import Launch

CONFIG, CHECKPOINTS, SAMPLES, MODEL = "config.yaml", "checkpoints", "samples", "model"
ENCODINGS = "encodings-"  # beginning of files that are written first, see training/objectives/encodings.py
#: What may change when a run resumes: where it runs, how long, and what is done besides training.
_FREE = (
    *("output", "resume", "steps", "runtime", "export", "dataset", "dry_run"),
    *("parallel", "checkpoint", "validation", "samples", "log", "scorer", "memory", "sampler"),
)
_FREE_OF_BATCH = ("size", "accumulation", "workers")  # the samples of a step are compared instead


def check_run_folder(folder: Path, settings: TrainSettings, config: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a checkpoint of this run; ``ValueError`` if it holds another run, or anything else."""
    for name in ("", CHECKPOINTS, SAMPLES, MODEL, *settings.export):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise FileError(f"{folder / name} is not a folder, as it must be for a training: choose another output")
    if not folder.exists():
        return False
    newest = Checkpoints(folder / CHECKPOINTS, keep=settings.checkpoint.keep).newest_readable()
    before = _recorded(folder) if newest is None else newest.about["config"]
    if before is None:
        return False
    if settings.resume == "never":
        raise ValueError(f"{folder} holds a run: choose another output, or resume it with resume=auto")
    if newest is not None:
        check_same_run(newest, settings, config, processes=Launch.of_environment().world)
    elif changed := _essential_changes(before, config):
        raise ValueError(_refusal(folder, changed))
    return newest is not None


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in ``folder``, which has no checkpoint; None if the folder is empty.

    ``FileError`` if it holds something else, or if its ``config.yaml`` is damaged.
    """
    if all(entry.name.startswith((".", ENCODINGS)) for entry in folder.iterdir()):
        return None
    try:
        found = read_yaml(folder / CONFIG)
        if isinstance(found, dict) and {"dataset", "output", "adapter", "optimizer"} <= found.keys():
            return found
        reason = f"{folder / CONFIG} does not hold the settings of a training run"
    except (FileError, FileNotFoundError) as error:
        reason = str(error)
    raise FileError(
        f"{folder} is not empty, and there is no checkpoint of a run in it ({reason}): choose another output"
    )


def check_same_run(
    checkpoint: Checkpoint, settings: TrainSettings, config: Mapping[str, Any], *, processes: int
) -> None:
    """Raise ``ValueError`` if these settings cannot resume a checkpoint, with settings that can."""
    about, folder = checkpoint.about, Path(settings.output)
    if changed := _essential_changes(about["config"], config):
        message = _refusal(folder, changed)
        if settings.adapter is not None and (checkpoint.path / "adapter").is_dir():
            message += f"; to start from its weights, also write adapter.start={checkpoint.path / 'adapter'}"
        raise ValueError(message)
    if checkpoint.step > settings.steps:
        raise ValueError(
            f"{folder} is at step {checkpoint.step} already: write steps={checkpoint.step} or more, or choose another "
            "output"
        )
    samples, batch = about["samples_per_step"], settings.batch
    now = batch.size * batch.accumulation * processes
    if samples == now:
        return
    if samples % processes:
        cure = "start a number of processes that divides that"
    else:
        share = samples // processes
        size = next(size for size in range(min(batch.size, share), 0, -1) if share % size == 0)
        cure = f"write batch.size={size} batch.accumulation={share // size}"
    raise ValueError(
        f"a step of the run in {folder} has {samples} samples, and now it would have {now} (batch.size={batch.size} "
        f"times batch.accumulation={batch.accumulation} times {processes} processes): {cure}, or choose another output"
    )


def _essential_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each changed setting that makes it another run."""

    def essence(config: Mapping[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(config))
        optimizer, batch = config.get("optimizer") or {}, config.get("batch") or {}
        average = "none" if optimizer.get("ema_decay") is None else "set"
        return {key: value for key, value in config.items() if key not in _FREE} | {
            "batch": {key: value for key, value in batch.items() if key not in _FREE_OF_BATCH},
            "optimizer": {"ema_decay": average},
        }

    return differences(essence(before), essence(now))


def _refusal(folder: Path, changed: list[str]) -> str:
    lines = "\n".join(f"  {line}" for line in changed[:12])
    return (
        f"{folder} holds a run with other settings, which cannot be resumed with:\n{lines}\n"
        "write the settings as they were, or choose another output"
    )


def changes_of_later_steps(checkpoint: Checkpoint, about: Mapping[str, Any], settings: TrainSettings) -> list[str]:
    """A line for each permitted change that later steps depend on."""
    from storymem.training.optimization import learning_rate

    before, now = checkpoint.about["config"], about["config"]
    planned = before.get("steps", settings.steps)

    def reported(config: Mapping[str, Any]) -> dict[str, Any]:
        turns = (config.get("parallel") or {}).get("alternate_every")
        return {"optimizer": config.get("optimizer") or {}, "parallel": {"alternate_every": turns}}

    lines = differences(reported(before), reported(now))
    if checkpoint.about["clips"] != about["clips"]:
        lines.append("the training set is not the one of the steps before: later steps draw other samples")
    if (split := checkpoint.about["processes"]) != about["processes"]:
        lines.append(f"processes: {split} before, {about['processes']} now, with as many samples a step")
    old = learning_rate(build_settings(OptimizerSettings, reported(before)["optimizer"]), planned)
    new = learning_rate(settings.optimizer, settings.steps)
    was, rate = old(checkpoint.step), new(checkpoint.step)
    if checkpoint.step < settings.steps and abs(was - rate) > 1e-9 * max(was, rate):
        line = f"the learning rate of step {checkpoint.step + 1} is {rate:.3g}, and would have been {was:.3g}"
        if settings.optimizer.schedule != "constant_with_warmup":
            line += f" (schedule={settings.optimizer.schedule}, steps: {planned} before, {settings.steps} now)"
        if was and rate:
            line += f"; to keep the old rate, write optimizer.lr={settings.optimizer.lr * was / rate:.3g}"
        elif rate:
            line += "; if that is too high, write a lower optimizer.lr"
        lines.append(line)
    return lines
