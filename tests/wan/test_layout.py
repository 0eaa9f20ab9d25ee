"""How processes share a film, and what is refused before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storymem.wan.layout import Launch, Layout, divide, find_layout
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings
from tests.wan import tiny

ROOT = Path(__file__).parents[2]
GUIDED = SamplerSettings(guidance=3.5)


def layout(
    world: int, *, model: ModelSettings | None = None, sampler: SamplerSettings = GUIDED, **runtime: Any
) -> Layout:
    return find_layout(
        RuntimeSettings(**runtime),
        Launch(rank=world - 1, world=world, local_rank=world - 1, local_world=world),
        model=model or tiny.settings(),
        sampler=sampler,
    )


def many_heads(heads: int) -> ModelSettings:
    values = tiny.settings()
    values.network.transformer["num_attention_heads"] = heads
    return values


def test_no_torch_is_loaded() -> None:
    code = "import sys; sys.modules['torch'] = None; import storymem.wan.layout"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchrun_says_which_process_this_is() -> None:
    said = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert Launch.of_environment(said) == Launch(rank=9, world=16, local_rank=1, local_world=8)
    assert not Launch.of_environment(said).is_first
    assert Launch.of_environment({}) == Launch()
    assert Launch().is_first


def test_processes_in_teams_divide_the_films() -> None:
    started = [Launch(rank=rank, world=8, local_rank=rank, local_world=8) for rank in range(8)]
    teams = [launch.in_teams(4) for launch in started]
    assert [(one.team, one.rank) for one in teams] == [(rank // 4, rank % 4) for rank in range(8)]
    assert {(one.teams, one.world, one.local_world) for one in teams} == {(2, 4, 8)}
    assert [one.local_rank for one in teams] == list(range(8)), "a team's processes keep their own accelerators"
    assert [one.is_first for one in teams] == [True, False, False, False] * 2
    assert [one.share("abcde") for one in teams] == ["ace"] * 4 + ["bd"] * 4
    assert [launch.in_teams(None) for launch in started] == started
    assert started[3].in_teams(None).share("abc") == "abc"
    with pytest.raises(ValueError, match=r"processes_per_film=3 and 8 processes .* of which 2 would have no film"):
        started[0].in_teams(3)


def test_a_team_of_one_takes_the_accelerator_of_its_number() -> None:
    alone = Launch(rank=1, world=2, local_rank=1, local_world=2).in_teams(1)
    assert find_layout(RuntimeSettings(), alone, model=tiny.settings(), sampler=GUIDED) == Layout()
    with pytest.raises(ValueError, match="takes the device of its own number"):
        find_layout(RuntimeSettings(device="cuda:1"), alone, model=tiny.settings(), sampler=GUIDED)


@pytest.mark.parametrize(
    ("world", "runtime", "mesh"),
    [
        (1, {}, {"guidance": 1, "ring": 1, "ulysses": 1}),
        (4, {"context_parallel": "ulysses"}, {"guidance": 1, "ring": 1, "ulysses": 4}),
        (3, {"context_parallel": "ring"}, {"guidance": 1, "ring": 3, "ulysses": 1}),
        (2, {"guidance_parallel": True}, {"guidance": 2, "ring": 1, "ulysses": 1}),
        (8, {"context_parallel": "ulysses", "guidance_parallel": True}, {"guidance": 2, "ring": 1, "ulysses": 4}),
        (8, {"context_parallel": "ring", "guidance_parallel": True}, {"guidance": 2, "ring": 4, "ulysses": 1}),
        (2, {"context_parallel": "ulysses", "guidance_parallel": True}, {"guidance": 2, "ring": 1, "ulysses": 1}),
    ],
)
def test_all_processes_have_a_place_in_the_mesh(world: int, runtime: dict[str, Any], mesh: dict[str, int]) -> None:
    found = divide(RuntimeSettings(**runtime), world)
    assert found.mesh == mesh
    assert found.guidance * found.context == world


def test_the_layout_says_what_it_is() -> None:
    assert str(divide(RuntimeSettings(), 1)) == "one process"
    both = divide(RuntimeSettings(context_parallel="ulysses", guidance_parallel=True), 8)
    assert str(both) == "8 processes: prompt and negative prompt at the same time, tokens shared among 4 (ulysses)"


@pytest.mark.parametrize(
    ("world", "runtime", "message"),
    [
        (1, {"context_parallel": "ulysses"}, "context_parallel=ulysses .* there is one: start it with torchrun"),
        (1, {"guidance_parallel": True}, "guidance_parallel=true .* there is one"),
        (1, {"shard_weights": True}, "shard_weights=true .* there is one"),
        (2, {}, "2 processes were started and nothing says how they share the film: write runtime=multi-gpu"),
        (2, {"shard_weights": True}, "nothing says how they share the film"),
        (3, {"guidance_parallel": True, "context_parallel": "ring"}, "two equal halves, and 3 processes"),
        (4, {"guidance_parallel": True}, "has work for 2 processes and 4 were started: add runtime.context_parallel"),
        (2, {"guidance_parallel": True, "device": "cuda:1"}, "write runtime.device=cuda or auto"),
        (2, {"guidance_parallel": True, "offload": "group"}, "offload=group .* runtime.shard_weights=true"),
        (2, {"context_parallel": "ulysses", "offload": "model"}, "offload=model does not go together"),
        (2, {"guidance_parallel": True, "shard_weights": True, "cache": "first_block"}, "cache=first_block skips"),
        (2, {"context_parallel": "ring", "attention": "native"}, "log-sum-exp.*attention=cudnn"),
        (2, {"context_parallel": "ring", "device": "cpu"}, "log-sum-exp.*context_parallel=ulysses"),
        (2, {"context_parallel": "ulysses", "attention": "flash3"}, "attention=flash3 is not among the kernels"),
        (2, {"context_parallel": "ulysses", "shard_weights": True, "compile": "blocks"}, "compile=blocks does not go"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(world: int, runtime: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout(world, **runtime)


def test_the_settings_themselves_refuse_two_ways_for_guidance_and_processes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"guidance_batch.*guidance_parallel"):
        RuntimeSettings(guidance_parallel=True, guidance_batch=True)
    with pytest.raises(ValueError, match=r"first_block does not combine with context_parallel"):
        RuntimeSettings(context_parallel="ulysses", cache="first_block")


def test_heads_must_divide_for_ulysses_alone() -> None:
    with pytest.raises(ValueError, match=r"each of 5 processes .* 12 attention heads.*divide them \(2, 3, 4, 6, 12\)"):
        layout(5, model=many_heads(12), context_parallel="ulysses")
    assert layout(3, model=many_heads(12), context_parallel="ulysses").context == 3
    assert layout(5, model=many_heads(12), context_parallel="ring").context == 5


def test_guidance_must_have_two_passes() -> None:
    with pytest.raises(ValueError, match=r"sampler.guidance=1 runs no second pass"):
        layout(2, sampler=SamplerSettings(guidance=1.0), guidance_parallel=True)


def test_cached_memory_is_shared_but_not_recomputed() -> None:
    cached = tiny.settings(memory_attention="cached")
    assert layout(2, model=cached, context_parallel="ulysses").context == 2
    with pytest.raises(ValueError, match=r"memory_cache=recompute.*write runtime.memory_cache=device or cpu"):
        layout(2, model=cached, context_parallel="ulysses", memory_cache="recompute")


@pytest.mark.parametrize(
    ("rank", "said"), [("0", "2 processes were started and nothing says how they share"), ("1", "")]
)
def test_one_of_the_processes_tells_the_mistake(tmp_path: Path, rank: str, said: str) -> None:
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
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)
