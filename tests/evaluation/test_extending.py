"""The examples of docs/extending.md work as they are, outside the package."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from storymem.commands.cli import main
from tests.composing import SMALL
from tests.forking import fork
from tests.stories import single_thread

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


EXAMPLES = [("A metric", "one", "brightness"), ("A method", "Stills", "aesthetic_quality")]


@pytest.mark.parametrize(("section", "system", "column"), EXAMPLES)
def test_an_example_runs(
    folder: Path, section: str, system: str, column: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    name = re.findall(r"`(\w+\.py)`", text)[0]
    (code,), (command,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "bash"))
    (folder / name).write_text(code)

    def work() -> None:
        os.chdir(folder)
        words = shlex.split(command.replace("films=FOLDER", "films=one").replace("metrics=[toy]", "metrics=[tiny]"))
        small = [text for text in SMALL if "methods" in command]
        sys.argv = [*words, *small, "stbench.stories=stories", "output=out"]
        main()

    single_thread()
    assert fork(1, work) == [0], capfd.readouterr().err
    found = json.loads((folder / "out" / "results.json").read_text())["systems"][system]
    assert found["columns"][column]["mean"] is not None
    assert found["missing"] == []
