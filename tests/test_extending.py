"""The examples of docs/extending.md, run as a user would: outside the package, saved under their names, by command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S))
STORY = """\
title: Two
overview: Ada in the desert.
characters: [{name: Ada}]
scenes:
  - shots:
      - {prompt: "Ada waits in the desert at noon. Medium shot.", characters: [Ada]}
      - {prompt: "Ada jumps in the desert at noon. Medium shot.", characters: [Ada]}
"""


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    """In one folder, in the page's order: the metric scores the film that the scorer's example has made."""
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "two.yaml").write_text(STORY)
    assert len(SECTIONS) == 6
    for section, text in SECTIONS.items():
        ((code, name),) = re.findall(r"```(?:python|yaml)\n((?:# @.*\n)?# (\S+)\n.*?)```", text, re.S)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        (command,) = re.findall(r"```bash\nstorymem (.*?)\n```", text, re.S)
        arguments = [sys.executable, "-m", "storymem", *shlex.split(command)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{section}: {done.stderr}"
    recalled = json.loads((tmp_path / "films" / "closest" / "two" / "film.json").read_text())
    assert recalled["config"]["memory"]["recall"] == {"_target_": "closest.ClosestToText", "capacity": 3}
    for film in ("closest", "ends", "sharp", "narrow"):
        assert (tmp_path / "films" / film / "two" / "film.mp4").exists()
    assert "Steady" in (tmp_path / "results" / "stbench" / "results.md").read_text()
    assert "PlainColours" in (tmp_path / "results" / "plain" / "results.md").read_text()


@pytest.mark.slow
def test_the_code_of_the_python_page_runs(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(STORY)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) == 2
    run_python("\n".join(blocks), tmp_path)
    assert {path.parent.name for path in tmp_path.glob("films/*/film.mp4")} == {"ada", "noise"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "examples" / "storymem.ipynb").read_text())["cells"]
    run_python("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), tmp_path)
    assert (tmp_path / "films" / "two_friends" / "film.mp4").exists()


def run_python(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
