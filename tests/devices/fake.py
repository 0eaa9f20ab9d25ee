"""A card that is not there, without a compiler: torch's fake tensors have shapes and devices, and no values.

Operations that mix devices fail as on CUDA. Where a program needs a value, it gets one that lets it continue: flags are
true, numbers are 0, and a timestep belongs to each of the experts in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CARD = torch.device("cuda", 0)
_ATEN = torch.ops.aten


@contextmanager
def fake_card() -> Iterator[None]:
    """Inside the block every tensor is fake, and networks can be moved to :data:`CARD`.

    Group offloading is beyond it: it assigns ``tensor.data``, which leaves the device of a fake tensor as it was.
    """
    memory = 80 << 30
    with ExitStack() as stack:
        for owner, name, value in (
            (nn.Module, "_apply", _apply),
            (FakeTensor, "numpy", lambda tensor: np.zeros(tuple(tensor.shape), np.float32)),
            (torch.cuda, "get_device_name", lambda *_: "a card that is not there"),
            (torch.accelerator, "get_memory_info", lambda *_: (memory, memory)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Answering())
        yield


class _Answering(FakeTensorMode):
    def __init__(self) -> None:
        super().__init__()
        self._high_noise = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            return getattr(args[0], "answer", True) if args[0].dtype == torch.bool else 0
        if func is _ATEN.allclose.default:
            return True
        if func is _ATEN.nonzero.default:
            return args[0].new_zeros((1, args[0].dim()), dtype=torch.int64)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _ATEN.ge.Scalar:  # of a timestep and the boundary
            self._high_noise = result.answer = not self._high_noise
        return result


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` with new parameters: torch cannot change the device of a fake one."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = nn.Parameter(function(weight), weight.requires_grad)
        for name, table in each._buffers.items():
            if table is not None:
                each._buffers[name] = function(table)
    return module
