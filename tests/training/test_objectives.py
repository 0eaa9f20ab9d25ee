"""The objectives: what of a training set each trains on, by the command and by its samples and loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from storymem.composition import composed
from storymem.config import CONFIGS, ConfigError, build_settings
from storymem.training.objectives.settings import OBJECTIVES, MemoryObjectiveSettings
from storymem.training.settings import TrainSettings
from tests.training.tiny import config


def settings(*overrides: str) -> TrainSettings:
    return build_settings(TrainSettings, composed("train", ["dataset=x", *overrides]))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml")))
def test_every_objective_can_be_chosen(name: str) -> None:
    chosen = settings(f"objective={name}", "sampler.shift=3.5").objective
    assert type(chosen) is OBJECTIVES[name]
    assert (chosen.system, chosen.shift) == (name, 3.5)


def test_the_embedded_model_trains_without_an_experiment() -> None:
    assert settings().objective == MemoryObjectiveSettings(memory_weight=None)


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
