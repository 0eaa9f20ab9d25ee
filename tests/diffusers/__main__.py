"""Run diffusers' own pipeline tests on our pipeline: ``python -m tests.diffusers CHECKOUT [pytest options]``.

CHECKOUT is a checkout of diffusers with the tests of (about) the installed version; nothing in it is changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = Path(__file__).with_name("cases.py")


def main(arguments: list[str]) -> int:
    if not arguments or not (Path(arguments[0]) / "tests" / "pipelines" / "wan").is_dir():
        print("usage: python -m tests.diffusers CHECKOUT [pytest options]: a checkout of diffusers", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(Path(arguments[0]) / "tests", tests)
        suite = tests / "pipelines" / "wan" / "test_memory_to_video.py"
        shutil.copy(CASES, suite)
        command = [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", str(suite), *arguments[1:]]
        source = str(Path(__file__).parents[2])
        import os

        return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": source}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
