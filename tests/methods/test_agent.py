"""Agents: the storyboard by rule and by an endpoint in a thread, whose answers are checked and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storymem.film.folder import Film
from storymem.film.manifest import Slot
from storymem.media.images import fit_image, read_image, write_image
from storymem.media.video import read_video
from storymem.methods.agent import Agent, QwenEditor
from storymem.methods.keyframes import make_images
from storymem.methods.storyboards import Camera, Cameras, check_tree
from storymem.story import Story
from storymem.story.writing import EndpointError
from storymem.wan.settings import RuntimeSettings
from tests.endpoint import Endpoint, Reply, answered
from tests.evaluation import small
from tests.evaluation.test_methods import generate, method
from tests.methods import tiny


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path / "stories")[0]


def test_the_stub_plans_by_rule(story: Story, tmp_path: Path) -> None:
    method("agent_stub").run(story, tmp_path / "film")
    board = json.loads((tmp_path / "film" / "agent_storyboard.json").read_text())
    assert [camera["shots"] for camera in board["cameras"]] == [[1, 2], [3]]
    assert [source["images"] for source in board["sources"]] == [
        ["portrait_01"],
        ["portrait_01", "01_01"],
        ["portrait_01", "portrait_02", "01_02"],
    ]
    assert len(list((tmp_path / "film" / "keyframe_images").iterdir())) == 5
    assert [take.mode for take in Film.open(tmp_path / "film").shots] == ["i2v"] * 3


def test_a_reference_image_is_the_portrait_and_only_agents_read_it(
    story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ada.png"
    write_image(path, np.full((32, 48, 3), 90, dtype=np.uint8))
    first, *others = story.characters
    story = replace(story, characters=(replace(first, references=(path,)), *others))
    maker = method("agent_stub")
    portrait = maker.plan(story, tmp_path)[0]
    assert (maker.make(portrait, {})["portrait_01"] == 90).all()
    write_image(path, np.full((32, 48, 3), 91, dtype=np.uint8))
    assert maker.plan(story, tmp_path)[0].recipe != portrait.recipe, "another image under the same name"
    for name in ("agent_stub", "independent"):
        assert "reference images have no effect" not in caplog.text
        method(name).check(story)
    assert "reference images have no effect" in caplog.text


def test_first_frames_are_edited_from_portraits_and_earlier_frames(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
    monkeypatch.setattr(f"{module}.VAE_IMAGE_SIZE", 32 * 48)
    monkeypatch.setattr(f"{module}.CONDITION_IMAGE_SIZE", 56 * 56)
    weights = {"name": "Qwen", "source": "x/y"}
    given = {"weights": weights, "stub": True, "steps": 2, "guidance": 1.5, "height": 32, "width": 64}
    images, runtime = Agent(generate={**generate(), "seed": 0}, agent=given), RuntimeSettings(device="cpu")
    video = images.settings.model.video
    images.painter = QwenEditor(images.agent, runtime, video, tiny.qwen_image_edit(tmp_path))
    size: dict[str, Any] = {"height": 32, "width": 48, "settings": {}}
    make_images(images, story, tmp_path, **size)
    made = {path.stem: read_image(path) for path in (tmp_path / "keyframe_images").iterdir()}
    assert sorted(made) == ["01_01", "01_02", "02_01", "portrait_01", "portrait_02"]
    with pytest.raises(FileNotFoundError, match="Qwen: x/y is not"):
        images.check(story)

    editor = QwenEditor(images.agent, runtime, video, tiny.qwen_image_edit(tmp_path))
    prompt = story.prompt_of(story.shots[2])
    wanted = [made[name] for name in ("portrait_01", "portrait_02", "01_02")]
    seed = images.plan(story, tmp_path)[-1].recipe["seed"]
    again, other = (editor.edit(prompt, one, seed) for one in (wanted, wanted[::-1]))
    assert (fit_image(again, 32, 48, "cover") == made["02_01"]).all()
    assert (again != other).any()


def test_parents_of_cameras_come_before_them() -> None:
    one, two = Camera(camera=1, shots=(1,)), Camera(camera=2, shots=(2,), parent=1, parent_shot=1)
    check_tree(Cameras(cameras=(one, two)), 2)
    wrong = {
        "no earlier parent 2 with a shot 2": (Camera(camera=1, shots=(1,), parent=2, parent_shot=2), two),
        "no earlier parent 1 with a shot 3": (one, Camera(camera=2, shots=(2,), parent=1, parent_shot=3)),
        "shots 1 to 2 must belong": (Camera(camera=1, shots=(1,)), Camera(camera=2, shots=(1, 2))),
        "two cameras": (two, two),
    }
    for message, cameras in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_tree(Cameras(cameras=cameras), 2)


class Model(Endpoint):
    """Answers by the kind of question."""

    def reply(self, question: str) -> Reply:
        if question.startswith("Describe the characters"):
            people = [{"name": name, "static_features": f"look of {name}"} for name in ("Ada", "Ben")]
            return answered(json.dumps({"characters": people}))
        if question.startswith("Divide"):
            return answered(json.dumps({"cameras": [{"camera": 1, "shots": [1, 2, 3]}]}))
        if question.startswith("Describe shot"):
            shot = {"first_frame": "<Ada> rows", "visible": ["Ada"], "motion": "a boat moves"}
            return answered("Yes:\n" + json.dumps(shot))
        picture = {"images": ["portrait_01"], "prompt": "Put the woman of Picture 1 into a boat."}
        return answered(json.dumps(picture))


@pytest.fixture
def endpoint() -> Iterator[Model]:
    with Model().serving() as served:
        yield served


def test_an_endpoint_is_asked_once_for_each_answer(story: Story, tmp_path: Path, endpoint: Model) -> None:
    url = f"method.agent.endpoint={{url: '{endpoint.url}', model: m}}"
    folder = tmp_path / "film"
    endpoint.replies = [answered("no JSON"), answered('{"characters": [{"name": "Eve", "static_features": "x"}]}')]
    agent = method("agent", url)
    agent.check(story)
    agent.run(story, folder)
    assert len(endpoint.asked) == 2 + 2 + 2 * 3, "two answers were sent back"
    assert "characters must be exactly Ada, Ben" in endpoint.asked[2][2]["messages"][-1]["content"]
    assert agent.storyteller.texts_of(story, story.shots[0]) == ["a boat moves"]
    assert sorted(path.stem for path in (folder / "keyframe_images").iterdir())[-1] == "portrait_01", "Ben's is unused"
    film = Film.open(folder)
    assert film.config["images"]["agent"]["endpoint"] == {"model": "m"}, "where it is asked may change"
    last = read_video(folder / film.shots[2].file)
    film.slots[2] = Slot(folder=film.slots[2].folder)
    film.save()
    method("agent", url.replace("127.0.0.1", "localhost")).run(story, folder)
    assert len(endpoint.asked) == 10, "no second bill"
    shot = Film.open(folder).shots[2]
    assert (read_video(folder / shot.file) == last).all()

    endpoint.replies = [answered("{}")] * 3
    with pytest.raises(EndpointError, match=r"in 3 tries \(characters: Field required\)"):
        method("agent", url).run(story, tmp_path / "other")
    assert not Film.open(tmp_path / "other").takes
