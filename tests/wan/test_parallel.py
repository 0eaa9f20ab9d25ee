"""What one process knows of several; what they make together is in ``tests/test_ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storymem.config import ConfigError, build_settings
from storymem.data.settings import PrepareSettings
from storymem.film.generate import build_storyteller
from storymem.training.settings import TrainSettings
from storymem.wan.loading import load_pipeline
from storymem.wan.parallel import can_share_tokens
from storymem.wan.runtime import check_runtime
from storymem.wan.settings import RuntimeSettings
from tests.composing import composed, generate_settings
from tests.training.tiny import config
from tests.wan import tiny


def test_a_pipeline_is_not_loaded_for_several_processes_by_one() -> None:
    with pytest.raises(ValueError, match=r"guidance_parallel=true .* there is one: start it with torchrun"):
        load_pipeline(tiny.settings(), runtime=RuntimeSettings(device="cpu", guidance_parallel=True))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_tokens_are_shared_among_accelerators() -> None:
    with pytest.raises(ValueError, match=r"context_parallel=ulysses is for accelerators and this machine has none"):
        check_runtime(RuntimeSettings(context_parallel="ulysses"))


@pytest.mark.parametrize(
    ("backend", "ulysses", "ring"),
    [
        ("native", True, False),
        ("_native_cudnn", True, True),
        ("flash", True, True),
        ("sage", True, True),
        ("_flash_3", False, False),
    ],
)
def test_not_every_attention_kernel_can_share_tokens(backend: str, ulysses: bool, ring: bool) -> None:
    assert can_share_tokens(backend, "none")
    assert can_share_tokens(backend, "ulysses") == ulysses
    assert can_share_tokens(backend, "ring") == ring


def test_a_storyteller_of_one_process_refuses_the_runtime_of_several() -> None:
    settings = generate_settings("model=tiny", "runtime=cpu", "runtime.guidance_parallel=true")
    with pytest.raises(ValueError, match=r"are for scripts/generate.py, where several processes make one film"):
        build_storyteller(settings, {})


@pytest.mark.parametrize(("field", "value"), [("context_parallel", "ulysses"), ("guidance_parallel", True)])
def test_training_and_preparing_data_refuse_it_too(tmp_path: Path, field: str, value: object) -> None:
    message = rf"runtime\.{field}: unknown key"
    runtime = {"device": "cpu", field: value}
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, config(tmp_path, runtime=runtime))
    prepare = composed("model=tiny", "videos=clips", "output=set", name="prepare_data")
    with pytest.raises(ConfigError, match=message):
        build_settings(PrepareSettings, prepare | {"runtime": runtime})
