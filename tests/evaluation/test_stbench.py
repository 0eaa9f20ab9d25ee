"""The whole command, from films to tables: alone, among several workers, and once more after a kill."""

from __future__ import annotations

import csv
import json
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem.config import ConfigError
from storymem.evaluation.scoring import metric_settings
from storymem.evaluation.stbench import System, build_metrics, evaluate, find_systems, score
from storymem.evaluation.workers import Workers
from tests.composing import composed
from tests.evaluation import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stories, filmed by two systems; of the second a shot is missing."""
    told = small.stories(tmp_path / "stories")
    small.write_films(tmp_path / "one", told)
    small.write_films(tmp_path / "two", told, seed=1)
    (tmp_path / "two" / "the_red_boat" / "01_02.mp4").unlink()
    return tmp_path


def config(folder: Path, *overrides: str) -> dict[str, Any]:
    where = (f"stbench.stories={folder}/stories", f"output={folder}/out", "metrics=[tiny]")
    return {"label": None, **composed(*where, *overrides, name="eval_stbench")}


def test_films_become_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(config(folder, f"films={{one: {folder}/one, two: {folder}/two}}"))
    assert results is not None
    written = json.loads((folder / "out" / "results.json").read_text())
    one, two = written["systems"]["one"]["columns"], written["systems"]["two"]["columns"]
    assert all(found["mean"] is not None and found["complete"] == found["expected"] for found in one.values())
    assert one["identity_consistency"]["expected"] == 1, "the other story lists no characters"
    without = {name for name, found in two.items() if found["mean"] is None}
    assert without >= {"aesthetic_quality", "consistency_overall"}
    assert two["aesthetic_quality"]["complete"] == 1
    assert two["aesthetic_quality"]["lacking"] == {"The Red Boat": "missing: shot 2 (scene 1, shot 2)"}
    assert written["systems"]["two"]["missing"] == [
        "The Red Boat, shot 2 (scene 1, shot 2): there is no file 01_02.mp4"
    ]
    assert written["texts"] == {"read": 7, "truncated": 0}
    assert written["metrics"]["viclip"]["top_rule"] == "prompts"
    assert len(written["metrics"]["viclip"]["weights_sha256"]) == 64
    (comparison,) = written["comparisons"]
    assert comparison["columns"]["aesthetic_quality"]["stories"] == 1
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "out" / "results.md").read_text().strip()
    assert "shot 2 (scene 1, shot 2): there is no file 01_02.mp4" in printed
    with (folder / "out" / "results.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    of_two = [row for row in rows if row["system"] == "two" and row["story"] == "The Red Boat"]
    lost = [row for row in of_two if row["level"] == "pair" and row["item"] == "1-2"]
    assert all(row["value"] == "" and row["reason"] == "there is no file 01_02.mp4" for row in lost)
    assert len({row["column"] for row in lost}) == 3


def test_a_second_run_scores_only_what_has_changed(folder: Path) -> None:
    run = config(folder, f"films={folder}/one")
    evaluate(run)
    boat, cat = (folder / "out" / "stories" / "one" / f"{name}.json" for name in ("the_red_boat", "a_cat"))
    before, times = json.loads(boat.read_text()), (boat.stat().st_mtime_ns, cat.stat().st_mtime_ns)
    boat.write_text(boat.read_text()[:100])  # as a broken disk would leave it
    evaluate(run)
    assert json.loads(boat.read_text()) == before
    assert (boat.stat().st_mtime_ns != times[0], cat.stat().st_mtime_ns == times[1]) == (True, True)
    (folder / "one" / "a_cat" / "01_02.mp4").unlink()
    evaluate(run)
    assert cat.stat().st_mtime_ns != times[1]
    assert sorted(path.name for path in (folder / "out" / "stories" / "one" / "a_cat").iterdir()) == ["01.jpg"]


def values(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def test_neither_order_nor_workers_nor_batches_change_the_values(folder: Path, tmp_path: Path) -> None:
    stories = small.stories(tmp_path / "stories")
    systems = [System(name="one", films=folder / "one")]
    metrics = build_metrics(small.nodes())
    measured = metric_settings(metrics)
    alone = score(systems, stories, metrics, measured, tmp_path / "alone", Workers())
    score(systems, stories[::-1], metrics, measured, tmp_path / "backwards", Workers())
    for rank in (1, 0):
        score(systems, stories, metrics, measured, tmp_path / "shared", _Apart(rank=rank, world=2))
    score(systems, stories, small_batches(), measured, tmp_path / "batches", Workers())
    expected = values(tmp_path / "alone")
    assert len(expected) == 2
    assert values(tmp_path / "backwards") == values(tmp_path / "shared") == expected
    assert [result.title for result in alone["one"]] == ["The Red Boat", "A Cat"]
    batches = values(tmp_path / "batches")
    for name, result in expected.items():
        for metric, scores in result["scores"].items():
            assert batches[name]["scores"][metric]["columns"] == pytest.approx(scores["columns"], abs=2e-6)


class _Apart(Workers):
    """Workers of this process, one after the other."""

    def wait_for_all(self) -> None:
        pass


def small_batches() -> dict[str, Any]:
    nodes: dict[str, Any] = small.nodes()  # type: ignore[assignment]
    for node in nodes.values():
        for scorer in ("scorer", "embedder"):
            if scorer in node:
                node[scorer]["batch_size"] = 1
    return build_metrics(nodes)


def _work(rank: int, port: int, run: dict[str, Any]) -> None:
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    evaluate(run)


def test_two_processes_share_the_stories(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = config(folder, f"films={folder}/one")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(rank, port, run)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    shared = json.loads((folder / "out" / "results.json").read_text())
    evaluate({**run, "output": str(folder / "alone")})
    alone = json.loads((folder / "alone" / "results.json").read_text())
    assert shared["systems"] == alone["systems"]


def test_workers_are_those_of_the_launcher() -> None:
    assert Workers.of_environment({}) == Workers()
    launched = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert Workers.of_environment(launched) == Workers(rank=9, world=16, local_rank=1, address="head:1234")
    assert Workers.of_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}) == Workers(), "a plain allocation"
    shares = [Workers(rank=rank, world=3).share(range(8)) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(8))


def test_a_dry_run_says_what_is_missing_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = f"films={{one: {folder}/one, two: {folder}/two}}"
    assert evaluate(config(folder, films, "method=storymem", "dry_run=true")) is None
    printed = capsys.readouterr().out
    assert "2 stories, 5 shots" in printed
    assert "one: 5 of 5 shots" in printed
    assert "two: 4 of 5 shots" in printed
    assert "The Red Boat: the_red_boat, #_# (scene from 1, shot from 1)" in printed, "which folder serves which story"
    assert "The Red Boat: there is no file 01_02.mp4" in printed
    assert "storymem: 0 of 5 shots" in printed
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "what shall be scored"),
        (["films=nowhere"], "films=nowhere: there is no such folder"),
        (["films=one", "+stbench.stores=x"], "stbench.stores: unknown key; did you mean 'stories'"),
        (["films=one", "statistics.level=95"], "write a share"),
        (["films={storymem: one}", "method=storymem"], "two systems are called storymem"),
        (["films={a/b: one}"], "a system cannot be called 'a/b'"),
        (["films={..: one}"], r"a system cannot be called '\.\.'"),
        (["films=/"], "a system cannot be called ''"),
    ],
)
def test_mistakes_are_told_before_anything_is_scored(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        evaluate(config(folder, *overrides))
    assert not (folder / "out").exists()


def test_metrics_with_a_column_twice_are_refused() -> None:
    nodes = small.nodes()
    with pytest.raises(ValueError, match="two of them measure identity_consistency"):
        build_metrics({**nodes, "again": nodes["identity"]})
    with pytest.raises(ValueError, match="there are none"):
        build_metrics({})


def test_an_experiment_gives_its_name_to_the_method(folder: Path) -> None:
    from storymem.config import build_settings
    from storymem.evaluation.stbench import EvaluateSettings

    composition = config(folder, "method=storymem", "experiment=ablation_no_sink")
    settings = build_settings(EvaluateSettings, composition | {"label": "ablation_no_sink"})
    (system,) = find_systems(settings, composition, None)
    assert system.name == "ablation_no_sink"
    assert system.films == folder / "out" / "films" / "ablation_no_sink"
    assert system.method is not None
    assert system.method["generate"]["memory"]["recall"]["sink"] == 0
