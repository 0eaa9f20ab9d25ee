"""What the README and the pages of docs/ tell users to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import pytest
import torch
import yaml

import storymem
from docs import hooks
from storymem import WanMemoryToVideoPipeline, load_story
from storymem.commands.cli import COMMANDS
from storymem.composition import SETTINGS
from storymem.config import annotation_at
from storymem.overrides import hydra_arguments
from storymem.story import StoryError
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config, save_memory_lora
from tests.composing import composed
from tests.wan import tiny

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
NAMES = {command.config: name for name, command in COMMANDS.items() if command.config}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def command_lines() -> list[str]:
    """Every command line of the pages, in blocks and inline."""
    found = []
    for page, text in PAGES.items():
        found += "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        found += re.findall(r"`((?:storymem|torchrun|make|python) [^`\n]+)`", text)
    return sorted({line.strip() for line in found if line.strip()})


LINES = command_lines()
COMMAND = re.compile(
    rf"(?:^|-m )storymem ({'|'.join(NAMES.values())})(?: (.*))?$|scripts/({'|'.join(NAMES)})\.py(?: (.*))?$"
)
HYDRA = [line for line in LINES if COMMAND.search(line) and not re.search(r"\[key=value|my_configs", line)]


def test_there_are_commands() -> None:
    assert len(HYDRA) > 30
    assert {NAMES.get(found[3], found[1]) for line in HYDRA if (found := COMMAND.search(line))} == set(NAMES.values())


@pytest.mark.parametrize("line", HYDRA)
def test_a_command_composes(line: str) -> None:
    found = COMMAND.search(line)
    assert found is not None
    name = found[1] or NAMES[found[3]]
    command = COMMANDS[name]
    assert command.config is not None
    settings = resolve_name(SETTINGS[command.config])
    actions = get_args(annotation_at(settings, ["action"]))
    words = [command.expanded(word, actions) for word in shlex.split(found[2] or found[4] or "", comments=True)]
    arguments = [word for word in words if not word.startswith("-") and word != "..."]
    overrides = hydra_arguments(arguments, command.positional, settings)
    needed = {"train": ["dataset=x"], "generate": ["story=x"], "prepare": ["videos=x", "output=x"]}.get(name, [])
    given = {override.split("=")[0] for override in overrides}
    composed(*[one for one in needed if one.split("=")[0] not in given], *overrides, name=command.config)


def test_targets_and_modules_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in LINES:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word and word != "&&"} <= targets | {
                "source"
            } or "&&" in words
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("benchmarks", "toyworld", "tests"):
            path = ROOT / words[2].replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["film", "grouping", "keyframes", "training"])
def test_a_benchmark_of_the_pages_runs(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == name


def test_the_readme_is_short() -> None:
    assert len(PAGES["README"].split()) <= 1200
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGES["README"]):
        assert (ROOT / link).exists(), link


def test_the_stories_of_the_pages_are_read(tmp_path: Path) -> None:
    for name in ("tam_front.png", "tam_side.png"):
        tiny.images(1)[0].save(tmp_path / name)
    stories = [block for page in PAGES for block in blocks(page, "yaml") if block.startswith("title:")]
    assert len(stories) == 3
    for block in stories:
        (tmp_path / "story.yaml").write_text(block)
        assert len(load_story(tmp_path / "story.yaml").shots) >= 2


def test_the_python_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("README", "python")
    base, adapter = re.findall(r'"([\w.-]+/[\w.-]+)"', code)
    subfolder = re.search(r'subfolder="([^"]+)"', code)
    assert subfolder is not None
    pipe = load_pipeline(tiny.settings(), runtime=tiny.CPU)
    pipe.save_pretrained(tmp_path / base)
    for transformer in pipe.experts.values():
        transformer.add_adapter(memory_lora_config(), "memory")
    save_memory_lora(pipe, tmp_path / adapter / subfolder[1], layout="released")
    tiny.images(1)[0].save(tmp_path / "keyframe.png")
    small = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "num_frames": tiny.FRAMES, "num_inference_steps": 1}
    call = partialmethod(WanMemoryToVideoPipeline.__call__, **small, max_sequence_length=16)
    monkeypatch.setattr(WanMemoryToVideoPipeline, "__call__", call)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["frames"].shape == (tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH, 3)
    loaded = names["pipe"]
    assert {loaded.transformer.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {torch.bfloat16}


# Generated pages


def test_the_configuration_reference_has_every_setting() -> None:
    page = hooks.configuration()
    for key in ("negative_sees_memory", "context_parallel", "mask_weight", "near_duplicate", "resamples", "dry_run"):
        assert f"| `{key}` |" in page
    assert "denoising steps" in page
    assert ":mod:" not in page
    assert hooks.arguments_of(type("A", (), {"__doc__": "X.\n\n    Args:\n        a, b: some\n            text."})) == {
        "a": "some text.",
        "b": "some text.",
    }


def test_the_api_reference_is_complete() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert sorted(re.findall(r"^::: .*\.(\w+)$", page, re.MULTILINE)) == sorted(dir(storymem))


def test_the_vocabulary_is_on_its_page() -> None:
    assert "*Ada*" in hooks.on_page_markdown(PAGES["toy"])


def test_the_story_schema_is_the_parsers() -> None:
    assert json.loads(hooks.SCHEMA.read_text()) == hooks.story_schema(), "run: python docs/hooks.py"


STORIES = [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "st_bench").rglob("*.yaml")]
SHOT = {"prompt": "A dog."}
STORY: dict[str, Any] = {"title": "T", "overview": "O", "scenes": [{"shots": [SHOT]}]}


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"style": "ink", "characters": [{"name": "A", "references": []}]}, True),
        ({"scenes": [{"shots": [SHOT, SHOT | {"cut": False, "frames": 9, "seed": 0, "negative_prompt": ""}]}]}, True),
        ({"titel": "T"}, False),
        ({"title": None}, False),
        ({"title": " "}, False),
        ({"title": "x" * 301}, False),
        ({"scenes": []}, False),
        ({"scenes": [{"shots": []}]}, False),
        ({"scenes": [{"shots": [{"cut": True}]}]}, False),
        ({"scenes": [{"shots": [SHOT | {"cut": "yes"}]}]}, False),
        ({"scenes": [{"shots": [SHOT | {"seed": -1}]}]}, False),
        ({"scenes": [{"shots": [SHOT | {"frames": "9"}]}]}, False),
        ({"scenes": [{"shots": [SHOT | {"promt": "x"}]}]}, False),
        ({"characters": [{}]}, False),
    ],
)
def test_the_story_schema_agrees_with_the_parser(tmp_path: Path, change: dict[str, Any], valid: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = tmp_path / "story.yaml"
    path.write_text(yaml.safe_dump(STORY | change))
    try:
        load_story(path)
        read = True
    except StoryError:
        read = False
    assert read is valid
    assert jsonschema.Draft202012Validator(hooks.story_schema()).is_valid(STORY | change) is valid


def test_shipped_stories_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(hooks.story_schema())
    assert len(STORIES) > 60
    for path in STORIES:
        validator.validate(yaml.safe_load(path.read_text()))
