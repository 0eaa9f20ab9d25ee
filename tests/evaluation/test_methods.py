"""Methods make films, resume them, and refuse what cannot be made before anything is written."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from storymem.evaluation.choosing import compose_with_method
from storymem.evaluation.films import find_films
from storymem.evaluation.stbench import evaluate
from storymem.film.folder import Film
from storymem.film.manifest import Slot
from storymem.media.video import read_video
from storymem.methods.independent import IndependentShots
from storymem.methods.storymem import StoryMem
from storymem.story import Story, load_story
from tests.composing import TINY, composed
from tests.evaluation import small


def method(name: str, *overrides: str) -> Any:
    return instantiate(composed(f"method={name}", *TINY, *overrides, name="eval_stbench")["method"], _convert_="all")


@cache
def generate() -> dict[str, Any]:
    """The settings that a method is given."""
    return composed("method=storymem", *TINY, "seed=1", name="eval_stbench")["method"]["generate"]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path / "stories")[0]


def test_independent_shots_do_not_depend_on_each_other_and_can_be_resumed(story: Story, tmp_path: Path) -> None:
    independent = method("independent")
    assert isinstance(independent, IndependentShots)
    independent.check(story)
    independent.run(story, tmp_path / "film")
    film = Film.open(tmp_path / "film")
    assert [(shot.mode, shot.memory, shot.keyframes, shot.repeated) for shot in film.shots] == [("t2v", (), (), 0)] * 3
    assert [shot.seed for shot in film.shots] == [0, 1, 2]
    assert all(shot.path is not None for shot in find_films(tmp_path / "film", [story]).films[0].shots)
    assert film.video is not None
    # The last shot alone, as the first of a film with its seed, is the same shot.
    alone = tmp_path / "alone" / "s.yaml"
    alone.parent.mkdir()
    alone.write_text(f'title: T\noverview: O.\nscenes: [{{shots: [{{prompt: "{story.shots[2].prompt}", seed: 2}}]}}]\n')
    independent.run(load_story(alone), tmp_path / "alone" / "film")
    again = read_video(tmp_path / "alone" / "film" / "shots" / "01_01" / "take_001.mp4")
    whole = [read_video(tmp_path / "film" / shot.file) for shot in film.shots]
    assert (again == whole[2]).all()

    first = (tmp_path / "film" / film.shots[0].file).stat().st_mtime_ns
    film.slots[2] = Slot(folder="03_01")  # a film that was interrupted
    film.save()
    independent.run(story, tmp_path / "film")
    assert (tmp_path / "film" / film.shots[0].file).stat().st_mtime_ns == first
    after = [read_video(tmp_path / "film" / shot.file) for shot in Film.open(tmp_path / "film").shots]
    assert all((a == b).all() for a, b in zip(whole, after, strict=True))
    for act in (method("independent", "seed=5").run, method("independent", "seed=5").check_film):
        with pytest.raises(ValueError, match=r"other settings:\n  seed: 0 before, 5 now"):
            act(story, tmp_path / "film")
    independent.check_film(story, tmp_path / "film")


def test_storymem_is_the_loop_under_the_commands_settings(tmp_path: Path) -> None:
    story = small.stories(tmp_path / "stories")[1]
    loop = method("storymem", "continuity=none", "memory/selector=uniform", "seed=3")
    assert isinstance(loop, StoryMem)
    assert loop.settings.memory.selector == {"_target_": "storymem.memory.UniformSelector", "max_keyframes": 3}
    loop.check(story)
    loop.run(story, tmp_path / "film")
    film = Film.open(tmp_path / "film")
    assert [shot.mode for shot in film.shots] == ["t2v", "m2v"]
    assert film.shots[0].seed == 3
    assert len(film.shots[1].memory) == 3, "the keyframes of the shot before"


def test_what_cannot_be_made_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.yaml").write_text(small.TWO_SHOTS)
    run = composed(
        f"stbench.stories={tmp_path}/s",
        f"output={tmp_path}/out",
        "model=wan2.2-a14b",
        "runtime=cpu",
        "method=independent",
        "metrics=[tiny]",
        name="eval_stbench",
    )
    with pytest.raises(FileNotFoundError, match="T2V-A14B"):
        evaluate(run)
    agent = compose_with_method("agent", [f"stbench.stories={tmp_path}/s", "model=wan2.2-a14b", "runtime=cpu"])
    with pytest.raises(ValueError, match="not ready"):
        evaluate({**run, "dry_run": True, "method": agent["method"], "label": "agent"})
    printed = capsys.readouterr().out
    for cause in ("method=agent asks a language model", ".*I2V-A14B", "Qwen-Image-Edit"):
        assert len(re.findall(f"^agent cannot make films here: {cause}", printed, re.MULTILINE)) == 1, printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_filmed_scored_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.yaml").write_text(small.TWO_SHOTS)
    overrides = [f"stbench.stories={tmp_path}/s", f"output={tmp_path}/out", "metrics=[tiny]", *TINY]
    run = composed(*overrides, "methods=[storymem,ablation_no_memory]", name="eval_stbench")
    results = evaluate(run, lambda name: compose_with_method(name, overrides))
    assert results is not None
    assert list(results.stories) == ["storymem", "ablation_no_memory"]
    assert not any(results.notes(system)["missing shots"] for system in results.stories)
    assert len(Film.open(tmp_path / "out" / "films" / "storymem" / "a_cat").shots[1].memory) > 0
    assert len(Film.open(tmp_path / "out" / "films" / "ablation_no_memory" / "a_cat").shots[1].memory) == 0
    found = results.comparisons["storymem", "ablation_no_memory"]["aesthetic_quality"]
    assert found is not None
    assert found.stories == 1

    run = composed(*overrides, "methods=[storymem]", name="eval_stbench")
    other = r"seed: .*\n(?s:.*)delete its folder, .* or choose another output$"
    with pytest.raises(ValueError, match=other):
        evaluate(run, lambda name: compose_with_method(name, [*overrides, "seed=5"]))
    capsys.readouterr()
    with pytest.raises(ValueError, match="not ready"):
        evaluate({**run, "dry_run": True}, lambda name: compose_with_method(name, [*overrides, "seed=5"]))
    assert re.search(f"storymem cannot make films here: (?s:.*){other}", capsys.readouterr().out.strip())
