"""What the README tells people to write works as it stands there."""

from __future__ import annotations

import re
import shlex
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem import WanMemoryToVideoPipeline
from storymem.commands.overrides import hydra_arguments
from storymem.data.settings import PrepareSettings
from storymem.evaluation.stbench import EvaluateSettings
from storymem.film.settings import GenerateSettings
from storymem.training.run_settings import TrainSettings
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config, save_memory_lora
from tests.composing import composed
from tests.wan import tiny

README = (Path(__file__).parents[1] / "README.md").read_text()
SETTINGS = {
    "generate": GenerateSettings,
    "train": TrainSettings,
    "prepare_data": PrepareSettings,
    "eval_stbench": EvaluateSettings,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every command line of the README that runs one of the scripts with Hydra."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(torchrun [^`]+|python scripts/[^`]+)`", README)
    return [line for line in [*lines, *inline] if re.search(rf"scripts/({'|'.join(SETTINGS)})\.py ", line)]


def test_there_are_commands() -> None:
    assert len(commands()) > 12


@pytest.mark.parametrize("command", commands())
def test_a_command_composes(command: str) -> None:
    name, line = re.search(r"scripts/(\w+)\.py (.*)", command).groups()  # type: ignore[union-attr]
    arguments = [one for one in shlex.split(line, comments=True) if not one.startswith("--") and one != "..."]
    overrides = hydra_arguments(arguments, "story" if name == "generate" else None, SETTINGS[name])
    needed = {"train": ["dataset=x"], "generate": ["story=x"]}.get(name, [])
    composed(*[one for one in needed if not any(one[:6] == other[:6] for other in overrides)], *overrides, name=name)


def test_the_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    base, adapter = re.findall(r'"([\w.-]+/[\w.-]+)"', code)
    subfolder = re.search(r'subfolder="([^"]+)"', code)
    assert subfolder is not None
    pipe = load_pipeline(tiny.settings(), runtime=tiny.CPU)
    pipe.save_pretrained(tmp_path / base)
    for transformer in pipe.experts.values():
        transformer.add_adapter(memory_lora_config(), "memory")
    save_memory_lora(pipe, tmp_path / adapter / subfolder[1], layout="released")
    tiny.pictures(1)[0].save(tmp_path / "keyframe.png")
    small = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "num_frames": tiny.FRAMES, "num_inference_steps": 1}
    call = partialmethod(WanMemoryToVideoPipeline.__call__, **small, max_sequence_length=16)
    monkeypatch.setattr(WanMemoryToVideoPipeline, "__call__", call)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["frames"].shape == (tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH, 3)
    loaded = names["pipe"]
    assert {loaded.transformer.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {torch.bfloat16}
