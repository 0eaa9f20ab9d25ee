"""The whole command: from films to tables, in several processes, after a kill, and in a folder with other files."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from storymem.config import ConfigError
from storymem.evaluation.metrics import AestheticQuality, Appearance, ViclipScores
from storymem.evaluation.stbench import build_metrics, evaluate
from storymem.evaluation.workers import workers
from storymem.io import FileError
from storymem.wan.processes import Launch
from storymem.weights import MissingWeights
from tests.composing import composed
from tests.evaluation import small
from tests.evaluation.small import config, written
from tests.forking import fork
from tests.scorers import tiny
from tests.stories import single_thread

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def full_config(folder: Path, *overrides: str) -> dict[str, Any]:
    where = (f"stbench.stories={folder}/stories", f"output={folder}/out", "metrics=[tiny]")
    return composed(*where, *overrides, name="eval_stbench")


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in a process of its own: its status and both output streams."""

    def run(*arguments: str, largest: int | None = None) -> tuple[int, str, str]:
        def work() -> None:
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            os.environ["HOME"] = str(folder)
            where = [f"films={folder}/one", f"stbench.stories={folder}/stories", f"output={folder}/out"]
            sys.argv = ["eval_stbench.py", *where, *arguments]
            runpy.run_path(str(ROOT / "scripts" / "eval_stbench.py"), run_name="__main__")

        single_thread()
        (status,) = fork(1, work)
        return status, *capfd.readouterr()

    return run


