"""Training without an adapter: all parameters of the experts train, and the export is a model that commands load."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem.config import build_settings
from storymem.data.cache import cache_fingerprint
from storymem.data.settings import Bucket, DataSettings
from storymem.training.resume import check_run_folder
from storymem.training.session import Run
from storymem.training.settings import TrainSettings
from storymem.wan.loading import load_pipeline
from storymem.wan.spec import experts_of
from storymem.weights import Weights
from tests import stories
from tests.training.commands import train
from tests.training.tiny import config, read_metrics, run
from tests.wan import tiny

WHOLE: dict[str, Any] = {"adapter": None, "steps": 4, "checkpoint": {"every": 2, "keep": 2}}
SIZE = {"height": 32, "width": 48, "num_frames": 9}


def finished(folder: Path, **changes: Any) -> Run:
    ready = run(folder, **WHOLE | changes)
    ready.trainer.run()
    ready.finish()
    return ready


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("whole") / "run")


def exported(folder: Path) -> Any:
    """The networks of the folder ``model`` of a run, as a command loads them."""
    weights = Weights(name="trained", source=str(folder / "model"))
    return load_pipeline(replace(stories.MODEL, weights=weights, has_text_to_video=False), runtime=tiny.CPU)


def test_every_parameter_trains_and_the_exported_model_has_their_average(trained: Run) -> None:
    base = experts_of(load_pipeline(stories.MODEL, runtime=tiny.CPU))
    pipe, average = exported(trained.folder), trained.trainer.average
    assert average is not None
    for expert, network in experts_of(pipe).items():
        names = dict(network.named_parameters())
        assert {f"{expert}/{name}" for name in names} <= trained.trainer.parameters.keys()
        for name, parameter in names.items():
            assert torch.equal(parameter, average.values[f"{expert}/{name}"])
            assert not torch.equal(parameter, base[expert].get_parameter(name)), f"{name} did not train"
    assert tiny.generate(pipe, **SIZE).isfinite().all()
    assert not list(trained.folder.rglob("*lora*"))


def test_it_resumes_exactly(trained: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    again = finished(folder)
    assert again.resumed is not None
    assert again.resumed.step == 2
    for name, value in trained.trainer.whole_parameters().items():
        assert torch.equal(value, again.trainer.parameters[name]), name
    assert [row["loss"] for row in read_metrics(folder)] == [row["loss"] for row in read_metrics(trained.folder)]


def test_one_expert_trains_and_the_other_is_exported_as_it_was(tmp_path: Path) -> None:
    ready = finished(tmp_path / "run", expert="low", steps=1, optimizer={"lr": 0.01, "warmup_steps": 0})
    base, experts = experts_of(load_pipeline(stories.MODEL, runtime=tiny.CPU)), experts_of(exported(ready.folder))
    high, low = experts["high_noise"], experts["low_noise"]
    assert all(torch.equal(p, base["high_noise"].get_parameter(n)) for n, p in high.named_parameters())
    assert any(not torch.equal(p, base["low_noise"].get_parameter(n)) for n, p in low.named_parameters())


def test_an_adapter_run_is_another_run(trained: Run) -> None:
    values = config(trained.folder)
    with pytest.raises(ValueError, match=r"(?s)cannot be resumed with:.*adapter"):
        check_run_folder(trained.folder, build_settings(TrainSettings, values), values)


def test_what_did_not_train_keeps_its_files(trained: Run, tmp_path: Path) -> None:
    """So a cache of the base is one of the trained model, on which an adapter can be trained next."""
    weights = {"name": "mine", "source": str(trained.folder / "model")}
    model = asdict(stories.MODEL) | {"weights": weights, "has_text_to_video": False}
    again = finished(tmp_path / "run", model=model, steps=1)
    data = DataSettings(buckets=(Bucket(frames=9, height=32, width=48),), fps=8)
    new = replace(again.settings.model, weights=Weights(name="new", source=str(again.folder / "model")))
    assert cache_fingerprint(new, data) == cache_fingerprint(again.settings.model, data)
    assert tiny.generate(exported(again.folder), **SIZE).isfinite().all()


@pytest.mark.trains_in_forks
def test_the_command_trains_and_exports(training_set: Path, tmp_path: Path) -> None:
    arguments = (f"dataset={training_set}", f"output={tmp_path / 'run'}", "adapter=null", "steps=1")
    status, printed = train(*arguments, folder=tmp_path)
    assert (status, str(tmp_path / "run" / "model") in printed) == (0, True), printed
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} >= {"model_index.json", "transformer", "vae"}
