"""The benchmark of true size, at a small one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from storymem.commands import benchmark
from storymem.commands.benchmark import Case, measure, random_pipeline, variations
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings
from storymem.weights import Weights
from tests.wan.tiny import CPU, settings

DEVICE = torch.device("cpu")


def measured(case: Case, *memory: int) -> list[benchmark.Row]:
    return list(measure(case, memory_sizes=memory, ceiling=0.02, repeats=1))


def case(model: ModelSettings | None = None, **runtime: Any) -> Case:
    return Case(name="it", model=model or settings(), runtime=replace(CPU, **runtime))


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_rows_are_of_the_operations_that_torch_counts(mode: str, memory: int) -> None:
    model = settings(memory_attention=mode)
    (row,) = measured(case(model), memory)
    prefill, forward = benchmark.forwards(random_pipeline(model, CPU), model, CPU, memory, DEVICE)
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


def test_a_case_that_cannot_be_run_is_named_with_the_reason() -> None:
    (row,) = measured(case(attention="flash2"), 0, 2)
    assert "attention=flash2 cannot be used here" in row.refused
    assert f"not measured: it: {row.refused}" in benchmark.table([row], settings())


def test_variations_change_one_thing_at_a_time() -> None:
    runtime = RuntimeSettings()
    cases = variations(settings(), runtime, torch.device("cuda"))
    assert len({case.name for case in cases}) == len(cases)
    assert (cases[0].name, cases[0].runtime) == ("plain", runtime)
    for case in cases[1:]:
        assert (case.runtime != runtime) != (case.model.memory_attention == "cached"), case.name


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
    plain, shot = saved["results"]
    assert [row["memory"] for row in plain["rows"]] == [0, 2]
    assert 0 < shot["rows"][0]["outside"] < 1
    assert plain["runtime"]["offload"] == "none"


def test_a_sweep_continues_after_a_case_that_fails_and_saves_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, counts = tmp_path / "rows.json", []
    build = benchmark.random_pipeline

    def failing(model: ModelSettings, runtime: RuntimeSettings) -> Any:
        counts.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
        if runtime.precision != "as_is":
            raise RuntimeError("no kernel image is available\nfor this device")
        return build(model, runtime)

    monkeypatch.setattr(benchmark, "random_pipeline", failing)
    arguments = ["--model", "tiny", "--runtime", "cpu", "--memory", "0", "--repeats", "1", "--layers", "1", "--sweep"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(path)])
    benchmark.main()
    assert counts == list(range(len(counts)))
    reasons = [row["refused"] for result in json.loads(path.read_text())["results"] for row in result["rows"]]
    assert [reason for reason in reasons if reason] == ["no kernel image is available"]
    assert "not measured: precision=fp8_storage: no kernel image is available" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(path), "--minutes", "0"])
    benchmark.main()
    assert "memory_attention=cached and what follows: 0 minutes are over" in capsys.readouterr().out


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
