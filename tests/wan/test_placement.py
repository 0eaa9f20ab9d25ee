"""``runtime.offload: auto``: what is chosen for which machine and why, and what is reported where nothing fits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from storymem.config import ConfigError
from storymem.film.generate import generate_films as films
from storymem.wan import placement
from storymem.wan.estimate import estimate_shot
from storymem.wan.loading import load_pipeline
from storymem.wan.placement import (
    Choice,
    Machine,
    choose_runtime,
    free_and_total_ram,
    needed_vram,
    settle,
    this_machine,
)
from storymem.wan.runtime import check_runtime, planned_device
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings
from storymem.wan.shots import WanShotGenerator
from tests.composing import composed, generate_settings
from tests.wan.tiny import generate, settings

AUTO = RuntimeSettings(offload="auto")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ada_and_the_tent.yaml"
CLIP_AND_HPSV3, CLIP_AND_LAION = (int(0.6e9), int(16.6e9)), (int(0.6e9), int(1.7e9))


@pytest.fixture(scope="module")
def a14b() -> ModelSettings:
    return generate_settings("model=wan2.2-a14b").model


def machine(vram: float | None, ram: float | None = 128) -> Machine:
    """Sizes in GB."""
    sizes = [None if size is None else int(size * 1e9) for size in (vram, ram)]
    return Machine(name="a card", vram=sizes[0], ram=sizes[1])


def chosen(model: ModelSettings, on: Machine, runtime: RuntimeSettings = AUTO, **options: Any) -> Choice:
    return choose_runtime(model, runtime, machine=on, scorers=CLIP_AND_HPSV3, **options)


@pytest.mark.parametrize(
    ("card", "offload", "preset"),
    [(141, "none", None), (84, "model", "gpu-80gb"), (48, "model", "gpu-80gb"), (33, "group", "gpu-32gb")],
)
def test_the_fastest_way_that_fits(a14b: ModelSettings, card: float, offload: str, preset: str | None) -> None:
    choice = chosen(a14b, machine(card))
    assert choice.fits
    assert choice.runtime == replace(AUTO, offload=offload)
    assert f"offload={offload}" in choice.reason
    assert (f"(runtime={preset})" in choice.reason) if preset else ("(runtime=" not in choice.reason)
    assert needed_vram(choice.estimate) <= card * 1e9


def test_a_card_of_24_gb_takes_the_published_model(a14b: ModelSettings) -> None:
    choice = chosen(a14b, machine(25))
    assert (choice.fits, choice.runtime.offload) == (True, "group")


def test_the_reason_names_what_the_faster_way_needs(a14b: ModelSettings) -> None:
    choice = chosen(a14b, machine(84))
    needs = needed_vram(estimate_shot(a14b, replace(AUTO, offload="none"), memory_frames=10, scorers=CLIP_AND_HPSV3))
    assert f"because for offload=none {needs / 1e9:.1f} GB of VRAM are needed" in choice.reason
    assert "84.0 GB of VRAM and 128.0 GB of RAM free" in choice.reason


def test_tiles_are_the_last_resort(a14b: ModelSettings) -> None:
    wide = replace(a14b, video=replace(a14b.video, height=720, width=1280))
    choice = choose_runtime(wide, AUTO, machine=machine(22), scorers=CLIP_AND_LAION)
    assert choice.fits
    assert (choice.runtime.offload, choice.runtime.vae_tiling) == ("group", True)
    assert "offload=group and vae_tiling, because for offload=group (runtime=gpu-32gb) 22." in choice.reason


def test_where_nothing_fits_it_says_what_would(a14b: ModelSettings) -> None:
    small = chosen(a14b, machine(21))
    assert not small.fits
    assert "of VRAM are needed (to choose keyframes); scorer/quality=laion-v1 would fit" in small.reason
    tiny = chosen(a14b, machine(2))
    assert "use a machine with" in tiny.reason
    assert "or a smaller model.video" in tiny.reason
    short = chosen(a14b, machine(84, ram=24))
    assert "31.0 GB of RAM are needed; runtime.precision=fp8_storage would fit" in short.reason


def test_experts_take_turns_where_ram_is_short(a14b: ModelSettings) -> None:
    choice = chosen(a14b, machine(84, ram=64))
    assert (choice.fits, choice.runtime.offload, choice.runtime.experts) == (True, "model", "in_turn")
    assert "77.4 GB of RAM are needed" in choice.reason
    small = chosen(a14b, machine(25, ram=32))
    assert (small.fits, small.runtime.offload, small.runtime.experts) == (True, "group", "in_turn")
    one = replace(a14b, base="wan2.2-ti2v-5b", boundary=None, has_text_to_video=False, memory_attention="cached")
    assert chosen(replace(one), machine(16, ram=8)).runtime.experts == "together", "there is only one"


def test_the_precision_is_never_lowered_by_itself(a14b: ModelSettings) -> None:
    for card in (2, 8, 16, 24, 48, 84, 141):
        assert chosen(a14b, machine(card)).runtime.precision == "as_is"


def test_what_is_asked_for_is_kept_and_judged(a14b: ModelSettings) -> None:
    asked = RuntimeSettings(offload="none")
    choice = chosen(a14b, machine(48), asked)
    assert (choice.runtime, choice.fits) == (asked, False)
    assert "a card with 48.0 GB of VRAM" in choice.reason
    assert chosen(a14b, machine(141), asked).reason == ""


def test_several_processes_offload_nothing(a14b: ModelSettings) -> None:
    runtime = replace(AUTO, context_parallel="ulysses")
    assert chosen(a14b, machine(48), runtime).runtime.offload == "none"


def test_on_the_cpu_only_ram_counts(a14b: ModelSettings) -> None:
    large, small = (chosen(a14b, machine(None, host)) for host in (256, 32))
    assert (large.fits, large.runtime.offload) == (True, "none")
    assert not small.fits
    assert "GB of RAM are needed" in small.reason
    assert "VRAM" not in small.reason


def test_this_machine_is_measured() -> None:
    here = this_machine(torch.device("cpu"))
    assert here.vram is None
    assert here.ram is not None
    assert 1e8 < here.ram < 1e14
    assert str(here).startswith("the CPU with ")


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "storymem.wan.placement")
    settled = settle(settings(), RuntimeSettings(device="cpu", offload="auto"))
    assert settled == RuntimeSettings(device="cpu", offload="none")
    assert "the CPU with " in caplog.text
    assert settle(settings(), settled) == settled


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(a14b: ModelSettings) -> None:
    transformer = a14b.network.transformer | {"num_layers": 40_000}
    network = replace(settings().network, transformer=transformer)
    endless = replace(a14b, network=network, weights=None)
    with pytest.raises(ValueError, match=r"runtime.offload=auto finds no room for wan2.2-a14b on the CPU.*smaller"):
        settle(endless, RuntimeSettings(device="cpu", offload="auto"))
    pipe = load_pipeline(endless, runtime=RuntimeSettings(device="cpu", offload="auto"), experts=False)
    assert pipe.experts == {}, "texts and images can be encoded"


def test_loading_settles_auto() -> None:
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", offload="auto"))
    assert torch.equal(generate(pipe), generate(load_pipeline(settings(), runtime=RuntimeSettings(device="cpu"))))


# Placements that are asked for


def huge(layers: int) -> ModelSettings:
    """Random weights, of which a layer takes 40 GB in each expert."""
    model = settings()
    model.network.transformer.update(num_layers=layers, num_attention_heads=100, attention_head_dim=50, ffn_dim=10**6)
    return model


def test_ram_that_can_never_be_enough_is_refused() -> None:
    asked = RuntimeSettings(device="cpu", offload="none")
    with pytest.raises(ValueError, match=r"needs [\d.]+ GB of RAM, and this machine has [\d.]+ GB in all"):
        WanShotGenerator(model=huge(100), sampler=SamplerSettings(), runtime=asked).check_machine()


def test_a_tight_machine_is_reported_before_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = WanShotGenerator(model=settings(), sampler=SamplerSettings(), runtime=RuntimeSettings(device="cpu"))
    made.check_machine()
    assert not caplog.messages
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    made = WanShotGenerator(model=settings(), sampler=SamplerSettings(), runtime=RuntimeSettings(device="cpu"))
    made.check_machine()
    (warning,) = caplog.messages
    assert "runtime.offload=none may run out of memory on the CPU" in warning
    assert "of RAM are needed" in warning


def test_a_container_limits_ram(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for name, text in {"max": "3000000", "current": "2500000", "stat": "anon 1\ninactive_file 400000\n"}.items():
        (tmp_path / "job" / f"memory.{name}").write_text(text)
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(placement, "_control_groups", lambda: [tmp_path / "job", tmp_path])
    assert free_and_total_ram() == (900_000, 3_000_000)
    assert this_machine(torch.device("cpu")).ram == 900_000


def test_a_learned_recall_needs_both_experts() -> None:
    learned = generate_settings("model=wan2.2-a14b", "memory/recall=learned").model
    assert not chosen(learned, machine(24, ram=40)).fits
    with pytest.raises(ConfigError, match=r"experts=in_turn loads one expert at a time, and a learned recall"):
        generate_settings("model=wan2.2-a14b", "memory/recall=learned", "runtime=gpu-24gb")


# Plans for another machine


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize(
    ("overrides", "planned"),
    [
        (
            "runtime=gpu-24gb",
            "not for this machine: offload=group and vae_tiling and experts=in_turn (runtime=gpu-24gb) needs 23 ",
        ),
        ("runtime=gpu-80gb runtime.precision=fp8_storage", "offload=model needs 27 GB of VRAM"),
        ("runtime=gpu-12gb", "vae_tiling and experts=in_turn needs 11 GB of VRAM and 17 GB of RAM"),
        ("runtime.device=cuda", "offload=model (runtime=gpu-80gb) needs 42 GB of VRAM and 78 GB of RAM"),
        ("runtime.device=cuda:1 runtime.attention=flash3", "planned for cuda:1, not for this machine"),
        ("runtime.device=xpu runtime.offload=none", "planned for xpu, not for this machine"),
    ],
)
def test_a_plan_may_be_for_a_machine_with_a_card(
    overrides: str, planned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ("model=wan2.2-a14b", *overrides.split(), "dry_run=true", f"output={tmp_path / 'film'}")
    with pytest.raises(ValueError, match=r"not ready: .* marked MISSING"):
        films(composed(f"story={EXAMPLE}", *command))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("machine")]
    assert planned in line
    assert "TOO SMALL" not in line
    with pytest.raises(ValueError, match=r"cannot be used here|With dry_run=true it is planned|no such"):
        check_runtime(generate_settings("model=wan2.2-a14b", *overrides.split()).runtime)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_a_plan_for_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"runtime.device={device} cannot be used here"):
        planned_device(RuntimeSettings(device=device))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_is_measured() -> None:
    here = this_machine(torch.device(torch.accelerator.current_accelerator()))  # type: ignore[arg-type]
    assert here.vram is not None
    assert here.vram > 1e9
