"""The command line: answers that a person can use, and quickly, because torch is not imported for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from storymem.cli import CONFIGS, hydra_arguments, run_script

ROOT = Path(__file__).parents[1]
STORY = """\
title: Two
overview: A dog and a tree.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
"""


# As a person runs it


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``scripts/generate.py`` in a folder with a story, on a machine where importing torch fails."""
    (tmp_path / "story.yaml").write_text(STORY)
    poison = tmp_path / "poison" / "torch" / "__init__.py"
    poison.parent.mkdir(parents=True)
    poison.write_text("raise ImportError('torch was imported')")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "poison"), str(ROOT)]),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert "torch was imported" not in result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["poison", "story.yaml"], "nothing is written"
        return result

    return run


def test_help_is_for_people(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--help")
    assert result.returncode == 0
    for text in ("python scripts/generate.py story.yaml", "model=wan2.2-a14b", "dry_run=true", "resume=from_shot:N"):
        assert text in result.stdout
    shown = [line.strip() for line in result.stdout.splitlines()]
    for group in ("model", "sampler", "memory", "scorer/clip", "scorer/quality", "runtime"):
        choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        assert f"{group}: {', '.join(choices)}" in shown


def test_a_faulty_story_is_told_with_its_line(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "story.yaml").write_text(STORY.replace("cut: false", "cat: false"))
    result = run("story.yaml")
    assert result.returncode == 2
    assert "story.yaml:6: shot 2 (scene 1, shot 2): unknown key cat" in result.stderr
    assert result.stdout == ""


def test_missing_weights_are_told_all_at_once(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("story.yaml", "model=wan2.2-a14b")
    assert result.returncode == 2
    for command in (
        "hf download Wan-AI/Wan2.2-I2V-A14B-Diffusers\n",
        'hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --include "transformer*/*"\n',
        'hf download Kevin-thu/StoryMem --include "Wan2.2-MI2V-A14B/*"\n',
    ):
        assert f"  download: {command}" in result.stderr
    assert "69 GB" in result.stderr


def test_the_whole_configuration_can_be_printed(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--cfg", "job", "story.yaml", "sampler.steps=3", "model=wan2.2-a14b")
    assert result.returncode == 0
    config = yaml.safe_load(result.stdout)
    assert config["story"] == "story.yaml"
    assert config["sampler"]["steps"] == 3
    assert config["model"]["network"]["transformer"]["num_layers"] == 40
    assert config["scorer"]["quality"]["_target_"].startswith("storymem.scorers.hpsv3")
    assert "hydra" not in config


# In this process


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a script's main with a command line: its exit status and what it said."""

    def script(*arguments: str, main: Callable[[Any], None] = lambda config: None) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        try:
            run_script(main, config_name="generate", positional="story")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err.strip()

    return script


def read(config: Any) -> None:
    """A main that looks at everything."""
    from omegaconf import OmegaConf

    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_main_is_given_the_composed_configuration(script: Callable[..., tuple[int, str]]) -> None:
    seen: list[Any] = []
    assert script("my story.yaml", "sampler.steps=3", "runtime=cpu", main=seen.append) == (0, "")
    assert (seen[0].story, seen[0].sampler.steps, seen[0].runtime.device) == ("my story.yaml", 3, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which story? Write: python scripts/generate.py story.yaml"),
        (["a.yaml", "samplr.steps=3"], "samplr: unknown key; did you mean 'sampler'?"),
        (["a.yaml", "sampler.stepps=3"], "sampler.stepps: unknown key; did you mean 'steps'?"),
        (["a.yaml", "steps=3"], "steps: unknown key; did you mean 'sampler.steps'?"),
        (["a.yaml", "model=tiny", "model.weights.source=x"], "model.weights.source: unknown key"),
    ],
)
def test_mistakes_are_told_in_one_line(
    script: Callable[..., tuple[int, str]], arguments: list[str], message: str
) -> None:
    assert script(*arguments, main=read) == (2, message)


def test_an_unknown_choice_is_told_with_those_there_are(script: Callable[..., tuple[int, str]]) -> None:
    status, said = script("a.yaml", "model=tinny")
    assert status == 2
    assert "Could not find 'model/tinny'" in said
    assert "wan2.2-a14b" in said


def test_errors_of_our_own_checks_are_the_users(script: Callable[..., tuple[int, str]]) -> None:
    from storymem.story import load_story

    status, said = script("absent.yaml", main=lambda config: load_story(config.story) and None)
    assert (status, said) == (2, "absent.yaml: the file does not exist; expected a story file; check the path")


def test_a_bad_part_is_told_with_its_key(script: Callable[..., tuple[int, str]]) -> None:
    from hydra.utils import instantiate

    status, said = script(
        *("a.yaml", "model=tiny", "memory.recall.sink=99"),
        main=lambda config: instantiate(config.memory.recall) and None,
    )
    assert status == 2
    assert said.startswith("memory.recall: sink=99 does not fit into capacity=10")


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), ValueError("inside a library"), KeyError("x")])
def test_faults_of_the_program_keep_their_traceback(script: Callable[..., tuple[int, str]], fault: Exception) -> None:
    def fail(config: Any) -> None:
        raise fault

    with pytest.raises(type(fault)):
        script("a.yaml", main=fail)


