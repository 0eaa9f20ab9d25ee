"""The benchmark of true size, at a small one: what it measures is what torch counts, and what it refuses it says."""

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

from storymem.commands import benchmark, benchmark_command, benchmark_report
from storymem.commands.benchmark import Case, flops_of, measure, measure_shot, random_pipeline, small_model, variations
from storymem.wan.flops import forward_flops
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings, SamplerSettings
from storymem.weights import Weights
from tests.wan.tiny import CPU, settings

SAMPLER = SamplerSettings(steps=40, guidance=3.5)
DEVICE = torch.device("cpu")


def measured(case: Case, *memory: int, sampler: SamplerSettings = SAMPLER) -> list[benchmark.Row]:
    return list(measure(case, sampler=sampler, memory_sizes=memory, ceiling=0.02, repeats=1))


def case(model: ModelSettings | None = None, **runtime: Any) -> Case:
    return Case(name="it", model=model or settings(), runtime=replace(CPU, **runtime))


def test_rows_follow_from_what_was_measured() -> None:
    rows = measured(case(), 0, 2)
    assert [row.memory for row in rows] == [0, 2]
    for row, slots in zip(rows, (3, 5), strict=True):
        flops = forward_flops(settings().network.transformer, slots=slots, height=4, width=6, text_tokens=16)
        assert (row.tokens, row.tflop) == (flops.tokens, flops.total / 1e12)
        assert row.tflops == pytest.approx(row.tflop / row.seconds)
        assert row.share == pytest.approx(row.tflops / 0.02)
        assert row.floor == pytest.approx(row.tflop / 0.02)
        assert row.shot == pytest.approx(80 * row.seconds)
        assert row.floor_shot == pytest.approx(80 * row.floor)
        assert row.prefill is None


def test_without_guidance_a_shot_has_half_the_forwards() -> None:
    (row,) = measured(case(), 0, sampler=SamplerSettings(steps=4, guidance=1.0))
    assert row.shot == pytest.approx(4 * row.seconds)


def test_both_passes_in_a_batch_are_one_forward() -> None:
    alone, both = measured(case(), 2), measured(case(guidance_batch=True), 2)
    assert both[0].tokens == 2 * alone[0].tokens
    assert both[0].tflop == pytest.approx(2 * alone[0].tflop)
    assert both[0].shot == pytest.approx(40 * both[0].seconds)


@pytest.mark.slow
def test_predicted_memory_is_near_the_measured() -> None:
    """Where weights and activations are not small beside what the arithmetic leaves out."""
    video = replace(settings().video, height=96, width=160)
    (row,) = measured(case(small_model(video, layers=1)), 2)
    assert row.measured_gb == pytest.approx(row.predicted_gb, rel=0.3)


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_torch_counts_the_same_operations(mode: str, memory: int) -> None:
    model = settings(memory_attention=mode)
    pipe = random_pipeline(model, CPU, SAMPLER)
    prefill, forward = benchmark.forwards(pipe, model, CPU, memory, 1, DEVICE)
    if prefill is not None:
        prefill()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    assert flops_of(model, memory, CPU).total == counter.get_total_flops()


def test_cached_memory_is_kept_for_the_forwards_that_are_measured() -> None:
    joint, cached = measured(case(), 3), measured(case(settings(memory_attention="cached")), 3)
    assert cached[0].prefill is not None
    assert cached[0].tokens < joint[0].tokens
    assert joint[0].prefill is None


def test_random_networks_carry_an_adapter_where_the_model_does() -> None:
    weights = Weights(name="memory", source="./absent")
    pipe = random_pipeline(settings(adapter=AdapterSettings(weights=weights)), CPU, SAMPLER)
    for expert in pipe.experts.values():
        assert "memory" not in expert.peft_config
        assert any("lora_A" in name for name, _ in expert.named_parameters())
        assert all(torch.isfinite(weight).all() for weight in expert.parameters())
        assert torch.isfinite(expert.rope.freqs_cos).all()


def test_what_cannot_be_run_is_named_with_the_reason() -> None:
    (row,) = measured(case(settings(dtype="bfloat16"), precision="fp8"), 0, 2)
    assert "precision=fp8 computes in 8 bits on CUDA devices" in row.refused
    table = benchmark_report.table([row], settings(), SAMPLER)
    assert f"not measured: it: {row.refused}" in table


def test_a_whole_shot_is_more_than_its_forwards() -> None:
    row = measure_shot(case(), sampler=SAMPLER, memory=1, steps=3)
    assert 0 < row.denoiser < row.seconds
    assert row.outside == pytest.approx(1 - row.denoiser / row.seconds)


def test_variations_change_one_thing_at_a_time() -> None:
    runtime = RuntimeSettings()
    cases = variations(settings(), runtime, torch.device("cuda"))
    assert len({case.name for case in cases}) == len(cases)
    assert (cases[0].name, cases[0].runtime) == ("plain", runtime)
    for case in cases[1:]:
        assert (case.runtime != runtime) != (case.model.memory_attention == "cached"), case.name


def test_the_ceiling_is_positive_and_the_same_in_any_unit() -> None:
    assert 1e-4 < benchmark.matmul_ceiling(DEVICE, torch.float32, seconds=0.05) < 1e4


def test_the_script_prints_a_table_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found" / "rows.json"
    arguments = ["--model", "tiny", "--runtime", "cpu", "--memory", "0", "2", "--repeats", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--shot", "--steps", "2", "--json", str(path)])
    benchmark_command.main()
    said = capsys.readouterr().out
    for text in ("ceiling: ", "tiny: 1 layers, 96x64, 17 frames", "calculated", "327.8 s, 41.0 GB", "outside the"):
        assert text in said
    assert "There is no accelerator here" in said
    saved = json.loads(path.read_text())
    assert {"device", "torch", "diffusers", "date", "commit", "results"} <= saved.keys()
    plain, shot = saved["results"]
    assert [row["memory"] for row in plain["rows"]] == [0, 2]
    assert shot["rows"][0]["steps"] == 2
    assert plain["runtime"]["offload"] == "none"
