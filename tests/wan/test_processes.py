"""How processes share films, and which settings go together; what they make together is in tests/test_processes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem.config import ConfigError, build_settings
from storymem.data.settings import PrepareSettings
from storymem.film.generate import build_storyteller
from storymem.training.settings import TrainSettings
from storymem.wan.combinations import check_combinations
from storymem.wan.loading import load_pipeline
from storymem.wan.parallel import can_share_tokens
from storymem.wan.processes import Grid, Launch, divide, find_grid
from storymem.wan.runtime import check_runtime
from storymem.wan.settings import (
    ModelSettings,
    RuntimeSettings,
    SamplerSettings,
    StepAdapterSettings,
)
from storymem.weights import Weights
from tests.composing import composed, generate_settings
from tests.training.tiny import config
from tests.wan import tiny

ROOT = Path(__file__).parents[2]
GUIDED = SamplerSettings(guidance=3.5)


def model(layers: int = 2, heads: int = 2, **changes: Any) -> ModelSettings:
    network = asdict(tiny.settings().network)
    network["transformer"] |= {"num_layers": layers, "num_attention_heads": heads}
    return tiny.settings(network=network, **changes)


def grid(world: int, *, of: ModelSettings | None = None, sampler: SamplerSettings = GUIDED, **runtime: Any) -> Grid:
    launch = Launch(rank=world - 1, world=world, local_rank=world - 1, local_world=world)
    return find_grid(RuntimeSettings(**runtime), launch, model=of or model(), sampler=sampler)


def test_no_torch_is_loaded() -> None:
    code = "import sys; sys.modules['torch'] = None; import storymem.wan.processes"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_launcher_numbers_the_processes() -> None:
    environment = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert Launch.of_environment(environment) == Launch(rank=9, world=16, local_rank=1, local_world=8)
    assert not Launch.of_environment(environment).is_first
    assert Launch.of_environment({}) == Launch()
    assert Launch().is_first


def test_teams_divide_the_films() -> None:
    started = [Launch(rank=rank, world=8, local_rank=rank, local_world=8) for rank in range(8)]
    teams = [launch.in_teams(4) for launch in started]
    assert [(one.team, one.rank) for one in teams] == [(rank // 4, rank % 4) for rank in range(8)]
    assert {(one.teams, one.world, one.local_world) for one in teams} == {(2, 4, 8)}
    assert [one.local_rank for one in teams] == list(range(8)), "processes keep their own accelerators"
    assert [one.is_first for one in teams] == [True, False, False, False] * 2
    assert [one.share("abcde") for one in teams] == ["ace"] * 4 + ["bd"] * 4
    assert [launch.in_teams(None) for launch in started] == started
    with pytest.raises(ValueError, match=r"processes_per_film=3 and 8 processes .* of which 2 would have no film"):
        started[0].in_teams(3)


def test_a_team_of_one_takes_the_accelerator_of_its_number() -> None:
    alone = Launch(rank=1, world=2, local_rank=1, local_world=2).in_teams(1)
    assert find_grid(RuntimeSettings(), alone, model=model(), sampler=GUIDED) == Grid()
    with pytest.raises(ValueError, match="takes the device of its own number"):
        find_grid(RuntimeSettings(device="cuda:1"), alone, model=model(), sampler=GUIDED)


@pytest.mark.parametrize(
    ("world", "runtime", "mesh"),
    [
        (1, {}, (1, 1, 1)),
        (4, {"context_parallel": "ulysses"}, (1, 1, 4)),
        (3, {"context_parallel": "ring"}, (1, 3, 1)),
        (2, {"guidance_parallel": True}, (2, 1, 1)),
        (8, {"context_parallel": "ulysses", "guidance_parallel": True}, (2, 1, 4)),
        (8, {"context_parallel": "ring", "guidance_parallel": True}, (2, 4, 1)),
        (2, {"context_parallel": "ulysses", "guidance_parallel": True}, (2, 1, 1)),
    ],
)
def test_all_processes_have_a_place_in_the_mesh(world: int, runtime: dict[str, Any], mesh: tuple[int, ...]) -> None:
    found = divide(RuntimeSettings(**runtime), world)
    assert found.mesh == dict(zip(("guidance", "ring", "ulysses"), mesh, strict=True))
    assert found.guidance * found.context == world


def test_a_grid_is_described() -> None:
    assert str(Grid()) == "one process"
    both = divide(RuntimeSettings(context_parallel="ulysses", guidance_parallel=True), 8)
    assert str(both) == "8 processes: prompt and negative prompt at the same time, tokens shared among 4 (ulysses)"


@pytest.mark.parametrize(
    ("world", "runtime", "message"),
    [
        (1, {"context_parallel": "ulysses"}, "context_parallel=ulysses .* there is one: start it with torchrun"),
        (1, {"guidance_parallel": True}, "guidance_parallel=true .* there is one"),
        (1, {"shard_weights": True}, "shard_weights=true .* there is one"),
        (2, {}, "2 processes were started and nothing specifies how they share the film: write runtime=multi-gpu"),
        (2, {"shard_weights": True}, "nothing specifies how they share the film"),
        (3, {"guidance_parallel": True, "context_parallel": "ring"}, "two equal halves, and 3 processes"),
        (4, {"guidance_parallel": True}, "has work for 2 processes and 4 were started: add runtime.context_parallel"),
        (2, {"guidance_parallel": True, "device": "cuda:1"}, "write runtime.device=cuda or auto"),
        (2, {"guidance_parallel": True, "offload": "group"}, "offload=group .* runtime.shard_weights=true"),
        (2, {"guidance_parallel": True, "shard_weights": True, "cache": "first_block"}, "cache=first_block skips"),
        (2, {"context_parallel": "ring", "attention": "native"}, "log-sum-exp.*attention=cudnn"),
        (2, {"context_parallel": "ring", "device": "cpu"}, "log-sum-exp.*context_parallel=ulysses"),
        (2, {"context_parallel": "ulysses", "attention": "flash3"}, "attention=flash3 is not among the kernels"),
        (2, {"context_parallel": "ulysses", "shard_weights": True, "compile": "blocks"}, "compile=blocks does not"),
        (2, {"context_parallel": "ulysses", "cache": "first_block"}, "would skip different steps"),
    ],
)
def test_what_processes_cannot_do_is_refused_with_what_to_write(
    world: int, runtime: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid(world, **runtime)


def test_heads_must_divide_for_ulysses_alone() -> None:
    with pytest.raises(ValueError, match=r"each of 5 processes .* 12 attention heads.*divide them \(2, 3, 4, 6, 12\)"):
        grid(5, of=model(heads=12), context_parallel="ulysses")
    assert grid(3, of=model(heads=12), context_parallel="ulysses").context == 3
    assert grid(5, of=model(heads=12), context_parallel="ring").context == 5


def test_guidance_must_have_two_passes() -> None:
    with pytest.raises(ValueError, match=r"sampler.guidance=1 runs no second pass"):
        grid(2, sampler=SamplerSettings(guidance=1.0), guidance_parallel=True)


UNSEEN = SamplerSettings(negative_sees_memory=False)
FEW_STEPS = SamplerSettings(adapter=StepAdapterSettings(weights=Weights(name="few", source="owner/few")), steps=4)


@pytest.mark.parametrize(
    ("of", "sampler", "runtime", "message"),
    [
        (model(), FEW_STEPS, {"cache": "first_block"}, r"the 4 steps of a step-distilled sampler do not"),
        (model(layers=1), GUIDED, {"cache": "first_block"}, "skips all blocks but the first.* have only one"),
        (model(), GUIDED, {"memory_cache": "cpu"}, r"memory_cache=cpu is for model\.memory_attention=cached"),
        (model(), GUIDED, {"precision": "fp8_storage", "compile": "blocks"}, "use runtime.precision=as_is or"),
        (model(), UNSEEN, {"guidance_parallel": True}, "needs what the other predicts"),
    ],
)
def test_settings_that_contradict_each_other(
    of: ModelSettings, sampler: SamplerSettings, runtime: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_combinations(of, sampler, RuntimeSettings(**runtime))
    check_combinations(of, sampler, RuntimeSettings())


def test_settings_that_are_wrong_alone() -> None:
    for values, message in (
        ({"cache_threshold": 0.1}, "needs a cache"),
        ({"cache": "taylor", "cache_threshold": 1.5}, "number of steps, not 1.5"),
        ({"attention": "flsh"}, "attention"),
    ):
        with pytest.raises(ValueError, match=message):
            build_settings(RuntimeSettings, values)


@pytest.mark.parametrize(("rank", "printed"), [("0", "2 processes were started and nothing specifies how"), ("1", "")])
def test_one_of_the_processes_reports_the_error(tmp_path: Path, rank: str, printed: str) -> None:
    (tmp_path / "story.yaml").write_text("title: One\noverview: A walk.\nscenes: [{shots: [{prompt: A dog.}]}]\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "story.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(printed)
    assert bool(done.stderr) == bool(printed)


# One process


def test_a_pipeline_for_several_processes_is_not_loaded_by_one() -> None:
    with pytest.raises(ValueError, match=r"guidance_parallel=true .* there is one: start it with torchrun"):
        load_pipeline(tiny.settings(), runtime=RuntimeSettings(device="cpu", guidance_parallel=True))
    settings = generate_settings("model=tiny", "runtime=cpu", "runtime.guidance_parallel=true")
    with pytest.raises(ValueError, match=r"are for scripts/generate.py, where several processes make one film"):
        build_storyteller(settings, {})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_tokens_are_shared_among_accelerators() -> None:
    with pytest.raises(ValueError, match=r"context_parallel=ulysses is for accelerators and this machine has none"):
        check_runtime(RuntimeSettings(context_parallel="ulysses"))


@pytest.mark.parametrize(
    ("backend", "ulysses", "ring"), [("native", True, False), ("_native_cudnn", True, True), ("_flash_3", False, False)]
)
def test_not_every_attention_kernel_can_share_tokens(backend: str, ulysses: bool, ring: bool) -> None:
    shared = [can_share_tokens(backend, method) for method in ("none", "ulysses", "ring")]
    assert shared == [True, ulysses, ring]


@pytest.mark.parametrize(("field", "value"), [("context_parallel", "ulysses"), ("guidance_parallel", True)])
def test_training_and_preparing_data_refuse_it_too(tmp_path: Path, field: str, value: object) -> None:
    message = rf"runtime\.{field}: unknown key"
    runtime = {"device": "cpu", field: value}
    with pytest.raises(ConfigError, match=message):
        build_settings(TrainSettings, config(tmp_path, runtime=runtime))
    prepare = composed("model=tiny", "videos=clips", "output=set", name="prepare_data")
    with pytest.raises(ConfigError, match=message):
        build_settings(PrepareSettings, prepare | {"runtime": runtime})
