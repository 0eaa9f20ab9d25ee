"""The training loop of every toy network: by the clock, on any device, resumable at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from storymem.training.checkpoints import Checkpoints

Network = TypeVar("Network", bound=nn.Module)
Loss = Callable[[torch.Generator], tuple[Tensor, Mapping[str, float | Tensor]]]
EVERY = 120.0  # seconds between checkpoints
WARMUP, COOL = 50, 0.3  # steps of rising learning rate; the share of the time in which it falls to 0
LOG_EVERY = 20  # steps
STATE = "state.pt"


class Fit:
    """A network in training: optimizers, moving average and a folder of checkpoints.

    Matrices in the network's blocks are trained with Muon, everything else with AdamW. The folder holds the newest
    checkpoint and `log.jsonl`.

    Args:
        model: whose parameters that require gradients are trained.
        folder: resumed from if it holds a checkpoint.
        rate: the learning rate.
        decay: of the moving average.
        device: "cpu", "cuda" or None for whatever accelerate finds.
    """

    def __init__(
        self, model: nn.Module, folder: Path, *, rate: float, decay: float = 0.999, device: str | None = None
    ) -> None:
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
        self.model, self.folder, self.rate = model.to(self.accelerator.device), folder, rate
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in named.items() if p.ndim == 2 and "blocks." in name]
        others = [p for name, p in named.items() if not (p.ndim == 2 and "blocks." in name)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0)
        ]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, rate, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
        self.average = EMAModel(named.values(), decay=decay, use_ema_warmup=True, inv_gamma=10, power=1, foreach=True)
        self.names = list(named)
        self.step, self.seconds = 0, 0.0
        if checkpoints_of(folder).steps():
            self._load()

    def run(self, loss: Loss, minutes: float, *, until: float = float("inf")) -> None:
        """Train until `minutes` are spent, those before a resume included, and save.

        Args:
            loss: draws its batch from the generator it is given, which depends on the step alone; returns the loss and
                figures to log.
            minutes: of training in all.
        """
        self.model.train()
        saved = clock = time.monotonic()
        while (progress := self.seconds / (60 * minutes)) < 1 and self.seconds < until:
            rng = torch.Generator().manual_seed(self.step)
            with self.accelerator.autocast():
                value, figures = loss(rng)
            self.accelerator.backward(value)
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * min(1.0, (self.step + 1) / WARMUP) * min(1.0, (1 - progress) / COOL)
                if torch.isfinite(norm):  # one bad batch must not undo an hour
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.average.step(self._trained())
            self.step += 1
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % LOG_EVERY == 0:
                logged = {"loss": value.detach(), "norm": norm, **figures}
                self.log(
                    step=self.step, seconds=round(self.seconds), **{name: float(one) for name, one in logged.items()}
                )
            if now - saved > EVERY:
                self.save()
                saved = clock = time.monotonic()
        self.save()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def log(self, **record: Any) -> None:
        """Append a line to the log and print it."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(self.folder.name, line, flush=True)

    def save(self) -> None:
        """Write a checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "average": dict(zip(self.names, self.average.shadow_params, strict=True)),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        state = {"seconds": self.seconds, "average_steps": self.average.optimization_step}
        with checkpoints_of(self.folder).writing(self.step, state) as partial:
            torch.save(content, partial / STATE)

    def _load(self) -> None:
        state, content = read_checkpoint(self.folder)
        self.step, self.seconds = state["step"], state["seconds"]
        self.average.optimization_step = state["average_steps"]
        self.model.load_state_dict(content["model"])
        for shadow, name in zip(self.average.shadow_params, self.names, strict=True):
            shadow.copy_(content["average"][name])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def checkpoints_of(folder: Path) -> Checkpoints:
    """The checkpoints of a stage."""
    return Checkpoints(folder / "checkpoints", keep=1)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Step, seconds and the like of a folder's checkpoint, and its tensors.

    Raises:
        FileNotFoundError: if there is none.
    """
    newest = checkpoints_of(folder).newest()
    if newest is None:
        raise FileNotFoundError(f"{folder} has no checkpoint: train the stage {folder.name} first")
    content = torch.load(newest.path / STATE, map_location="cpu", weights_only=True)
    return {"step": newest.step, **newest.state}, content


def averaged(folder: Path, model: Network) -> Network:
    """The model with the averaged weights of a stage's checkpoint, in evaluation mode."""
    _, content = read_checkpoint(folder)
    model.load_state_dict(content["model"] | content["average"])
    return model.eval()
