"""The command line as Hydra overrides: text needs no quotes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from storymem.config import build_settings
from storymem.data.settings import PrepareSettings
from storymem.film.settings import GenerateSettings
from storymem.overrides import hydra_arguments
from tests.composing import composed


def test_the_story_becomes_an_override() -> None:
    assert hydra_arguments(["a.yaml", "seed=1"], "story") == ["seed=1", "story='a.yaml'"]
    assert hydra_arguments(["seed=1", "~memory.recall", "+x=1"], "story") == ["seed=1", "~memory.recall", "+x=1"]
    assert hydra_arguments([], "story") == []


@pytest.mark.parametrize("flag", ["--cfg", "-c", "--info", "-i", "--config-dir", "-cd", "--package", "-p"])
def test_a_flags_value_is_not_the_story(flag: str) -> None:
    assert hydra_arguments([flag, "job", "a.yaml"], "story") == [flag, "job", "story='a.yaml'"]
    assert hydra_arguments(["a.yaml", flag, "job"], "story") == [flag, "job", "story='a.yaml'"]
    assert hydra_arguments([flag, "model"], "story", GenerateSettings) == [flag, "model"]


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
    for name in ("x=1", "output=film", "films/x=2"):
        (tmp_path / name).mkdir(parents=True)
    assert hydra_arguments(["x=1"], "story", GenerateSettings) == ["story='x=1'"]
    assert hydra_arguments(["films/x=2"], "story", GenerateSettings) == ["story='films/x=2'"]
    assert hydra_arguments(["output=film"], "story", GenerateSettings) == ["output='film'"]


def test_several_stories_become_a_list() -> None:
    (override,) = hydra_arguments(["a.yaml", "it's, b.yaml"], "story")
    assert OverridesParser.create().parse_override(override).value() == ["a.yaml", "it's, b.yaml"]
    assert hydra_arguments(["a.yaml", "seed=1", "b.yaml"], "story") == ["seed=1", "story=['a.yaml','b.yaml']"]


# Text needs no quotes

TEXTS = (
    *r"""
my clips [v1] (final)
run=1
out(2)
20261126
1e3
0x10
true
films/été
a,b
[x]
{a: b}
blurry, low quality
a:b
C:\Users\me\x y\
\\server\share
it's
say "hi"
50%
a#b
x & y; z
!x
${x}
a\${b
${seed
<a|b>
*
林黛玉🎬
nm/set=1
-x
@a
$HOME
choice(a,b)
""".strip().splitlines(),
    "a\nb",
    "a\tb",
    "a\u202fb",
)
TEXT_KEYS = [
    "output",
    "resume",
    "sampler.negative_prompt",
    "model.name",
    "model.weights.source",
    "model.adapter.weights.file",
    "model.gguf.low_noise.source",
    "sampler.adapter.weights.source",
    "model.adapter.folders.mi2v",
    "runtime.device",
    "scorer.clip.folder",
    "scorer.quality.source",
    "+memory.selector.file",
]


def given(*arguments: str, settings: type = GenerateSettings) -> list[Any]:
    """The values that Hydra and OmegaConf make of overrides."""
    parsed = OverridesParser.create().parse_overrides(hydra_arguments(arguments, "story", settings))
    assert not any(override.is_sweep_override() for override in parsed)
    config = OmegaConf.create({"values": [override.value() for override in parsed], "seed": 7})
    return OmegaConf.to_container(config, resolve=True)["values"]  # type: ignore[call-overload, index, no-any-return]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_reaches_every_text_setting_as_it_was_written(text: str) -> None:
    assert given(*(f"{key}={text}" for key in TEXT_KEYS)) == [text] * len(TEXT_KEYS)


def test_texts_of_the_other_scripts() -> None:
    arguments = ("videos=my clips [v1] (final)", "output=20261126", "captions=a,b.csv", "masks=null", "steps=[split]")
    assert given(*arguments, settings=PrepareSettings) == [
        *("my clips [v1] (final)", "20261126", "a,b.csv", None, ["split"])
    ]


def test_what_is_quoted_or_null_stays() -> None:
    assert given("output=null", "output='null'", 'output="a, b"', "output='it\\'s'", "output=") == [
        *(None, "null", "a, b", "it's", "")
    ]


def test_lists_and_mappings_of_texts() -> None:
    assert given("story=[a b.yaml, 2026, 'x, y', films/é]") == [["a b.yaml", "2026", "x, y", "films/é"]]
    assert given("model.adapter.folders={none: a b, mi2v: 7}") == [{"none": "a b", "mi2v": "7"}]
    weights = {"name": "Q4, mine", "source": "/m/é.gguf", "size_gb": 9.5}
    low = "{name: 'Q4, mine', source: /m/é.gguf, size_gb: 9.5}"
    assert given(f"model.gguf={{high_noise: {low}, low_noise: {low}}}") == [
        {"high_noise": weights, "low_noise": weights}
    ]


def test_numbers_and_interpolations_stay_what_they_are() -> None:
    assert given("seed=3", "sampler.guidance=1e1", "dry_run=true", "output=films/${seed}") == [3, 10.0, True, "films/7"]


def test_sweeps_are_asked_for_by_m() -> None:
    assert hydra_arguments(
        ["-m", "output=é/a, 20261126,'b,c'", "seed=1,2", "sampler.steps=range(1,3)"], None, GenerateSettings
    ) == [*("-m", "output='é/a','20261126','b,c'", "seed=1,2", "sampler.steps=range(1,3)")]
    assert hydra_arguments(["output=a,b"], None, GenerateSettings) == ["output='a,b'"]


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = composed(*hydra_arguments(["~/a b.yaml", "output=~/films/é"], "story", GenerateSettings))
    settings = build_settings(GenerateSettings, values)
    assert (settings.story, settings.output) == ("/home/me/a b.yaml", "/home/me/films/é")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match="output: is empty; write a path"):
        build_settings(GenerateSettings, composed("story=a.yaml", "output=''"))
