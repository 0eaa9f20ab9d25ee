"""A pretended accelerator: real commands as on a GPU, on a machine without one.

Its tensors are in RAM, and operations that mix devices fail as on CUDA: so it shows what was left on another
device, and nothing of streams, kernels, NCCL or speed. It is installed for the rest of the process:
``python -m tests.devices.pretended scripts/generate.py story.yaml runtime.offload=model``.

Needs a C++ compiler and the package ``ninja``. The extension is built once, in about 20 seconds, and cached in
torch's folder of extensions (TORCH_EXTENSIONS_DIR).
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

NAME = "pretended"


def missing() -> str | None:
    """What this machine lacks for building it, or None."""
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        return "needs the package ninja"
    return None if shutil.which(os.environ.get("CXX", "c++")) else "needs a C++ compiler"


def install() -> torch.device:
    """Make it this process's accelerator; before diffusers is imported, which looks for one then."""
    from torch.utils.cpp_extension import load

    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # of ninja
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(NAME))
    torch.utils.generate_methods_for_privateuse1_backend()
    accelerate.PartialState.default_device = torch.device(NAME)  # Accelerate knows devices by their names
    load("storymem_pretended", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O0"])
    return torch.device(NAME)


class _Module(types.ModuleType):
    """What ``torch.cuda`` is for CUDA, as far as libraries ask for it."""

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
            **dict.fromkeys(("_is_in_bad_fork",), False),
            **dict.fromkeys(("manual_seed", "manual_seed_all", "empty_cache", "synchronize", "set_device"), None),
            **dict.fromkeys(("set_rng_state", "set_rng_state_all"), None),
            "device_count": 1,
            "current_device": 0,
            "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        }
        if name not in answers:
            raise AttributeError(name)
        return lambda *_args, **_kwargs: answers[name]

    class device:  # noqa: N801
        """A context in which this is the current device, as ``torch.cuda.device``."""

        def __init__(self, _device: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_error: object) -> None: ...

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As a plugin of pytest, ``-p tests.devices.pretended``: all tests run with this device.

    Before any ``conftest.py``, which may import diffusers.
    """
    install()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, ".")
    runpy.run_path(sys.argv[0], run_name="__main__")
