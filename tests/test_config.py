"""Strict settings: every error is reported with its full path, all of them at once."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

from storymem.config import ConfigError, build_settings
from storymem.data.settings import PrepareSettings
from storymem.film.settings import GenerateSettings
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings, VideoSettings
from storymem.weights import Weights

VALUES: dict[str, Any] = {
    "story": "story.yaml",
    "model": {
        "name": "tiny",
        "video": {"height": 64, "width": 96, "frames": 17, "fps": 8},
        "network": {
            "transformer": {
                **{"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 12},
                **{"ffn_dim": 8, "text_dim": 8, "freq_dim": 8},
            }
        },
    },
    "sampler": {},
    "memory": {"recall": {"_target_": "a.B"}, "selector": {"_target_": "a.B"}},
    "scorer": {"clip": {"_target_": "a.B"}, "quality": {"_target_": "a.B"}},
}


def changed(**changes: Any) -> dict[str, Any]:
    """VALUES with ``a__b=value`` set at a.b."""
    values = deepcopy(VALUES)
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return values


def complaints(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        build_settings(GenerateSettings, changed(**changes))
    first, *lines = str(error.value).splitlines()
    assert first == "the configuration is not valid:"
    return [line.strip() for line in lines]


def test_plain_values_become_nested_settings_with_their_defaults() -> None:
    settings = build_settings(GenerateSettings, VALUES)
    assert settings.model.video == VideoSettings(height=64, width=96, frames=17, fps=8)
    assert settings.model.rope_stride == 5
    assert (settings.sampler.steps, settings.sampler.guidance, settings.sampler.shift) == (40, 3.5, 4.0)
    assert (settings.continuity, settings.first_shot, settings.seed, settings.output) == ("mi2v", "auto", 0, None)
    assert settings.runtime == RuntimeSettings()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("sed", "sed: unknown key; did you mean 'seed'?"),
        ("Seed", "Seed: unknown key; did you mean 'seed'?"),
        ("model__rope_strid", "model.rope_strid: unknown key; did you mean 'rope_stride'?"),
        ("model__video__heigth", "model.video.heigth: unknown key; did you mean 'height'?"),
        ("sampler__guidance_lo", "sampler.guidance_lo: unknown key; did you mean 'guidance_low'?"),
        ("model__video__Colour", "model.video.Colour: unknown key; known are: fps, frames, height, width"),
    ],
)
def test_an_unknown_key_is_reported_with_its_path_and_nearest_neighbour(path: str, line: str) -> None:
    assert complaints(**{path: 1}) == [line]


def test_a_wrong_value_is_reported_only_for_the_member_of_a_union_that_has_its_type() -> None:
    assert complaints(story="") == ["story: is empty; write a path"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"capacity": -1}, "memory.recall.capacity=-1, sink=3: neither may be negative"),
        ({"capacity": "x"}, "memory.recall.capacity: input should be a valid integer, not 'x'"),
        ({"sinkk": 1}, "memory.recall.sinkk: unknown key; did you mean 'sink'?"),
    ],
)
def test_a_policys_arguments_are_checked_with_the_other_settings(values: dict[str, Any], line: str) -> None:
    recall = {"_target_": "storymem.memory.SinkAndRecent", **values}
    assert complaints(memory__recall=recall, sed=1) == [line, "sed: unknown key; did you mean 'seed'?"]


def test_unknown_keys_are_found_below_optional_settings() -> None:
    weights = {"name": "a", "source": "b", "sizegb": 1}
    assert complaints(model__weights=weights, model__has_text_to_video=False) == [
        "model.weights.sizegb: unknown key; did you mean 'size_gb'?"
    ]
    lines = complaints(model__adapter={"weights": weights, "alfa": 1})
    assert "model.adapter.alfa: unknown key; did you mean 'alpha'?" in lines
    assert "model.adapter.weights.sizegb: unknown key; did you mean 'size_gb'?" in lines


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("seed", "abc", "seed: input should be a valid integer, not 'abc'"),
        ("sampler__steps", 2.5, "sampler.steps: .*integer.*, not 2.5"),
        ("model__name", 3, "model.name: input should be a valid string, not 3"),
        ("model__video", "large", "model.video: .*keys.*, not 'large'; its keys are height, width, frames, fps"),
        ("model__adapters", "a", "model.adapters: input should be a list, not 'a'; write model.adapters=.*"),
        ("model__adapters", ["a"], "model.adapters.0: .*keys.*, not 'a'; its keys are source, weight, expert"),
        ("memory__recall", "mine", "memory.recall: .*keys.*, not 'mine'; write memory/recall=NAME to choose .*name"),
        ("model__dtype", "float8", "model.dtype: input should be 'float32', 'bfloat16' or 'float16', not 'float8'"),
        ("continuity", "i2v", "continuity: input should be 'none', 'mi2v' or 'mm2v', not 'i2v'"),
        ("runtime__offload", "disk", "runtime.offload: input should be 'none', 'model', 'group' or 'auto', not 'disk'"),
        ("dry_run", "perhaps", "dry_run: .*boolean.*, not 'perhaps'"),
    ],
)
def test_a_wrong_type_is_reported_with_what_was_written(path: str, value: Any, line: str) -> None:
    (found,) = complaints(**{path: value})
    assert re.fullmatch(line, found), found


def test_a_wrong_key_of_a_mapping_is_named() -> None:
    adapter = {"weights": {"name": "a", "source": "b"}, "folders": {"i2v": "x"}}
    assert complaints(model__adapter=adapter) == [
        "model.adapter.folders.i2v: input should be 'none', 'mi2v' or 'mm2v', not 'i2v'"
    ]


def test_a_missing_key_is_reported() -> None:
    values = changed()
    del values["story"], values["model"]["video"]["fps"]
    with pytest.raises(ConfigError) as error:
        build_settings(GenerateSettings, values)
    assert "story: is missing" in str(error.value)
    assert "model.video.fps: is missing" in str(error.value)


def test_all_errors_are_reported_at_once() -> None:
    lines = complaints(sed=1, continuity="i2v", model__video__heigth=2, sampler__steps=0)
    assert len(lines) == 4
    assert {line.split(":")[0] for line in lines} == {"sed", "continuity", "model.video.heigth", "sampler"}


def test_settings_that_contradict_each_other() -> None:
    (line,) = complaints(sampler__guidance=1.0, sampler__guidance_low=3.0)
    assert line.startswith("sampler: guidance_low needs guidance above 1")
    (line,) = complaints(model__weights={"name": "a", "source": "b"})
    assert line == "model: text_to_video names no weights: give them, or set has_text_to_video to false"


@pytest.mark.parametrize("settings", [SamplerSettings, RuntimeSettings, ModelSettings, Weights])
def test_settings_are_strict_wherever_they_are_built(settings: type) -> None:
    with pytest.raises(ValueError, match="colour"):
        settings(colour="red")


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_is_what_a_generator_takes(seed: int) -> None:
    assert complaints(seed=seed)[0].startswith("seed ") or complaints(seed=seed)[0].startswith("seed: ")


def test_a_node_without_a_class_is_reported_with_how_to_name_one() -> None:
    assert complaints(memory__recall={"capacity": 3}) == [
        "memory.recall names no class: write memory.recall._target_=package.module.Class"
    ]


def test_text_in_place_of_a_list_is_reported_with_how_to_write_one() -> None:
    values = {"videos": "a", "output": "b", "steps": "split"}
    with pytest.raises(ConfigError, match=r"steps: input should be a list, not 'split'; write steps=\[split\]"):
        build_settings(PrepareSettings, values)


def test_a_long_value_is_shortened() -> None:
    assert len(complaints(continuity="x" * 100_000)[0]) < 200


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = build_settings(GenerateSettings, changed(output="~/films", story=["~/a.yaml", "b~.yaml"]))
    assert (settings.output, settings.story) == ("/home/me/films", ("/home/me/a.yaml", "b~.yaml"))
    assert complaints(output=" ") == ["output: is empty; write a path"]
