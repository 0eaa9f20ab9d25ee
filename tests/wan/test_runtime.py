"""Devices and offloading: what cannot work here is told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import check_runtime, release_memory, resolve_device
from storymem.wan.settings import RuntimeSettings
from tests.wan.tiny import generate, settings

HAS_ACCELERATOR = torch.accelerator.is_available()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    expected = torch.accelerator.current_accelerator().type if HAS_ACCELERATOR else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "gpu", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ValueError, match=f"runtime.device={device} cannot be used here.*try auto or cpu") as error:
        check_runtime(RuntimeSettings(device=device))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_needs_an_accelerator(offload: str) -> None:
    with pytest.raises(ValueError, match=rf"runtime.offload={offload}.*use runtime.offload=none"):
        check_runtime(RuntimeSettings(device="cpu", offload=offload))


def test_threads_must_be_positive_and_are_set(threads: None) -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more, not 0"):
        check_runtime(RuntimeSettings(device="cpu", threads=0))
    load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", threads=2), experts=False, text_encoder=False)
    assert torch.get_num_threads() == 2


def test_tiling_is_the_vaes() -> None:
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", vae_tiling=True))
    assert pipe.vae.use_tiling
    assert generate(pipe, output_type="np").shape == (1, 9, 32, 48, 3)


def test_a_bad_runtime_stops_loading() -> None:
    with pytest.raises(ValueError, match=r"runtime\.offload=group"):
        load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", offload="group"))


@pytest.mark.skipif(not HAS_ACCELERATOR, reason="needs an accelerator")
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_where_the_networks_run_does_not_change_the_shot(offload: str) -> None:
    expected = generate(load_pipeline(settings(), runtime=RuntimeSettings(device="cpu")))
    shot = generate(load_pipeline(settings(), runtime=RuntimeSettings(offload=offload)))
    torch.testing.assert_close(shot.cpu(), expected, rtol=1e-3, atol=1e-3)
    release_memory()