def test_stopping_is_no_fault(script: Callable[..., tuple[int, str]]) -> None:
    def stop(config: Any) -> None:
        raise KeyboardInterrupt

    assert script("a.yaml", main=stop) == (130, "stopped; the same command goes on from here")


# From a command line to Hydra's


def test_the_story_becomes_an_override() -> None:
    assert hydra_arguments(["a.yaml", "seed=1"], "story") == ["seed=1", "story='a.yaml'"]
    assert hydra_arguments(["seed=1", "~memory.recall", "+x=1"], "story") == ["seed=1", "~memory.recall", "+x=1"]
    assert hydra_arguments([], "story") == []


@pytest.mark.parametrize("flag", ["--cfg", "-c", "--info", "-i", "--config-dir", "-cd", "--package", "-p"])
def test_a_flags_value_is_not_the_story(flag: str) -> None:
    assert hydra_arguments([flag, "job", "a.yaml"], "story") == [flag, "job", "story='a.yaml'"]
    assert hydra_arguments(["a.yaml", flag, "job"], "story") == [flag, "job", "story='a.yaml'"]


def test_flags_without_values() -> None:
    assert hydra_arguments(["--help", "a.yaml"], "story") == ["--help", "story='a.yaml'"]
    assert hydra_arguments(["--cfg=job", "-m", "seed=1,2"], "story") == ["--cfg=job", "-m", "seed=1,2"]


def test_a_script_without_positional_passes_all_on() -> None:
    assert hydra_arguments(["data=x", "y"], None) == ["data=x", "y"]


@pytest.mark.parametrize(
    "path",
    [
        *("a b.yaml", "a,b.yaml", "it's.yaml", 'say "hi".yaml', "[a]{b}(c).yaml", "a:b%#&*.yaml", "é.yaml"),
        *("back\\slash.yaml", "end\\", "both\\'", "\\\\two", "123", "null", "true", "$x.yaml", " "),
    ],
)
def test_any_path_reaches_the_configuration_as_it_was_written(path: str) -> None:
    (argument,) = hydra_arguments([path], "story")
    override = OverridesParser.create().parse_override(argument)
    assert (override.key_or_group, str(override.value()), override.is_sweep_override()) == ("story", path, False)


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hydra_arguments(["x=1.yaml"], "story") == ["x=1.yaml"], "no such file: an override"
    (tmp_path / "x=1.yaml").touch()
    assert hydra_arguments(["x=1.yaml"], "story") == ["story='x=1.yaml'"]


def test_several_stories_become_a_list() -> None:
    (override,) = hydra_arguments(["a.yaml", "it's, b.yaml"], "story")
    assert OverridesParser.create().parse_override(override).value() == ["a.yaml", "it's, b.yaml"]
    assert hydra_arguments(["a.yaml", "seed=1", "b.yaml"], "story") == ["seed=1", "story=['a.yaml','b.yaml']"]
