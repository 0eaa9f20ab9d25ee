"""Every file of the evaluation's groups is composed and built, and changes what its name promises."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from storymem.commands.cli import CONFIGS
from storymem.config import build_settings
from storymem.evaluation.choosing import compose_with_method
from storymem.evaluation.films import stories_of
from storymem.evaluation.metric import Metric
from storymem.evaluation.stbench import EvaluateSettings
from storymem.film.settings import GenerateSettings
from storymem.methods import Method
from storymem.training.settings import TrainSettings
from storymem.weights import MissingWeights
from tests.composing import composed


def files(group: str, pattern: str = "*.yaml") -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob(pattern))


def evaluation(*overrides: str) -> EvaluateSettings:
    return build_settings(EvaluateSettings, composed(*overrides, name="eval_stbench"))


def test_the_defaults_are_complete() -> None:
    settings = evaluation()
    assert (settings.films, settings.method, settings.methods) == (None, None, ())
    assert settings.stbench.stories == "st_bench/stories"
    assert list(settings.metrics) == ["aesthetic", "viclip"]
    assert settings.metrics["viclip"]["scorer"]["size"] == "L-14", "what stands beside the paper's rows is the paper's"
    assert set(composed(name="eval_stbench")) == set(EvaluateSettings.__dataclass_fields__)


@pytest.mark.parametrize("name", files("metrics"))
def test_metrics(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each builds, or names the weights or the library it lacks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for node in evaluation(f"metrics=[{name}]").metrics.values():
        assert Metric in get_object(node["_target_"]).__mro__
        try:
            assert instantiate(node).columns
        except InstantiationException as error:
            assert name != "tiny"
            assert isinstance(error.__cause__, MissingWeights) or "pip install" in str(error.__cause__)  # noqa: PT017
        with pytest.raises(InstantiationException, match="colour"):
            instantiate({key: value for key, value in node.items() if not isinstance(value, dict)}, colour=1)


def test_the_papers_columns_are_measured_as_the_paper_does() -> None:
    metrics = evaluation("metrics=[stbench,identity-clip,cuts]").metrics
    assert list(metrics) == ["aesthetic", "viclip", "identity", "cuts"]
    assert metrics["aesthetic"]["scorer"]["version"] == "v1"
    assert metrics["viclip"]["scorer"]["size"] == "L-14"


@pytest.mark.parametrize("name", files("method"))
def test_methods(name: str) -> None:
    method = instantiate(evaluation(f"method={name}", "model=tiny", "runtime=cpu", "seed=4").method, _convert_="all")
    assert isinstance(method, Method)
    assert (method.settings.seed, method.settings.model.name) == (4, "tiny")


@pytest.mark.parametrize("name", ["storymem_relevant", "storymem_characters"])
def test_methods_that_know_who_is_in_memory_differ_in_their_recall_alone(name: str) -> None:
    plain, other = (flat(compose_with_method(name, [])["method"]) for name in ("storymem", name))
    changed = {key for key in plain.keys() | other.keys() if plain.get(key) != other.get(key)}
    assert changed == {f"generate.memory.recall.{key}" for key in ("_target_", "references", "relevant", "balance")}
    assert other["generate.memory.recall._target_"] == "storymem.memory.Relevant"
    assert (other["generate.memory.recall.relevant"] == 0) == (name == "storymem_characters")


CHANGES: dict[str, dict[str, Any]] = {
    "ablation_no_selection": {"memory.selector._target_": "storymem.memory.UniformSelector"},
    "ablation_no_filter": {"scorer.quality._target_": "storymem.scorers.scorer.NoQuality"},
    "ablation_no_sink": {"memory.recall.sink": 0, "memory.recall.capacity": 10},
    "ablation_published_guidance": {"sampler.negative_sees_memory": True},
    "ablation_no_memory": {"memory.recall.sink": 0, "memory.recall.capacity": 0},
}
#: Training -> what is changed of model=toy, beside the adapter.
VARIANTS: dict[str, dict[str, Any]] = {
    "toy_m2v": {"model.memory_attention": "joint"},
    "toy_plus_subject": {},
    **{
        run: {"memory.recall._target_": "storymem.memory.Learned", "memory.recall.sink": 0, "memory.recall.whole": 2}
        for run in ("toy_plus_query", "toy_plus")
    },
}


def flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}" if path else key).items()}


@cache
def of_model(model: str) -> dict[str, Any]:
    return composed("story=s.yaml", f"model={model}")


def test_every_ablation_is_known_here() -> None:
    assert set(files("experiment", "ablation_*.yaml")) == CHANGES.keys() | {
        f"ablation_{run.replace('m2v', 'joint')}" for run in VARIANTS
    }


BEHIND_A_MODEL = {  # what the model's file sets too
    "ablation_no_selection": "wan2.2-a14b",
    "ablation_no_filter": "wan2.2-a14b",
    "ablation_published_guidance": "toy",
}


@pytest.mark.parametrize(("name", "model"), [*((name, "tiny") for name in CHANGES), *BEHIND_A_MODEL.items()])
def test_ablations_change_what_they_say_and_nothing_else(name: str, model: str) -> None:
    # In a comparison, with the settings of a film, and behind a method: all the same.
    plain = of_model(model)
    generated = composed("story=s.yaml", f"model={model}", f"+experiment={name}")
    build_settings(GenerateSettings, generated)
    compared = compose_with_method(name, [f"model={model}", "methods=[storymem]", "method=independent"])
    of_method = compared["method"]["generate"]
    before, after = flat(plain), flat(generated)
    assert {key: after[key] for key in CHANGES[name]} == CHANGES[name]
    changed = tuple(key.removesuffix("._target_") for key in CHANGES[name])  # with a target, all its settings change
    others = {key for key in before.keys() | after.keys() if not key.startswith(changed)}
    assert all(before[key] == after[key] for key in others)
    assert all(flat(of_method[group]) == flat(generated[group]) for group in ("model", "memory", "sampler"))
    assert of_method["scorer"]["quality"] == generated["scorer"]["quality"]
    instantiate(of_method["memory"]["recall"])
    instantiate(of_method["memory"]["selector"])


@pytest.mark.parametrize("run", VARIANTS)
def test_variants_of_storymem_are_compared_after_equal_training(run: str) -> None:
    plain = flat(of_model("toy"))
    composed_film = composed("story=s.yaml", f"+experiment=ablation_{run.replace('m2v', 'joint')}")
    adapter = {
        "model.adapter.weights.name": f"the adapter that `storymem train experiment={run}` makes",
        "model.adapter.weights.source": f"runs/{run}/storymem",
    }
    unlike = {key: value for key, value in flat(composed_film).items() if plain.get(key, ...) != value}
    assert unlike == adapter | VARIANTS[run]
    trained, shipped = (
        build_settings(TrainSettings, composed(f"experiment={name}", "dataset=x", name="train"))
        for name in (run, "toy_m2v_cached")
    )
    same = ("steps", "batch", "adapter", "optimizer", "seed", "conditioning")
    assert all(getattr(trained, name) == getattr(shipped, name) for name in same), "equal training"
    film = build_settings(GenerateSettings, composed_film)
    assert trained.model.memory_attention == film.model.memory_attention
    assert trained.objective.made_for(trained) == "memory"
    if run != "toy_m2v":
        objective: Any = trained.objective
        assert (objective.subject_weight > 0, objective.query) == ("query" not in run, "subject" not in run)
        assert objective.local + objective.whole == film.memory.recall["capacity"]
        assert film.model.adapter is not None
        assert film.model.adapter.query == objective.query


def test_unknown_methods_are_reported_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="no 'ablation_no_sinks'; did you mean 'ablation_no_sink'"):
        compose_with_method("ablation_no_sinks", [])


# The toy stories


@pytest.mark.parametrize("name", files("experiment", "stbench_*.yaml"))
def test_a_benchmark_names_stories_and_methods_that_exist(name: str) -> None:
    settings = evaluation(f"experiment={name}")
    found = stories_of(CONFIGS.parent / settings.stbench.stories, settings.stbench.only)
    assert len(found) == len(settings.stbench.only or range(30))
    assert (settings.model.name, settings.scorer["quality"]["folder"]) == ("toy", "package:toyworld/weights/clip")
    assert settings.method is None
    known = {*files("method"), *files("experiment", "ablation_*.yaml")}
    assert settings.methods[0] == ("storymem" if name.endswith("variants") else "independent"), "the others' baseline"
    assert set(settings.methods) <= known
    assert Path(settings.output).name == name


def test_the_quick_benchmark_has_stories_of_every_kind_and_is_a_part_of_the_whole() -> None:
    quick, whole = (evaluation(f"experiment={name}") for name in ("stbench_toy_quick", "stbench_toy"))
    found = stories_of(CONFIGS.parent / quick.stbench.stories, quick.stbench.only)
    assert [len(story.characters) for story in found] == [1, 1, 2, 2, 3, 3]
    assert set(quick.methods) < set(whole.methods)
    assert quick.metrics == whole.metrics
    assert {"ablation_no_selection", "ablation_no_filter", "ablation_no_sink"} < set(whole.methods), "table 2"


@pytest.mark.parametrize("name", ["independent", "ablation_no_filter"])
def test_methods_of_a_benchmark_keep_its_settings(name: str) -> None:
    of_method = compose_with_method(name, ["experiment=stbench_toy", "sampler.steps=3", "+experiment=ablation_no_sink"])
    generate = of_method["method"]["generate"]
    assert (generate["model"]["name"], generate["sampler"]["steps"]) == ("toy", 3)
    assert of_method["stbench"]["stories"] == "st_bench/toy"
    assert generate["memory"]["recall"]["sink"] > 0, "another ablation is not kept"
    filtered = generate["scorer"]["quality"]["_target_"] != "storymem.scorers.scorer.NoQuality"
    assert filtered == (name == "independent")


@pytest.mark.parametrize("name", ["ablation_no_selection", "ablation_no_filter", "ablation_no_sink"])
def test_the_ablations_of_the_toy_benchmark_change_nothing_else(name: str) -> None:
    plain, other = (
        flat(compose_with_method(one, ["experiment=stbench_toy"])["method"]["generate"]) for one in ("storymem", name)
    )
    unlike = {key for key in plain.keys() | other.keys() if plain.get(key) != other.get(key)}
    changed = CHANGES[name].keys() - {"memory.recall.capacity"}
    assert {key: other[key] for key in changed} == {key: CHANGES[name][key] for key in changed}
    assert unlike
    assert all(key.startswith(tuple(key.removesuffix("._target_") for key in changed)) for key in unlike)


@pytest.mark.parametrize("name", files("hydra/launcher"))
def test_launchers(name: str) -> None:
    raw = OmegaConf.to_container(OmegaConf.load(CONFIGS / "hydra" / "launcher" / f"{name}.yaml"))
    assert isinstance(raw, dict)
    assert raw.pop("defaults") == [f"submitit_{name}"]
    plugin = pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher.config", reason="an extra: pip install 'storymem[cluster]'"
    )
    known = {"slurm": plugin.SlurmQueueConf, "local": plugin.LocalQueueConf}[name]
    assert raw.keys() <= known.__dataclass_fields__.keys()
