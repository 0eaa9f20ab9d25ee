"""Several processes make what one makes: the latents of a shot, and a film, which they end and resume together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from storymem.film.folder import Film
from storymem.film.processes import LOST
from storymem.media.video import read_video
from tests import processes, stories

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What the processes left: files, exit statuses by scenario, and all that they printed."""

    folder: Path
    statuses: dict[str, list[int]]
    stderr: str


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", "tests.processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return Left(folder=folder, statuses=json.loads((folder / "statuses.json").read_text()), stderr=done.stderr)


@cache
def alone(case: processes.Case) -> dict[str, Tensor]:
    """The shots of a case by one process."""
    assert case.world == 1
    return processes.shots(case, case.load())


def test_all_shots_were_made(left: Left) -> None:
    assert [*left.statuses["two"], *left.statuses["four"]] == [0] * 6, left.stderr


@pytest.mark.parametrize("name", processes.CASES)
def test_latents_are_those_of_one_process(left: Left, name: str) -> None:
    case = processes.CASES[name]
    expected = alone(case.alone)
    assert (expected["32_0"] - expected["32_3"]).abs().max() > 1e-3, "memory must matter for this test to show anything"
    for rank in range(case.world):
        found = load_file(left.folder / f"{name}_{rank}.safetensors")
        shots = [shot for shot in found if not shot.startswith("work")]
        assert {f"32_{frames}" for frames in processes.MEMORY} <= set(shots)
        for shot in shots:
            torch.testing.assert_close(found[shot], expected[shot], rtol=1e-5, atol=1e-5, msg=f"{shot} on rank {rank}")


@pytest.mark.parametrize("name", [name for name, case in processes.CASES.items() if case.memory == "joint"])
def test_each_process_does_its_part_of_the_work_and_no_more(left: Left, name: str) -> None:
    case = processes.CASES[name]
    files = [load_file(left.folder / f"{name}_{rank}.safetensors") for rank in range(case.world)]
    for shot in (shot for shot in files[0] if shot.startswith("work")):
        work = [file[shot].item() for file in files]
        assert sum(work) == alone(case.alone)[shot].item()
        assert max(work) <= 1.3 * sum(work) / case.world


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_every_layout_shares_its_tokens(left: Left, method: str) -> None:
    assert left.statuses[method] == [0, 0], left.stderr
    expected = processes.layout_predictions()
    for rank in range(2):
        found = load_file(left.folder / f"layouts_{method}_{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, prediction in found.items():
            torch.testing.assert_close(prediction, expected[name], rtol=1e-5, atol=1e-5, msg=f"{name} on rank {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_without_guidance_is_refused_where_guidance_is_divided(left: Left, rank: int) -> None:
    assert "guidance_scale must be above 1" in (left.folder / f"unguided_{rank}").read_text()


def test_a_film_by_two_is_that_of_one(left: Left, tmp_path: Path) -> None:
    assert left.statuses["film"] == [0, 0]
    same_film(left.folder / "whole" / "film", made_alone(tmp_path))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_film_goes_on(left: Left, tmp_path: Path, killed: int) -> None:
    statuses = left.statuses[f"killed_{killed}"]
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1
    assert left.statuses[f"resumed_{killed}"] == [0, 0]
    same_film(left.folder / f"killed_{killed}" / "film", made_alone(tmp_path))


def test_the_loss_of_a_process_is_reported_once(left: Left) -> None:
    assert left.stderr.count(LOST) == 2, "once for each of two films"


def test_a_mistake_found_by_the_first_process_ends_the_others(left: Left) -> None:
    assert left.statuses["unfit"] == [1, 0]
    assert (left.folder / "dismissed_1").exists()
    assert left.stderr.count("ValueError: found by the first process") == 1


def test_torchrun_makes_a_film_and_prints_its_path_once(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(stories.FOUR_SHOTS)
    overrides = ["model=tiny", "runtime=cpu", "runtime.guidance_parallel=true", "sampler.steps=1", "output=film"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "scripts" / "generate.py"), "story.yaml", *overrides),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["film/film.mp4"]
    assert len(Film.open(tmp_path / "film").shots) == 4


def test_teams_make_films_at_the_same_time(tmp_path: Path) -> None:
    for title in ("Red", "Green", "Blue"):
        text = stories.FOUR_SHOTS.replace("title: Four", f"title: {title}")
        (tmp_path / f"{title}.yaml").write_text(text)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"),
        *(str(ROOT / "scripts" / "generate.py"), "Red.yaml", "Green.yaml", "Blue.yaml"),
        *("model=tiny", "runtime=cpu", "runtime.guidance_parallel=true", "runtime.processes_per_film=2"),
        *("sampler.steps=1", "output=out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [f"out/{name}/film.mp4" for name in ("blue", "green", "red")]
    assert done.stderr.count("2 processes: prompt and negative prompt at the same time") == 2, "one line a team"


def made_alone(folder: Path) -> Path:
    """The film that one process makes."""
    story = stories.story(folder, stories.FOUR_SHOTS)
    return stories.storyteller().tell(story, folder / "film").folder


def same_film(one: Path, other: Path) -> None:
    """Half the work on each process is still the same work: the films agree to the last bit."""
    assert records(one) == records(other)
    assert (read_video(one / "film.mp4") == read_video(other / "film.mp4")).all()


def records(film: Path) -> list[dict[str, Any]]:
    return [asdict(shot) | {"seconds": None} for shot in Film.open(film).shots]
