"""Weights in 8 bits: what changes and what does not, and what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.precision import check_precision, lower_precision
from storymem.wan.settings import RuntimeSettings
from tests.wan.tiny import CPU, generate, pictures, settings

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
BFLOAT16 = {"dtype": "bfloat16"}
STORED = RuntimeSettings(device="cpu", precision="fp8_storage")


def linears(expert: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in expert.named_modules() if isinstance(module, nn.Linear)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_only_the_blocks_linears_are_stored_in_8_bits() -> None:
    pipe = load_pipeline(settings(), runtime=STORED)
    for expert in pipe.experts.values():
        small = {name for name, weight in expert.named_parameters() if weight.dtype == torch.float8_e4m3fn}
        assert {name.rsplit(".", 1)[0] for name in small} == {n for n in linears(expert) if n.startswith("blocks.")}
        assert {weight.dtype for name, weight in expert.named_parameters() if name not in small} == {torch.float32}
    assert {weight.dtype for weight in pipe.text_encoder.parameters()} == {torch.float32}


def test_a_shot_from_8_bit_weights_is_near_the_exact_one() -> None:
    expected = generate(load_pipeline(settings(), runtime=CPU), memory=pictures(2))
    shot = generate(load_pipeline(settings(), runtime=STORED), memory=pictures(2))
    assert shot.dtype == expected.dtype
    assert 0 < relative(shot, expected) < 0.1


def adapted(runtime: RuntimeSettings, **changes: Any) -> Any:
    """An expert with an adapter that does something, in ``runtime.precision``."""
    model = settings(**changes)
    expert = load_pipeline(model, runtime=CPU, text_encoder=False).transformer
    torch.manual_seed(0)
    expert.add_adapter(memory_lora_config(rank=4), adapter_name="memory")
    for name, weight in expert.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape).mul(0.1).to(getattr(torch, model.dtype))
    lower_precision([expert], model, runtime)
    return expert.eval()


def forward(expert: Any) -> torch.Tensor:
    dtype = expert.dtype
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 36, 3, 4, 6, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return expert(latents.to(dtype), torch.tensor([500.0]), text.to(dtype)).sample.float()


def test_adapters_keep_their_precision() -> None:
    whole, stored = adapted(CPU), adapted(STORED)
    weights = dict(whole.named_parameters())
    for name, weight in stored.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, weights[name]), name
        elif "base_layer" in name:
            assert weight.dtype == torch.float8_e4m3fn, name
    assert 0 < relative(forward(stored), forward(whole)) < 0.1
    stored.set_adapters(["memory"], [0.0])
    assert relative(forward(stored), forward(whole)) > 0.1, "the adapter has an effect on 8-bit weights"


@pytest.mark.parametrize(
    ("runtime", "model", "device", "message"),
    [
        ({"precision": "fp8_storage", "compile": "blocks"}, {}, "cpu", "use runtime.precision=fp8 or int8"),
        ({"precision": "fp8_storage"}, {}, "mps", "no 8-bit floats; use precision=as_is"),
        ({"precision": "int8"}, {}, "cpu", "precision=int8 needs model.dtype=bfloat16 for the rest, not float32"),
        ({"precision": "fp8"}, BFLOAT16, "cpu", "computes in 8 bits on CUDA devices, and the device is cpu"),
        ({"precision": "int8"}, BFLOAT16, "mps", "the device is mps: use runtime.precision=fp8_storage"),
    ],
)
def test_what_cannot_work_is_refused(runtime: dict[str, Any], model: dict[str, Any], device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(settings(**model), RuntimeSettings(**runtime), torch.device(device))


def test_it_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"runtime\.precision=fp8 computes in 8 bits on CUDA"):
        load_pipeline(settings(**BFLOAT16), runtime=RuntimeSettings(device="cpu", precision="fp8"))


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_torchao_is_asked_for_with_its_command() -> None:
    with pytest.raises(ValueError, match=r"precision=int8 needs torchao: pip install 'torchao>=0.15'"):
        check_precision(settings(**BFLOAT16), RuntimeSettings(precision="int8"), torch.device("cpu"))


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
def test_8_bit_integers_by_torchao() -> None:
    whole, rounded = (
        adapted(RuntimeSettings(device="cpu", precision=precision), **BFLOAT16) for precision in ("as_is", "int8")
    )
    kinds = {type(module.weight.data).__name__ for name, module in linears(rounded).items() if "base_layer" in name}
    assert kinds
    assert "Tensor" not in kinds
    assert {
        type(module.weight.data) for name, module in linears(rounded).items() if "lora_" in name or "blocks" not in name
    } == {torch.Tensor}
    assert 0 < relative(forward(rounded), forward(whole)) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8_bit_floats_are_refused_on_hardware_without_them() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) >= (8, 9):
        pytest.skip("this card has them")
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9"):
        check_precision(settings(**BFLOAT16), RuntimeSettings(precision="fp8"), device)
