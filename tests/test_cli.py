"""The command line: messages that a user can act on, without importing torch."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from storymem import __version__
from storymem.commands import download
from storymem.commands.cli import COMMANDS, main, run_command
from storymem.config import CONFIGS, build_settings
from storymem.film.settings import GenerateSettings
from storymem.io import FileError, replacing
from storymem.weights import MissingWeights
from tests.stories import TWO_SHOTS

ROOT = Path(__file__).parents[1]


# As a user runs it


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``scripts/generate.py`` in a folder with a story, on a machine where importing torch fails."""
    (tmp_path / "story.yaml").write_text(TWO_SHOTS)
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


def test_help_lists_the_groups(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--help")
    assert result.returncode == 0
    for text in ("storymem generate story.yaml", "model=wan2.2-a14b", "dry_run=true", "resume=from_shot:N"):
        assert text in result.stdout
    shown = [line.strip() for line in result.stdout.splitlines()]
    for group in ("model", "sampler", "memory", "scorer/clip", "scorer/quality", "runtime"):
        choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        assert f"{group}: {', '.join(choices)}" in shown


def test_a_faulty_story_is_reported_with_its_line(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "story.yaml").write_text(TWO_SHOTS.replace("cut: false", "cat: false"))
    result = run("story.yaml")
    assert result.returncode == 2
    assert "story.yaml:6: shot 2 (scene 1, shot 2): unknown key cat" in result.stderr
    assert result.stdout == ""


def test_missing_weights_are_reported_all_at_once(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("story.yaml", "model=wan2.2-a14b")
    assert result.returncode == 2
    for command in (
        "hf download Wan-AI/Wan2.2-I2V-A14B-Diffusers\n",
        'hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --include "transformer*/*"\n',
        'hf download Kevin-thu/StoryMem --include "Wan2.2-MI2V-A14B/*"\n',
    ):
        assert f"  download: {command}" in result.stderr
    assert "69 GB" in result.stderr
    assert result.stderr.count("storymem download") == 1, "which lists the weights of the scorers too"


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} {ROOT / 'scripts' / 'generate.py'} --help | head -n 0"
    shell = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (0, 141)
    assert result.stderr == ""


def test_the_whole_configuration_can_be_printed(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--cfg", "job", "story.yaml", "sampler.steps=3", "model=wan2.2-a14b")
    assert result.returncode == 0
    config = yaml.safe_load(result.stdout)
    assert config["story"] == "story.yaml"
    assert config["sampler"]["steps"] == 3
    assert config["model"]["network"]["transformer"]["num_layers"] == 40
    assert config["scorer"]["quality"]["_target_"].startswith("storymem.scorers.hpsv3")
    assert "hydra" not in config


def test_a_script_outside_the_environment_prints_how_to_activate_it() -> None:
    for name in ("generate", "prepare_data", "train", "eval_stbench", "benchmark"):
        result = subprocess.run(
            [sys.executable, "-S", str(ROOT / "scripts" / f"{name}.py")],
            env={},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (result.returncode, result.stdout) == (1, "")
        assert "Traceback" not in result.stderr
        assert "source .venv/bin/activate" in result.stderr


# The console command


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["--version"], 0, f"storymem {__version__}"),
        (["--help"], 0, "generate   generate a film from a story"),
        ([], 0, "usage: storymem COMMAND"),
        (["generat", "a.yaml"], 2, "generat is not a command of storymem; did you mean 'generate'?"),
        (["train", "--help"], 0, "storymem train experiment=NAME dataset=FOLDER"),
        (["train", "--help"], 0, "\n  experiment: toy_holocine, "),
        (["evaluate", "--help"], 0, "\n  experiment: ablation_no_filter, "),
        (["benchmark", "--help"], 0, "usage: storymem benchmark"),
    ],
)
def test_the_console_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    printed: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["storymem", *arguments])
    ended = 0
    try:
        main()
    except SystemExit as stop:
        ended = int(stop.code or 0)
    captured = capsys.readouterr()
    assert ended == status
    assert printed in captured.out + captured.err


def test_download_lists_sizes_and_licences_and_fetches_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import huggingface_hub

    fetched: list[str] = []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "locate", raising(MissingWeights("not here")))
    monkeypatch.setattr(download, "_check_disk", lambda gigabytes: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, **_: fetched.append(source))
    overrides = ["model=wan2.2-a14b", "scorer/quality=none"]
    for flags, expected in ([], 0), (["--yes"], 4):
        monkeypatch.setattr(sys, "argv", ["storymem", "download", *overrides, *flags])
        main()
        assert len(fetched) == expected
    printed = capsys.readouterr().out
    assert re.search(r"69 GB +Wan2.2-I2V-A14B +Wan-AI/Wan2.2-I2V-A14B-Diffusers +Apache-2.0", printed)
    assert re.search(r"4.9 GB +StoryMem memory adapter .* CC BY-NC 4.0", printed)
    assert "Nothing was fetched: add --yes" in printed


# In this process


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command with another function in place of its own: its exit status and its errors."""

    def script(
        *arguments: str, main: Callable[[Any], Any] = lambda config: None, name: str = "generate"
    ) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["storymem", *arguments])
        try:
            run_command(name, COMMANDS[name]._replace(run=main))
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err.strip()

    return script


def test_main_is_given_the_composed_configuration(script: Callable[..., tuple[int, str]]) -> None:
    seen: list[Any] = []
    assert script("my story.yaml", "sampler.steps=3", "runtime=cpu", main=seen.append) == (0, "")
    assert (seen[0]["story"], seen[0]["sampler"]["steps"], seen[0]["runtime"]["device"]) == ("my story.yaml", 3, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "story is missing; write: storymem generate story.yaml"),
        (["a.yaml", "--seed=3"], "--seed=3: settings are written without dashes; write seed=3"),
        (["a.yaml", "--dry-run"], "--dry-run: settings are written without dashes; write dry_run=..."),
        (["a.yaml", "seed=1,2"], "seed=1,2: write one value, such as seed=1"),
        (["a.yaml", "model=toy,tiny"], "model=toy,tiny: write one value, such as model=toy"),
        (["a.yaml", "model.adapters=1,2"], "model.adapters=1,2: write a list in brackets, model.adapters=[1,2]"),
        (["a.yaml", "samplr.steps=3"], "samplr: unknown key; did you mean 'sampler'?"),
        (["a.yaml", "sampler.stepps=3"], "sampler.stepps: unknown key; did you mean 'steps'?"),
        (["a.yaml", "steps=3"], "steps: unknown key; did you mean 'sampler.steps'?"),
        (["a.yaml", "device=cuda"], "device: unknown key; did you mean 'runtime.device'?"),
        (["a.yaml", "model=tiny", "model.weights.source=x"], "model.weights.source: unknown key"),
        (["a.yaml", "model.heigth=3"], "model.heigth: unknown key; did you mean 'model.video.height'?"),
        (["stories/x=1.yaml"], "stories/x=...: no such group (--help lists them), and no such file"),
        (
            ["a.yaml", "memory/recal=relevant"],
            "memory/recal=...: no such group (--help lists them), and no such file; did you mean memory/recall=...?",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(
    script: Callable[..., tuple[int, str]], arguments: list[str], message: str
) -> None:
    assert script(*arguments) == (2, message)


@pytest.mark.parametrize(
    ("command", "choice", "message"),
    [
        ("generate", "model=tinny", "'model/tinny'; choices of model: tiny, toy, wan2.2-a14b"),
        ("train", "experiment=nope", "'experiment/nope'; choices of experiment: toy_"),
        ("evaluate", "metrics=[stbench,tiy]", "'metrics/tiy'; choices of metrics: cuts, entities, faces"),
    ],
)
def test_an_unknown_choice_is_reported_with_those_there_are(
    script: Callable[..., tuple[int, str]], command: str, choice: str, message: str
) -> None:
    status, error = script(choice, name=command)
    assert (status, error.startswith(f"Could not find {message}")) == (2, True)
    assert error.endswith("did you mean 'tiny'?") == ("ti" in choice)


@pytest.mark.parametrize(
    ("command", "experiment", "choices"),
    [
        ("train", "stbench_toy", "choices of experiment here: toy_holocine, "),
        ("evaluate", "toy_m2v", "choices of experiment here: ablation_no_filter, "),
        ("generate", "toy_m2v", "this one has no experiments"),
    ],
)
def test_an_experiment_of_another_command_is_reported(
    script: Callable[..., tuple[int, str]], command: str, experiment: str, choices: str
) -> None:
    status, error = script(f"experiment={experiment}", name=command)
    assert (status, error.startswith(f"experiment={experiment} is of another command; {choices}")) == (2, True)


def test_a_key_of_the_same_name_elsewhere_is_suggested_only_if_it_is_the_only_one(
    script: Callable[..., tuple[int, str]],
) -> None:
    for key in ("optimizer.name", "optimizer.nam"):
        status, error = script(f"{key}=adam", name="train")
        assert (status, error.startswith(f"{key}: unknown key; known are: betas, ema_decay, lr")) == (2, True)


def test_a_missing_idea_is_asked_for_in_words(script: Callable[..., tuple[int, str]]) -> None:
    assert script(name="write") == (2, 'idea is missing; write: storymem write "a lost seal"')


def test_train_asks_for_an_experiment_and_a_training_set(script: Callable[..., tuple[int, str]]) -> None:
    message = "dataset is missing; write: storymem train experiment=NAME dataset=FOLDER"
    assert script(name="train") == (2, message)


def test_errors_of_our_own_checks_are_the_users(script: Callable[..., tuple[int, str]]) -> None:
    from storymem.story import load_story

    status, error = script("absent.yaml", main=lambda config: load_story(config["story"]) and None)
    assert (status, error) == (2, "absent.yaml: the file does not exist; expected a story file; check the path")


def test_the_error_of_a_part_is_reported_alone(script: Callable[..., tuple[int, str]]) -> None:
    from hydra.utils import instantiate

    arguments = ("a.yaml", "model=tiny", "memory.recall.sink=99")
    status, error = script(*arguments, main=lambda config: instantiate(config["memory"]["recall"]))
    assert (status, error.startswith("sink=99 does not fit into capacity=10")) == (2, True)


@pytest.mark.parametrize(
    "fault",
    [
        *(RuntimeError("out of memory"), ValueError("inside a library"), KeyError("x"), OSError("of a library")),
        ConnectionResetError(errno.ECONNRESET, "reset"),
    ],
)
def test_faults_of_the_program_keep_their_traceback(script: Callable[..., tuple[int, str]], fault: Exception) -> None:
    with pytest.raises(type(fault)):
        script("a.yaml", main=raising(fault))


def test_an_interrupt_is_not_an_error(script: Callable[..., tuple[int, str]]) -> None:
    def stop(config: Any) -> None:
        raise KeyboardInterrupt

    assert script("a.yaml", main=stop) == (130, "stopped; the same command resumes")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generate", ["a.yaml", "seed=1,2", "dry_run=true"]),
        ("evaluate", ["method=independent,storymem", "dry_run=true"]),
        ("download", ["model=tiny,toy"]),
    ],
)
def test_a_dry_run_of_several_jobs_leaves_nothing(
    script: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    assert script("-m", *words, main=seen.append, name=name) == (0, "")
    assert len(seen) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_a_configuration_file_names_the_file(script: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    for name, content in {"open": b"steps: [", "latin": b"# \xe9\nsteps: 3", "deep": b"[" * 5000}.items():
        (tmp_path / "sampler" / f"{name}.yaml").write_bytes(content)
        status, error = script("a.yaml", "--config-dir", str(tmp_path), f"sampler={name}")
        assert status == 2
        assert error.startswith(f"{tmp_path}/sampler/{name}.yaml is not YAML in UTF-8")


def test_flags_that_do_not_go_together_are_reported(script: Callable[..., tuple[int, str]]) -> None:
    status, error = script("a.yaml", "--cfg", "job", "-m")
    assert (status, error.startswith("Only one of --run, --multirun, --cfg")) == (2, True)


def raising(error: Exception) -> Callable[[Any], None]:
    """A main in which a library raises ``error``."""
    code = compile("raise error", "library.py", "exec")

    def main(config: Any) -> None:
        exec(code, {"error": error, "__name__": "library"})

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), "the disk is full; make room and run the same command again"),
        (OSError(errno.EACCES, "no", "a/b"), "a/b: permission denied; choose another path, or ask its owner"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x: File name too long"),
        (FileError("shard.bin is damaged"), "shard.bin is damaged"),
    ],
)
def test_errors_of_files_are_reported_wherever_they_are_raised(
    script: Callable[..., tuple[int, str]], error: Exception, message: str
) -> None:
    assert script("a.yaml", main=raising(error)) == (2, message)


def test_what_a_writer_raises_on_a_full_disk_is_reported_with_the_file(
    script: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def main(config: Any) -> None:
        with replacing(tmp_path / "x.bin"):
            raising(RuntimeError("unexpected pos 814848 vs 814800: No space left on device"))(config)

    status, error = script("a.yaml", main=main)
    assert (status, error.startswith(f"{tmp_path}/x.bin could not be written: the disk is full")) == (2, True)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "idna", "utf-16"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_streams_take_every_character(
    script: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, encoding: str, stream: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    status, _ = script("a.yaml", main=lambda config: print("林黛玉 🎬 \udcc3", file=getattr(sys, stream), flush=True))
    assert status == 0
    assert written.getvalue()


# Choosing a `_target_`


@pytest.mark.parametrize(
    ("arguments", "node", "content"),
    [
        (["memory.recall={_target_: mine.Recall}"], "memory.recall", {}),
        (["memory.recall._target_=mine.Recall"], "memory.recall", {}),
        (["memory.recall._target_=mine.Recall", "memory.recall.top=2"], "memory.recall", {"top": 2}),
        (["memory.recall.top=2", "memory.recall._target_=mine.Recall"], "memory.recall", {"top": 2}),
        (["memory.selector={_target_: mine.Recall, most: 3, name: é}"], "memory.selector", {"most": 3, "name": "é"}),
        (["scorer.clip={_target_: mine.Recall, folder: 2026}"], "scorer.clip", {"folder": "2026"}),
        (["memory/recall=characters", "++scorer.quality={_target_: mine.Recall}"], "scorer.quality", {}),
    ],
)
def test_a_target_chosen_on_the_command_line_replaces_the_node(
    script: Callable[..., tuple[int, str]], arguments: list[str], node: str, content: dict[str, Any]
) -> None:
    seen: list[Any] = []
    assert script("a.yaml", *arguments, main=seen.append) == (0, "")
    assert OmegaConf.select(OmegaConf.create(seen[0]), node) == {"_target_": "mine.Recall", **content}


def test_without_a_target_a_node_keeps_its_class(script: Callable[..., tuple[int, str]]) -> None:
    seen: list[Any] = []
    assert script("a.yaml", "memory.recall={capacity: 4}", main=seen.append) == (0, "")
    recall = seen[0]["memory"]["recall"]
    assert (recall["_target_"], recall["capacity"], recall["sink"]) == ("storymem.memory.SinkAndRecent", 4, 3)


def test_a_node_that_does_not_exist_is_reported(script: Callable[..., tuple[int, str]]) -> None:
    error = script("a.yaml", "memory.recal={_target_: mine.Recall}")
    assert error == (2, "memory.recal: unknown key; did you mean 'recall'?")


def test_a_class_in_the_working_folder_is_found(
    script: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.utils import instantiate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "policies_of_my_own.py").write_text("class Recall:\n    pass\n")
    made: list[Any] = []
    arguments = ("a.yaml", "memory.recall={_target_: policies_of_my_own.Recall}")
    assert script(*arguments, main=lambda config: made.append(instantiate(config["memory"]["recall"]))) == (0, "")
    assert type(made[0]).__name__ == "Recall"


# Values that Hydra cannot read


@pytest.mark.parametrize("value", ["4)", "é", "9" * 5000, "[" * 3000 + "]" * 3000])
def test_a_value_that_hydra_cannot_read_is_reported_by_the_settings(
    script: Callable[..., tuple[int, str]], value: str
) -> None:
    def main(config: Any) -> None:
        build_settings(GenerateSettings, config)

    status, error = script("a.yaml", "model=tiny", f"seed={value}", main=main)
    assert status == 2
    assert re.match(r"  seed: .*integer", error.splitlines()[1])


@pytest.mark.parametrize("argument", ["été=3", "my key=3", "no setting"])
def test_what_is_no_setting_is_reported_without_grammar(script: Callable[..., tuple[int, str]], argument: str) -> None:
    status, error = script(argument, name="prepare")
    assert status == 2
    assert error.startswith(f"{argument}: not a setting; write key=value")
    assert not re.search("mismatched|token recognition|hydra.cc", error)
    advice = shlex.split(error.rsplit(": ", 1)[1])[0].replace("key", "captions")
    seen: list[Any] = []
    assert script(advice, "videos=x", "output=y", name="prepare", main=seen.append) == (0, "")
    assert seen[0]["captions"] == "a, b"
