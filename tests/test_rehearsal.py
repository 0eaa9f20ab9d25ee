"""The rehearsal of true size, with small sizes: every form of weights is written, loaded and resumed by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rehearsal import _is_wrong, differs

ROOT = Path(__file__).parents[1]


def test_it_fails_where_the_calculation_is_wrong() -> None:
    right = {"stages": {}, "differs": [], "resumed": True, "recalled": [0, 3]}
    assert not _is_wrong(right)
    assert not _is_wrong({"refused": "needs 40 GB of RAM"})
    for wrong in ({"differs": ["decode"]}, {"resumed": False}, {"recalled": [0, 0]}):
        assert _is_wrong(right | wrong)
    assert [differs({"peak_gb": peak, "calculated_gb": 10.0}) for peak in (8.9, 9.1, 10.9, 11.1)] == [1, 0, 0, 1]


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
    assert "memory is not compared with the calculation" in run.stdout
    assert {"texts", "denoise", "decode", "select", "save", "resume"} <= result["stages"].keys()
