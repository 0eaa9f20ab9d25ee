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
        ((name, code),) = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.S)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        (command,) = re.findall(r"```bash\nstorymem (.*?)\n```", text, re.S)
        arguments = [sys.executable, "-m", "storymem", *shlex.split(command)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{section}: {done.stderr}"
    recalled = json.loads((tmp_path / "films" / "closest" / "two" / "film.json").read_text())
    assert recalled["config"]["memory"]["recall"] == {"_target_": "closest.ClosestToText", "capacity": 3}
    for film in ("closest", "ends", "sharp", "narrow"):
        assert (tmp_path / "films" / film / "two" / "film.mp4").exists()
    assert "Steady" in (tmp_path / "results" / "stbench" / "results.md").read_text()
    assert "PlainColours" in (tmp_path / "results" / "plain" / "results.md").read_text()
