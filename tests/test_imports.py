"""Imports go one way: no module imports, also inside functions or for types alone, one that imports it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_module_imports_one_that_imports_it() -> None:
    paths = {module_of(path): path for folder in ("storymem", "toyworld") for path in (ROOT / folder).rglob("*.py")}
    graph = {module: imports_of(path) & paths.keys() for module, path in paths.items()}
    assert graph["storymem.training.run"] > {"storymem.config"}
    TopologicalSorter(graph).prepare()  # CycleError names a circle
