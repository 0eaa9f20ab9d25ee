"""The tests that need an accelerator, on a pretended one: see :mod:`tests.devices.pretended`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import pretended

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(pretended.missing() is not None, reason=f"{pretended.missing()}")
def test_on_a_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.devices.pretended", "-p", "no:cacheprovider"]
    tests = ["tests/devices/test_accelerator.py", "tests/wan/test_runtime.py", "tests/wan/test_placement.py"]
    run = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout
