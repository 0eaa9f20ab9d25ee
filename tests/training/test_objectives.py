"""The objectives: what of a training set each trains on, by the command and by its samples and loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storymem.config import CONFIGS, ConfigError, build_settings
from storymem.training.objectives.settings import OBJECTIVES, MemoryObjectiveSettings
from storymem.training.settings import TrainSettings
from storymem.wan.lora_files import AdapterInfo, LoraFile
from tests.composing import composed
from tests.training.commands import TRAIN, train
from tests.training.tiny import config, read_metrics


def settings(*overrides: str) -> TrainSettings:
    return build_settings(TrainSettings, composed("dataset=x", *overrides, name="train"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_chosen(name: str) -> None:
    chosen = settings(f"objective={name}", "sampler.shift=3.5").objective
    assert type(chosen) is OBJECTIVES[name]
    assert (chosen.system, chosen.shift) == (name, 3.5)


def test_the_embedded_model_trains_without_an_experiment() -> None:
    assert settings().objective == MemoryObjectiveSettings(memory_weight=None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("experiment/toy_*.yaml")), ids=lambda path: path.stem)
def test_experiments_find_what_they_name_in_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples = settings(f"experiment={path.stem}").samples
    assert samples.story is None or Path(samples.story).is_file()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"mask_weigth": 4}, r"objective\.mask_weigth: unknown key; did you mean 'mask_weight'"),
        ({"_target_": "nothing.here"}, r"objective: _target_=nothing\.here cannot be imported"),
        ({"_target_": "storymem.story.Story"}, r"_target_=storymem\.story\.Story is no objective"),
        (7, "objective: is not keys with values: 7"),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, node: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, config(tmp_path, objective=node))


# Other systems, by the command


def options(training_set: Path, folder: Path) -> list[str]:
    """A training set with a file of scenes."""
    scenes = folder / "scenes.jsonl"
    lines = [f'{{"folder": "{number}", "caption": "Tiles of scene {number}."}}\n' for number in range(3)]
    scenes.write_text("".join(lines))
    return [f"dataset={training_set}", f"objective.scenes={scenes}", "validation.every=2", "validation.samples=2"]


@pytest.mark.parametrize("sparse", ["true", "false"])
def test_holocine_trains_and_its_adapter_names_it(sparse: str, training_set: Path, tmp_path: Path) -> None:
    chosen = ["objective=holocine", f"objective.sparse={sparse}", *options(training_set, tmp_path)]
    status, printed = train(*chosen, "steps=2", f"output={tmp_path / 'run'}", folder=tmp_path)
    assert status == 0, printed
    assert "encoding 3 texts that the training set does not hold" in printed
    assert described(tmp_path / "run").objective == "holocine"
    (row,) = (row for row in read_metrics(tmp_path / "run") if "valid_video_loss_high_noise" in row)
    assert row["valid_loss_high_noise"] == pytest.approx(row["valid_video_loss_high_noise"])


def test_panels_are_trained(training_set: Path, tmp_path: Path) -> None:
    chosen = ["objective=pictures", "objective.text_tokens=64", "objective.panels=0.5", f"dataset={training_set}"]
    status, printed = train(*chosen, "steps=4", f"output={tmp_path / 'run'}", folder=tmp_path)
    assert status == 0, printed
    assert "encoding 2 texts" in printed, "a joint caption for each group of three clips that trains"
    assert described(tmp_path / "run").objective == "pictures"


def test_a_prepared_set_is_trained_on_without_a_reader_of_videos(training_set: Path, tmp_path: Path) -> None:
    """In a process in which PyAV does not exist; texts and blank images are encoded first."""
    code = "import sys; sys.modules['av'] = None; from storymem.commands.cli import main; main()"
    chosen = ["objective=pictures", "objective.text_tokens=64", "objective.panels=0.5", f"dataset={training_set}"]
    arguments = ["train", *TRAIN, *chosen, "steps=1", f"output={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "encoding 2 texts" in ended.stderr
    assert described(tmp_path / "run").objective == "pictures"


def test_a_run_resumes_exactly_and_encodes_its_texts_once(training_set: Path, tmp_path: Path) -> None:
    common = ["objective=lct", *options(training_set, tmp_path), "checkpoint.every=2"]
    for steps, name in ((4, "whole"), (2, "parts"), (4, "parts")):
        status, printed = train(*common, f"steps={steps}", f"output={tmp_path / name}", folder=tmp_path / "printed")
        assert status == 0, printed
    assert "resuming after step 2" in printed
    assert "texts that" not in printed
    one, other = (load_file(tmp_path / name / "storymem" / "high_noise.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(bool(tensor.any()) for name, tensor in one.items() if "lora_B" in name)
    # Another objective may start from it, and it is reported.
    start = f"adapter.start={tmp_path / 'whole' / 'storymem'}"
    status, printed = train(start, f"dataset={training_set}", "steps=1", f"output={tmp_path / 'm'}", folder=tmp_path)
    assert status == 0, printed
    assert "was trained with objective=lct, now objective=memory" in printed
    assert "memory_attention=" not in printed, "which is the same"
    status, printed = train(
        *(start, f"dataset={training_set}", "steps=1", "dry_run=true", f"output={tmp_path / 'n'}"),
        *("model.memory_attention=cached", "model.rope_stride=1"),
        folder=tmp_path,
    )
    assert status == 0, printed
    assert "was trained with memory_attention=joint, now memory_attention=cached" in printed
    assert "was trained with rope_stride=5, now rope_stride=1" in printed


def described(run: Path) -> AdapterInfo:
    info = LoraFile(run / "storymem" / "high_noise.safetensors").info
    assert info is not None
    return info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("objective=holocine", "samples.every=2", "samples.story=examples/the_keeper.yaml"),
            "samples.every=2: no film",
        ),
        (("objective=lct", "conditioning=mi2v"), "conditioning=mi2v: lct is given no frames"),
        (("objective=holocine", "objective.scenes=absent.jsonl"), "objective.scenes=absent.jsonl is no file"),
        (("objective=lct", "objective.min_shots=4"), "no group of train clips has 4 clips of one height and width"),
        (("objective=pictures", "objective.memory_weight=0"), "objective.memory_weight: unknown key"),
    ],
)
def test_what_a_system_cannot_use_is_refused(
    arguments: tuple[str, ...], message: str, training_set: Path, tmp_path: Path
) -> None:
    status, printed = train(*arguments, f"dataset={training_set}", f"output={tmp_path / 'run'}", folder=tmp_path)
    assert status == 2
    assert message in printed
    assert not (tmp_path / "run").exists()
