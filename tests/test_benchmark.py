"""The benchmark of true size, at a small one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from storymem.commands import benchmark
from storymem.commands.benchmark import measure, random_pipeline
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings
from storymem.weights import Weights
from tests.wan.tiny import CPU, settings

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_rows_are_of_the_operations_that_torch_counts(mode: str, memory: int) -> None:
    model = settings(memory_attention=mode)
    pipe = random_pipeline(model, CPU)
    row = measure(pipe, model, CPU, memory=memory, ceiling=0.02, repeats=1)
    prefill, forward = benchmark.forwards(pipe, model, CPU, memory, DEVICE)
    assert (prefill is not None) == (row.prefill > 0) == (mode == "cached" and memory > 0)
    if prefill is not None:
        prefill()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    assert row.tflop == counter.get_total_flops() / 1e12
    assert row.tokens == 6 * (3 + (memory if mode == "joint" else 0))
    assert row.floor == row.tflop / 0.02
    assert row.shot == 80 * row.seconds + 2 * row.prefill


def test_random_networks_carry_an_adapter_where_the_model_does() -> None:
    weights = Weights(name="memory", source="./absent")
    pipe = random_pipeline(settings(adapter=AdapterSettings(weights=weights)), CPU)
    for expert in pipe.experts.values():
        assert any("lora_A" in name for name, _ in expert.named_parameters())
        assert all(torch.isfinite(weight).all() for weight in expert.parameters())
        assert torch.isfinite(expert.rope.freqs_cos).all()


def test_the_command_prints_a_table_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found" / "rows.json"
    arguments = ["--model", "tiny", "--runtime", "cpu", "--memory", "0", "2", "--repeats", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--shot", "--steps", "2", "--json", str(path)])
    benchmark.main()
    printed = capsys.readouterr().out
    for text in ("ceiling: ", "tiny: 1 layers, 96x64, 17 frames", "calculated", "outside the denoiser"):
        assert text in printed
    assert "There is no accelerator here" in printed
    saved = json.loads(path.read_text())
    assert {"device", "torch", "diffusers", "date", "commit", "results"} <= saved.keys()
    (result,) = saved["results"]
    assert [row["memory"] for row in result["rows"]] == [0, 2]
    assert 0 < result["shots"][0]["outside"] < 1
    assert result["runtime"]["offload"] == "none"


def test_what_cannot_be_measured_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, forwards = tmp_path / "rows.json", benchmark.forwards

    def failing(pipe: Any, model: ModelSettings, runtime: RuntimeSettings, memory: int, device: torch.device) -> Any:
        if memory == 2:
            raise RuntimeError("out of memory\non this device")
        return forwards(pipe, model, runtime, memory, device)

    monkeypatch.setattr(benchmark, "forwards", failing)
    arguments = ["--model", "tiny", "--runtime", "cpu", "--memory", "0", "2", "--repeats", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(path)])
    benchmark.main()
    assert "not measured: memory 2: out of memory\n" in capsys.readouterr().out
    assert [row["memory"] for row in json.loads(path.read_text())["results"][0]["rows"]] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0", "-1"], "argument --memory: must be 0 or more, not -1"),
        (["--layers", "0"], "argument --layers: must be 1 or more, not 0"),
    ],
)
def test_counts_out_of_range_are_refused_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as error:
        benchmark.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
