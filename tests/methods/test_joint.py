"""Systems that denoise all shots at once, on a model's own networks: films, how they are resumed, what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate

from storymem.evaluation.films import find_films
from storymem.film.folder import Film
from storymem.film.manifest import FilmError, Slot
from storymem.media.video import read_video
from storymem.methods import Method
from storymem.story import Story
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import save_memory_lora
from storymem.wan.lora_files import AdapterInfo
from storymem.wan.segments import Text
from tests.composing import TINY, composed, generate_settings
from tests.evaluation import small
from tests.wan.tiny import CPU, adapt


@cache  # composing takes longer than a film
def node_of(name: str, *overrides: str) -> dict[str, Any]:
    return composed(f"method={name}", *overrides, name="eval_stbench")["method"]


def method_of(name: str, *overrides: str) -> Any:
    made = instantiate(node_of(name, *TINY, *overrides), _convert_="all")
    assert isinstance(made, Method)
    return made


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """Three shots, the second one shorter."""
    story = small.stories(tmp_path / "stories")[0]
    first = story.scenes[0]
    shots = (first.shots[0], replace(first.shots[1], frames=5, seed=4))
    return replace(story, scenes=(replace(first, shots=shots), *story.scenes[1:]))


def videos(folder: Path) -> list[np.ndarray]:
    return [read_video(folder / take.file) for take in Film.open(folder).shots]


def test_shots_follow_each_other_in_one_sequence(story: Story) -> None:
    starts = {"holocine": (0, 3, 5), "lct": (0, 3 + 5, 5 + 10)}
    for name, expected in starts.items():
        request = method_of(name).request(story)
        assert tuple(segment.positions[0] for segment in request.layout.segments) == expected
        assert request.videos == request.shots == (9, 5, 9)
        assert request.texts == (story.overview, *map(story.prompt_of, story.shots))
        assert request.layout.segments[1].text == Text(spans=((0, 16), (32, 48)))
    assert len(method_of("holocine_sparse").request(story).layout.segments[0].reads[0]) == 4


@pytest.mark.parametrize("name", ["holocine", "lct"])
def test_a_film_is_cut_at_its_shots_and_stays_when_finished(
    name: str, story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, folder = method_of(name), tmp_path / "film"
    with caplog.at_level(logging.WARNING):
        method.check(story)
        method.check(story)
    assert "seed of shot 2 has no effect" in caplog.text
    assert caplog.text.count("no adapter is given (method.adapter), so tiny is used as it was trained") == 1
    method.run(story, folder)
    film = Film.open(folder)
    assert [(take.frames, take.seed, take.mode) for take in film.shots] == [(9, 0, "t2v"), (5, 0, "t2v"), (9, 0, "t2v")]
    assert film.video is not None
    joined = read_video(film.video)
    assert len(joined) == 23
    found = find_films(folder, [story]).films[0]
    assert all(shot.path is not None for shot in found.shots)
    assert not found.one_video
    assert (folder / "storyboard.html").is_file()
    times = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.mp4"))]
    method_of(name).run(story, folder)
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.mp4"))] == times
    for act in (method_of(name, "seed=3").run, method_of(name, "seed=3").check_film):
        with pytest.raises(FilmError, match=r"seed: 0 before, 3 now\nchoose another output"):
            act(story, folder)
    edited = replace(story, scenes=story.scenes[:1])
    with pytest.raises(FilmError, match="its shots are not those of the story"):
        method.run(edited, folder)


def test_a_film_that_was_interrupted_is_generated_again_as_a_whole(story: Story, tmp_path: Path) -> None:
    method, folder = method_of("holocine"), tmp_path / "film"
    method.run(story, folder)
    before = videos(folder)
    film = Film.open(folder)
    film.slots[2], film.takes = Slot(folder=film.slots[2].folder), film.takes[:2]
    film.save()
    method.run(story, folder)
    film = Film.open(folder)
    assert [take.take for take in film.takes] == [2, 2, 2], "none of the first attempt is left"
    assert not (folder / "shots" / "01_01" / "take_001.mp4").exists()
    assert all((a == b).all() for a, b in zip(before, videos(folder), strict=True))


def test_an_adapter_takes_the_place_of_the_memory_adapter(story: Story, tmp_path: Path) -> None:
    story = replace(story, scenes=story.scenes[1:])
    plain = method_of("lct")
    pipe = adapt(load_pipeline(plain.model, runtime=CPU, text_encoder=False))
    save_memory_lora(pipe, tmp_path / "adapter", metadata=AdapterInfo(objective="lct"))
    adapted = method_of("lct", f"+method.adapter.weights={{name: mine, source: {tmp_path}/adapter}}")
    adapted.check(story)
    with pytest.raises(ValueError, match="trained for another system, objective=lct"):
        method_of("holocine", f"+method.adapter.weights={{name: mine, source: {tmp_path}/adapter}}").check(story)
    for name, method in (("plain", plain), ("adapted", adapted)):
        method.run(story, tmp_path / name)
    assert (videos(tmp_path / "plain")[0] != videos(tmp_path / "adapted")[0]).any()
    toy = instantiate(node_of("lct", "model=toy"), _convert_="all")
    assert toy.settings.model.adapter is not None
    assert toy.model.adapter is None


def test_what_cannot_be_made_is_reported_first(story: Story) -> None:
    with pytest.raises(ValueError, match="The Red Boat: 3 shots, and LCT makes films of 2 at most"):
        method_of("lct", "method.max_shots=2").check(story)
    with pytest.raises(ValueError, match="were not trained for the layout of LCT"):
        method_of("lct", "+model.text_to_video={name: t2v, source: owner/t2v}").check(story)
    with pytest.raises(ValueError, match="several processes make one film"):
        method_of("holocine", "runtime.guidance_parallel=true").check(story)
    with pytest.raises(ValueError, match=r"wan2\.2-t2v-a14b cannot recall"):
        generate_settings("model=tiny", "model.base=wan2.2-t2v-a14b", "model.has_text_to_video=false")
