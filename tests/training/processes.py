"""What two gloo processes do for ``test_distributed``: ``python -m tests.training.processes FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from storymem.stopping import Stopped
from storymem.training.checkpoints import Checkpoints
from storymem.training.experts import make_accelerator
from storymem.training.optimization import whole
from storymem.training.run_settings import ParallelSettings
from storymem.training.trainer import StepReport, Trainer
from tests.forking import fork
from tests.training.tiny import (
    ADAPTER,
    BATCH,
    CPU,
    OPTIMIZER,
    Broken,
    Huge,
    latents,
    method,
    run,
    trainer,
)

WORLD = 2
STEPS = 3
PLAIN = replace(ADAPTER, dropout=0.0)
AVERAGED = replace(OPTIMIZER, ema_decay=0.5)
VALIDATION = {"every": STEPS, "samples": 3}


def gradients(parallel: ParallelSettings, accelerator: Accelerator, size: int) -> dict[str, Tensor]:
    """Gradients of the first step."""
    of = method("high_noise", adapter=PLAIN, parallel=parallel, accelerator=accelerator)
    training = trainer(of, accelerator=accelerator, batch=replace(BATCH, size=size))
    of.network(0)
    accelerator.backward(of.loss(0, next(training._batches(0))).total)
    found = {name: p.grad for name, p in of.parameters.items()}
    return {name: whole(gradient).clone() for name, gradient in found.items() if gradient is not None}


def trained(folder: Path, parallel: ParallelSettings, accelerator: Accelerator, size: int) -> Trainer:
    """A run of both experts with checkpoints, to its end."""
    of = method("high_noise", "low_noise", adapter=PLAIN, parallel=parallel, accelerator=accelerator)
    training = trainer(
        of,
        accelerator=accelerator,
        batch=replace(BATCH, size=size),
        optimizer=AVERAGED,
        steps=STEPS,
        checkpoints=Checkpoints(folder, keep=2),
        checkpoint_every=2,
    )
    training.run()
    return training


def gradients_of_two(folder: Path, accelerator: Accelerator) -> None:
    for strategy in ("ddp", "fsdp"):
        found = gradients(ParallelSettings(strategy=strategy), accelerator, size=2)
        save_file(found, folder / f"gradients_{strategy}_{accelerator.process_index}.safetensors")


def training_of_two(folder: Path, accelerator: Accelerator) -> None:
    for strategy in ("ddp", "fsdp"):
        training = trained(folder / strategy, ParallelSettings(strategy=strategy), accelerator, size=2)
        parameters = training.whole_parameters()
        save_file(parameters, folder / f"trained_{strategy}_{accelerator.process_index}.safetensors")
        if strategy == "fsdp":
            base = training.method.experts.transformers["high_noise"].blocks[0].attn1.to_q.base_layer.weight  # type: ignore[attr-defined]
            assert isinstance(base, DTensor)
            assert base.to_local().numel() * WORLD == base.numel()


def lost_on_one(folder: Path, accelerator: Accelerator) -> None:
    of = method("high_noise", accelerator=accelerator)
    batch = replace(BATCH, size=1)
    for kind in (Broken, Huge):
        training = trainer(of, accelerator=accelerator, data=kind(latents().clips), batch=batch, steps=50)
        try:
            training.run()
        except ValueError as error:
            (folder / f"{kind.__name__}_{accelerator.process_index}").write_text(str(error))


def signal_to_one(folder: Path, accelerator: Accelerator) -> None:
    def send(trainer: Trainer, report: StepReport) -> None:
        if report.step == 1 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    of = method("high_noise", accelerator=accelerator)
    training = trainer(of, accelerator=accelerator, steps=50, callbacks=[send])
    try:
        training.run()
    except Stopped as stopped:
        (folder / f"stopped_{accelerator.process_index}").write_text(f"{training.step} {stopped.status}")


def whole_run(folder: Path, accelerator: Accelerator) -> None:
    """The way of ``scripts/train.py``: validation, a film by sharded experts, export.

    The last scenario: a finished run ends the process group.
    """
    from tests import stories

    story = folder / f"story_{accelerator.process_index}.yaml"
    story.write_text(stories.FOUR_SHOTS)
    ready = run(
        folder / "run",
        steps=STEPS,
        parallel={"strategy": "fsdp"},
        batch=vars(replace(BATCH, size=1)),
        adapter=vars(PLAIN),
        validation=VALIDATION,
        samples={"every": STEPS, "story": str(story)},
    )
    ready.trainer.run()
    ready.finish()


SCENARIOS: tuple[Callable[[Path, Accelerator], Any], ...] = (
    gradients_of_two,
    training_of_two,
    lost_on_one,
    signal_to_one,
    whole_run,
)


def process(folder: Path) -> None:
    """One of the two."""
    accelerator = make_accelerator(CPU)
    assert accelerator.num_processes == WORLD
    for scenario in SCENARIOS:
        scenario(folder, accelerator)


def main() -> int:
    torch.set_num_threads(1)
    return any(fork(WORLD, partial(process, Path(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
