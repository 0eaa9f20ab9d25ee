"""The rehearsal of true size, with small sizes: every form of weights is written, loaded and resumed by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form"), [("wan2.2-a14b", "original"), ("wan2.2-ti2v-5b", "comfyui-fp8_scaled")])
def test_a_form_of_weights_makes_a_film(model: str, form: str, tmp_path: Path) -> None:
    arguments = [f"model={model}", f"form={form}", "scale=tiny", f"json={tmp_path / 'rows.json'}"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.rehearsal", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (result,) = json.loads((tmp_path / "rows.json").read_text())
    assert result["resumed"]
    assert result["recalled"] == [0, 3]
    assert result["differs"] == []
    assert {"texts", "denoise", "decode", "select", "save", "resume"} <= result["stages"].keys()