def test_films_become_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_films(folder / "two", small.stories(folder / "stories"), seed=1)
    (folder / "two" / "the_red_boat" / "01_02.mp4").unlink()
    assert evaluate(full_config(folder, f"films={{one: {folder}/one, two: {folder}/two}}")) is not None
    results = written(folder)
    one, two = results["systems"]["one"]["columns"], results["systems"]["two"]["columns"]
    whole = {
        name: found for name, found in one.items() if not name.startswith("entity_")
    }  # untrained, they find nobody
    assert all(found["complete"] == found["expected"] for found in whole.values())
    assert all(found["mean"] is not None for found in whole.values() if found["expected"])
    assert one["identity_consistency"]["expected"] == 1, "the other story lists no characters"
    assert {name for name, found in two.items() if found["mean"] is None} >= {
        "aesthetic_quality",
        "consistency_overall",
    }
    assert two["aesthetic_quality"]["complete"] == 1
    assert two["aesthetic_quality"]["lacking"] == {"The Red Boat": "missing: shot 2 (scene 1, shot 2)"}
    missing = "The Red Boat, shot 2 (scene 1, shot 2): there is no file 01_02.mp4"
    assert results["systems"]["two"]["missing"] == [missing]
    assert results["texts"] == {"read": 7, "truncated": 0}
    assert results["metrics"]["viclip"]["top_rule"] == "prompts"
    assert len(results["metrics"]["viclip"]["weights_sha256"]) == 64
    assert results["comparisons"][0]["columns"]["aesthetic_quality"]["stories"] == 1
    output = capsys.readouterr()
    assert output.out.strip() == (folder / "out" / "results.md").read_text().strip()
    assert missing in output.out
    lines = output.err.splitlines()
    assert lines[:2] == ["2 stories, 5 shots", f"one: 5 of 5 shots in {folder}/one"], "first, which film is used"
    assert lines[2].startswith("  The Red Boat: the_red_boat, ")
    with (folder / "out" / "results.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    lost = [row for row in rows if (row["system"], row["level"], row["item"]) == ("two", "pair", "1-2")]
    lost = [row for row in lost if row["story"] == "The Red Boat"]
    assert all(row["value"] == "" and row["reason"] == "there is no file 01_02.mp4" for row in lost)
    assert len({row["column"] for row in lost}) == 5


def test_a_second_run_scores_only_what_has_changed(folder: Path) -> None:
    evaluate(config(folder))
    boat, cat = (folder / "out" / "stories" / "one" / f"{name}.json" for name in ("the_red_boat", "a_cat"))
    before, times = json.loads(boat.read_text()), (boat.stat().st_mtime_ns, cat.stat().st_mtime_ns)
    boat.write_text(boat.read_text()[:100])  # as a broken disk leaves it
    for name in ("results.json", "index.html", "results.csv"):  # as a kill leaves it
        (folder / "out" / name).unlink()
    evaluate(config(folder))
    assert json.loads(boat.read_text()) == before
    assert (boat.stat().st_mtime_ns != times[0], cat.stat().st_mtime_ns == times[1]) == (True, True)
    assert (folder / "out" / "results.json").is_file()
    (folder / "one" / "a_cat" / "01_02.mp4").unlink()
    evaluate(config(folder))
    assert cat.stat().st_mtime_ns != times[1]


def test_processes_do_not_change_the_values(folder: Path) -> None:
    run = full_config(folder, f"films={folder}/one")
    single_thread()
    assert fork(2, lambda: evaluate(run)) == [0, 0]
    evaluate({**run, "output": str(folder / "alone")})
    assert json.loads((folder / "alone" / "results.json").read_text())["systems"] == written(folder)["systems"]
    tables = [(folder / name / "results.md").read_text() for name in ("out", "alone")]
    assert tables[0] == tables[1]


def test_workers_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    assert workers() == Launch(), "a plain allocation"
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    launch = workers()
    assert (launch.team, launch.teams, launch.local_rank) == (9, 16, 1)
    shares = [Launch(team=team, teams=3).share(range(8)) for team in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(8))


# --- what is refused before anything is written


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to score"),
        (["films=nowhere"], "films=nowhere: there is no such folder"),
        (
            ["films=one", "stbench.stories=st_bench/toy/01_cleo_on_the_beach.yaml"],
            r"is one story: .* stbench\.only=\[01_cleo",
        ),
        (["films='a,b'"], "films=a,b: there is no such folder; several are 'films={NAME: FOLDER, NAME: FOLDER}'"),
        (["films=docs"], r"films=docs holds no film of the stories: a folder such as \w+/ is expected"),
        (["films=one", "+stbench.storys=x"], "stbench.storys: unknown key; did you mean 'stories'"),
        (["films=one", "statistics.level=95"], "level must be 0.9999 or less"),
        (["films={StoryMem: one}", "method=storymem"], "two systems are called StoryMem"),
        (["films={a/b: one}"], "a system cannot be called 'a/b'"),
        (["films={..: one}"], r"a system cannot be called '\.\.'"),
        (["films=/"], "a system cannot be called ''"),
    ],
)
def test_mistakes_are_reported_first(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        evaluate(full_config(folder, *overrides))
    assert not (folder / "out").exists()


def test_a_dry_run_prints_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one" / "the_red_boat" / "01_02.mp4").unlink()
    viclip = full_config(folder, "metrics=[stbench]")["metrics"]["viclip"]
    viclip["scorer"]["source"] = str(folder / "nowhere")
    weights = f"model.adapter={{weights: {{name: mine, source: {folder}/mine}}}}"
    run = full_config(folder, f"films={folder}/one", "method=storymem", weights) | {"metrics": {"viclip": viclip}}
    with pytest.raises(ValueError, match="not ready: the end of the plan says what is missing"):
        evaluate(run | {"dry_run": True, "label": "storymem"})
    printed = capsys.readouterr().out
    for line in (
        "2 stories, 5 shots",
        "one: 4 of 5 shots",
        "  The Red Boat: the_red_boat, #_# (scene from 1, shot from 1)",
        "  The Red Boat: there is no file 01_02.mp4",
        "storymem: 0 of 5 shots",
        f"ViCLIP-L-14: {folder}/nowhere does not exist",
        f"storymem cannot make films here: mine: {folder}/mine does not exist",
    ):
        assert line in printed
    with pytest.raises(MissingWeights, match=r"ViCLIP-L-14"):
        evaluate(run)
    assert not (folder / "out").exists()


def test_a_method_replaces_those_of_an_experiment(run: Run) -> None:
    quick = ("experiment=stbench_toy_quick", "stbench.only=[]", "model=tiny", "runtime=cpu", "dry_run=true")
    status, plan, errors = run(*quick, "method=storymem")
    assert status == 0, errors
    assert re.findall("^([a-z_]+): ", plan, re.MULTILINE) == ["one", "storymem"]


def test_stories_that_a_metric_cannot_measure_are_refused_before_films_are_made(folder: Path, run: Run) -> None:
    status, _, errors = run("metrics=[toy]", "methods=[independent]", "model=tiny", "runtime=cpu")
    assert status == 2
    assert "The Red Boat, shot 1" in errors
    assert "metrics=[toy] is for stories like those in st_bench/toy" in errors
    assert not (folder / "out").exists()


def test_without_weights_nothing_is_scored(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    status, _, errors = run()
    assert status == 2
    for part in ("LAION aesthetic head v1", "ViCLIP-L-14", "hf download OpenGVLab/ViCLIP-L-14-hf", "metrics=[tiny]"):
        assert part in errors
    assert "Traceback" not in errors
    assert not (folder / "out").exists()


def test_metrics_that_do_not_go_together() -> None:
    nodes = full_config(Path("x"))["metrics"]
    with pytest.raises(ValueError, match="two of them measure identity_consistency"):
        build_metrics({**nodes, "again": nodes["identity"]})
    with pytest.raises(ValueError, match="there are none"):
        build_metrics({})
    with pytest.raises(ValueError, match=r"metrics\.mine: its class must be a subclass"):
        build_metrics({"mine": {"_target_": "builtins.dict"}})


def test_a_setting_that_a_metric_lacks_is_reported_before_films_are_sought() -> None:
    nodes = full_config(Path("x"))
    nodes["metrics"]["viclip"]["top_pair"] = 3
    with pytest.raises(ValueError, match=r"unknown key metrics\.viclip\.top_pair; did you mean 'top_pairs'\?"):
        evaluate(nodes)


def test_scorers_report_the_origin_of_their_weights() -> None:
    viclip = tiny.viclip()
    assert ViclipScores(viclip).weights == AestheticQuality(tiny.aesthetic()).weights == "untrained"
    assert Appearance(tiny.clip()).weights == "untrained"
    viclip.origin = "published"
    assert ViclipScores(viclip).weights == "own", "not of the paper's size"


# --- the output folder


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_a_folder_with_other_files_is_refused(dry_run: str, folder: Path, run: Run) -> None:
    (folder / "out" / "stories" / "one" / "a_cat").mkdir(parents=True)
    image = folder / "out" / "stories" / "one" / "a_cat" / "holiday.jpg"
    image.write_bytes(b"mine")
    status, _, errors = run("metrics=[tiny]", f"dry_run={dry_run}")
    assert status == 2
    assert f"output={folder}/out is not empty and not a folder of results: it holds stories" in errors
    assert [path for path in (folder / "out").rglob("*") if path.is_file()] == [image]


def test_files_in_the_outputs_place(folder: Path) -> None:
    (folder / "out").write_text("mine")
    with pytest.raises(FileError, match="is a file"):
        evaluate(config(folder))
    with pytest.raises(FileError, match="out/out cannot be written"):
        evaluate(config(folder) | {"output": str(folder / "out" / "out")})
    assert (folder / "out").read_text() == "mine"
    (folder / "new" / "jobs" / "0").mkdir(parents=True)  # Hydra's
    evaluate(config(folder) | {"output": str(folder / "new")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(folder: Path) -> None:
    (folder / "out").mkdir(mode=0o500)
    with pytest.raises(FileError, match="cannot be written"):
        evaluate(config(folder))


def test_two_runs_of_one_system_do_not_mix(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            evaluate(config(folder))
        except FileError as error:
            print(error)
            sys.exit(2)

    evaluate(config(folder))
    before = (folder / "out" / "results.json").read_bytes()
    single_thread()
    with FileLock(folder / "out" / "stories" / "one" / ".lock"):
        assert fork(2, work) == [2, 2], "all processes end when the first is refused"
        (folder / "one").rename(folder / "two")
        evaluate(config(folder) | {"films": str(folder / "two")})  # a job for another system
    message = f"another process is scoring films in {folder}/out/stories/one"
    assert capfd.readouterr().out.count(message) == 2
    assert (folder / "out" / "results.json").read_bytes() != before


def test_a_full_disk_is_reported(folder: Path, run: Run) -> None:
    """A limit on the size of files stands for it; the next run resumes."""
    status, _, errors = run("metrics=[tiny]", largest=4000)
    assert status == 2
    assert "could not be written" in errors
    assert "Traceback" not in errors
    status, table, errors = run("metrics=[tiny]")
    assert status == 0, errors
    assert "UNTRAINED SCORERS" in table
    assert "UNTRAINED SCORERS" in errors
