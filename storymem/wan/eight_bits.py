"""Linears whose weights are stored as 8-bit floats and widened when they compute: half the memory, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST = 448.0  # of e4m3


class ScaledLinear(nn.Linear):
    """A linear with an 8-bit weight and its factor: y = x (factor * W)^T + bias.

    The weight is stored as bytes (int8): PEFT gives adapters the dtype of a floating-point weight, ``Module.to(dtype)``
    converts it, and transformers' T5 converts activations to it.

    Args:
        weight: [out, in], float8_e4m3fn or float8_e5m2.
        factor: one number, or one for each row.
        bias: [out] or None.
    """

    factor: Tensor

    def __init__(self, weight: Tensor, factor: Tensor, bias: Tensor | None) -> None:
        out, inside = weight.shape
        super().__init__(inside, out, bias=bias is not None, device="meta")
        self.kind = weight.dtype
        self.weight = nn.Parameter(weight.view(torch.int8), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.register_buffer("factor", factor.detach().float().flatten())

    def forward(self, input: Tensor) -> Tensor:
        # The factor before the product: 8-bit weights reach 448, with which sums overflow float16.
        factor = self.factor.unsqueeze(-1)
        if factor.numel() == 1 and factor.device.type == "cpu":
            factor = factor[0, 0]  # without dimensions: else torch copies the weight to float32 twice, for the same
        weight = self.weight.view(self.kind).to(input.dtype).mul_(factor)
        return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))


def in_8_bits(weight: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``weight`` as 8-bit floats with its factor: as it is if it has 8 bits, else rounded to e4m3, row by row."""
    if weight.element_size() == 1:
        return weight, torch.ones(1, device=weight.device) if factor is None else factor
    wide = weight.detach().float()
    factor = (wide.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / factor).to(torch.float8_e4m3fn), factor


def store_in_8_bits(network: nn.Module) -> None:
    """Replace the linears of a transformer's blocks, one after the other; adapters on them stay as they are."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear and is_linear_of_a_block(module, name):
            replace_module(network, name, ScaledLinear(*in_8_bits(module.weight), module.bias))


def is_linear_of_a_block(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear of a network's blocks and not an adapter's: 98 % of a transformer's weights."""
    return isinstance(module, nn.Linear) and name.startswith(("blocks.", "encoder.block.")) and "lora_" not in name


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``."""
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, module)
