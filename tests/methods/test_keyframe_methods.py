"""Methods that make images first, or all shots at once: films, resuming, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from storymem.film.folder import Film
from storymem.film.manifest import Slot
from storymem.media.images import read_image, write_image
from storymem.media.video import read_video
from storymem.story import Story, load_story
from tests.composing import composed
from tests.evaluation import small
from tests.evaluation.test_methods import method

STEPS = ("sampler.steps=2",)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return small.stories(tmp_path / "stories")[0]


def videos(folder: Path) -> list[np.ndarray]:
    return [read_video(folder / take.file) for take in Film.open(folder).shots]


def forget_shot(folder: Path, shot: int) -> None:
    film = Film.open(folder)
    film.slots[shot] = Slot(folder=film.slots[shot].folder)
    film.save()


def test_storydiffusion_in_video_makes_all_shots_as_one_batch(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "film"
    shared = method("storydiffusion", *STEPS)
    shared.check(story)
    shared.run(story, folder)
    assert [(take.mode, take.memory, take.repeated) for take in Film.open(folder).shots] == [("t2v", (), 0)] * 3
    before = videos(folder)
    forget_shot(folder, 2)
    method("storydiffusion", *STEPS).run(story, folder)
    assert all((a == b).all() for a, b in zip(before, videos(folder), strict=True)), "one shot alone is the same"

    nothing = "+method.storydiffusion.video_sharing={rate: 0.0}"
    method("storydiffusion", *STEPS, nothing).run(story, tmp_path / "nothing")
    method("independent", *STEPS).run(story, tmp_path / "independent")
    pairs = zip(videos(tmp_path / "nothing"), videos(tmp_path / "independent"), strict=True)
    assert all(np.abs(a.astype(int) - b).mean() < 0.5 for a, b in pairs), "nothing shared: independent shots"
    assert (np.abs(before[2].astype(int) - videos(tmp_path / "nothing")[2]).mean()) > 0.5
    text = (tmp_path / "stories" / "01_the_red_boat.yaml").read_text().replace('pier."', 'pier.", frames: 13')
    (tmp_path / "long.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"one batch, of one length, not \[9, 13\]"):
        shared.check(load_story(tmp_path / "long.yaml"))
    with pytest.raises(ValueError, match=r"attention of both experts.*runtime\.experts=in_turn"):
        method("storydiffusion", "runtime.experts=in_turn").check(story)
    with pytest.raises(ValueError, match=r"some of which runtime\.cache=taylor skips: write runtime\.cache=none"):
        method("storydiffusion", "runtime.cache=taylor").check(story)


def test_panels_are_the_first_frames_of_their_shots_and_resume_one_by_one(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "film"
    panels = method("in_context", *STEPS)
    panels.check(story)
    assert panels.settings.sampler.shift == 5.0, "that of the base"
    assert panels.settings.model.adapter is None
    panels.run(story, folder)
    film = Film.open(folder)
    assert [(take.mode, take.frames, take.repeated, take.memory) for take in film.shots] == [("i2v", 9, 0, ())] * 3
    images = sorted((folder / "keyframe_images").iterdir())
    assert [path.name for path in images] == ["01_01.png", "01_02.png", "02_01.png"]
    assert Image.open(images[0]).size == (48, 32)
    content, before = [path.read_bytes() for path in images], videos(folder)

    images[1].unlink()
    forget_shot(folder, 1)
    method("in_context", *STEPS).run(story, folder)
    assert [path.read_bytes() for path in images] == content
    assert (videos(folder)[1] == before[1]).all()
    own = np.full((64, 96, 3), 200, dtype=np.uint8)
    write_image(images[1], own)
    forget_shot(folder, 1)
    method("in_context", *STEPS).run(story, folder)
    assert (read_image(images[1]) == own).all(), "an image of the user's stays"
    assert (videos(folder)[1] != before[1]).any()
    with pytest.raises(ValueError, match=r"other settings:\n  seed: 0 before, 4 now"):
        method("in_context", *STEPS, "seed=4").run(story, folder)


def test_baselines_are_the_base_alone_with_its_own_sampler() -> None:
    for name in ("independent", "storydiffusion", "in_context", "agent_stub"):
        node = composed(f"method={name}", "model=toy", "runtime=cpu", name="eval_stbench")["method"]
        of = instantiate(node, _convert_="all").settings
        assert of.model.adapter is None
        assert "NoEmbedder" in of.scorer.clip["_target_"]
        assert "NoQuality" in of.scorer.quality["_target_"]
        shift = of.sampler.shift if name in ("in_context", "agent_stub") else of.sampler.text_to_video_shift
        assert shift == (5.0 if name in ("in_context", "agent_stub") else 12.0), name


def test_settings_of_a_memory_have_no_effect_without_one(
    story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "ada.png", np.zeros((32, 48, 3), dtype=np.uint8))
    ada = replace(story.characters[0], references=(tmp_path / "ada.png",))
    for name, system in (("independent", "IndependentShots"), ("lct", "LCT")):
        chosen = method(name, "memory/recall=learned")
        for _ in range(2):
            chosen.check(story)
        line = f"memory.recall=storymem.memory.Learned has no effect: {system} has no memory"
        assert caplog.text.count(line) == 1
    method("independent").run(replace(story, characters=(ada, story.characters[1])), tmp_path / "film")
    assert not list((tmp_path / "film" / "keyframes").iterdir())


def test_published_image_models_are_asked_for_with_files_sizes_and_licences(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cases = {
        "storydiffusion": ("+method.storydiffusion.where=images", r"xl-base-1.0(.|\n)*7 GB(.|\n)*OpenRAIL(.|\n)*fp16"),
        "in_context": ("+method.in_context.images=flux", r"FLUX.1-dev(.|\n)*34 GB(.|\n)*Non-Commercial"),
        "agent_stub": ("+method.agent.images=qwen", r"Qwen-Image-Edit-2509(.|\n)*58 GB(.|\n)*Apache"),
    }
    for name, (override, message) in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            method(name, override).check(story)
    with pytest.raises(ValueError, match=r"write method\.agent\.endpoint\.url=http://HOST/v1"):
        method("agent").check(story)
