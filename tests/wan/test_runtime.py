"""Devices and offloading: what cannot work here is told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import check_runtime, place, release_memory, resolve_device
from storymem.wan.settings import RuntimeSettings
from tests.wan.tiny import generate, pictures, settings

HAS_ACCELERATOR = torch.accelerator.is_available()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    expected = torch.accelerator.current_accelerator().type if HAS_ACCELERATOR else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == resolve_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "gpu", "", "meta", "hpu"])
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
        RuntimeSettings(device="cpu", threads=0)
    load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", threads=2), experts=False, text_encoder=False)
    assert torch.get_num_threads() == 2


def test_tiling_is_the_vaes() -> None:
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", vae_tiling=True))
    assert pipe.vae.use_tiling
    assert generate(pipe, output_type="np").shape == (1, 9, 32, 48, 3)


def test_a_bad_runtime_stops_loading() -> None:
    with pytest.raises(ValueError, match=r"runtime\.offload=group"):
        load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", offload="group"))


def test_with_model_offloading_a_network_that_begins_sends_away_the_one_before() -> None:
    """What ``place`` relies on, read off the hooks: one network at a time is on the card."""
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu"))
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = {name: getattr(pipe, name)._hf_hook for name in ("text_encoder", "transformer", "transformer_2", "vae")}
    for before, name in pairwise(hooks):
        previous = hooks[name].prev_module_hook
        assert (previous.model, previous.hook) == (getattr(pipe, before), hooks[before]), f"{name} sends away {before}"


def test_streamed_blocks_make_the_same_shot() -> None:
    """Group offloading, with the CPU for both places."""
    expected = generate(load_pipeline(settings(), runtime=RuntimeSettings(device="cpu")), memory=pictures(2))
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu"))
    place(pipe, RuntimeSettings(device="cpu", offload="group"), device=torch.device("cpu"))
    streamed = {name for name, part in pipe.components.items() if _is_group_offload_enabled_in(part)}
    assert streamed == {"transformer", "transformer_2"}
    assert torch.equal(generate(pipe, memory=pictures(2)), expected)


def _is_group_offload_enabled_in(part: object) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return isinstance(part, torch.nn.Module) and _is_group_offload_enabled(part)


@pytest.mark.skipif(not HAS_ACCELERATOR, reason="needs an accelerator")
@pytest.mark.parametrize("offload", ["model", "group"])
def test_between_shots_no_expert_is_on_the_card(offload: str) -> None:
    pipe = load_pipeline(settings(), runtime=RuntimeSettings(offload=offload))
    generate(pipe, output_type="np")
    for expert in pipe.experts.values():
        assert {weight.device.type for weight in expert.parameters()} == {"cpu"}
    release_memory()


@pytest.mark.skipif(not HAS_ACCELERATOR, reason="needs an accelerator")
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_where_the_networks_run_does_not_change_the_shot(offload: str) -> None:
    expected = generate(load_pipeline(settings(), runtime=RuntimeSettings(device="cpu")))
    shot = generate(load_pipeline(settings(), runtime=RuntimeSettings(offload=offload)))
    torch.testing.assert_close(shot.cpu(), expected, rtol=1e-3, atol=1e-3)
    release_memory()
