"""The training loop of every toy network: by the clock, on any device, resumable at any moment."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]
EVERY = 120.0  # seconds between checkpoints
SHARD = "15MB"  # the largest file of a checkpoint
WARMUP, COOL = 50, 0.3  # steps of rising learning rate; the share of the time in which it falls to 0
LOG_EVERY = 20  # steps


class Fit:
    """A network in training: optimizers, moving average and a folder of checkpoints.

    Matrices in the network's blocks are trained with Muon, everything else with AdamW. The folder holds
    `checkpoint/` (safetensors files below 16 MiB and `state.json`), which is replaced when its successor is complete,
    and `log.jsonl`.

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
        self.average = EMAModel(named.values(), decay=decay, use_ema_warmup=True, inv_gamma=10, power=1)
        self.names = list(named)
        self.step, self.seconds = 0, 0.0
        if (folder / "checkpoint.old").exists() and not (folder / "checkpoint").exists():  # killed between the renames
            (folder / "checkpoint.old").rename(folder / "checkpoint")
        if (folder / "checkpoint" / "state.json").exists():
            self._load()

    def run(self, loss: Loss, minutes: float, *, until: float = float("inf"), seed: int = 0) -> None:
        """Train until `minutes` are spent, those before a resume included, and save.

        Args:
            loss: draws its batch from the generator it is given, which depends on the step alone; returns the loss and
                figures to log.
            minutes: of training in all.
            seed: of the batches.
        """
        self.model.train()
        saved = clock = time.monotonic()
        while (progress := self.seconds / (60 * minutes)) < 1 and self.seconds < until:
            rng = torch.Generator().manual_seed(1_000_003 * seed + self.step)
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
                self.log(
                    step=self.step, seconds=round(self.seconds), loss=float(value.detach()), norm=float(norm), **figures
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
        """Write a checkpoint; the old one stays until it is complete."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {
            f"average.{name}": value for name, value in zip(self.names, self.average.shadow_params, strict=True)
        }
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        part, whole, old = (self.folder / name for name in ("checkpoint.part", "checkpoint", "checkpoint.old"))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
        for file, names in shards.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, part / file)
        state = {"step": self.step, "seconds": self.seconds, "average_steps": self.average.optimization_step}
        (part / "state.json").write_text(json.dumps(state))
        shutil.rmtree(old, ignore_errors=True)
        if whole.exists():
            whole.rename(old)
        part.rename(whole)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self) -> None:
        tensors = read_checkpoint(self.folder)
        state = json.loads((self.folder / "checkpoint" / "state.json").read_text())
        self.step, self.seconds = state["step"], state["seconds"]
        self.average.optimization_step = state["average_steps"]
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for shadow, name in zip(self.average.shadow_params, self.names, strict=True):
            shadow.copy_(tensors[f"average.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            whole["state"] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    index, name = key.split(".")[2:]
                    whole["state"].setdefault(int(index), {})[name] = value
            optimizer.load_state_dict(whole)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's checkpoint.

    Raises:
        FileNotFoundError: if there is none.
    """
    files = sorted((folder / "checkpoint").glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no checkpoint: train the stage {folder.name} first")
    return {name: value for file in files for name, value in load_file(file).items()}


def averaged(folder: Path, model: Network) -> Network:
    """The model with the averaged weights of a stage's checkpoint, in evaluation mode."""
    tensors = read_checkpoint(folder)
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    state |= {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
    model.load_state_dict(state)
    return model.eval()
