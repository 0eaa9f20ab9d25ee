"""Characters as objects: on drawn frames, where it is known who is where, and by small networks of the true classes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import GroundingDinoForObjectDetection

from storymem.evaluation.controls import SHUFFLED, STILL, with_names_shuffled
from storymem.evaluation.crops import sharpness
from storymem.evaluation.entities import Entities
from storymem.evaluation.faces import Faces
from storymem.evaluation.films import stories_of
from storymem.evaluation.metric import Metric, Scores
from storymem.evaluation.motion import NEARLY_STILL, Joins, Motion
from storymem.evaluation.references import References
from storymem.io import FileError
from storymem.scorers.dinov2 import Dinov2Embedder
from storymem.scorers.faces import FaceScorer
from storymem.scorers.grounding import GroundingDetector
from storymem.story import Story, load_story
from storymem.weights import MissingWeights
from tests.evaluation import small

STORY = """\
title: The Walk
overview: Two walk.
characters: [{name: Ada, description: A red woman}, {name: Ben, description: A blue man}, {name: Cleo}]
scenes:
  - shots:
      - {prompt: "Ada walks.", characters: [Ada]}
      - {prompt: "Ada and Ben walk.", characters: [Ada, Ben], cut: false}
      - {prompt: "Ben rests.", characters: [Ben]}
      - {prompt: "Ada and Ben rest.", characters: [Ada, Ben]}
"""
RED, BLUE, PURPLE, GREY = (220, 20, 20), (20, 20, 220), (150, 20, 150), (90, 90, 90)
COLOURS = {"red": RED, "blue": BLUE}


def frame(*figures: tuple[int, ...], at: Sequence[int] = (10, 60)) -> np.ndarray:
    """Grey, with a square of 20 pixels in each colour, striped so that it is sharp."""
    image = np.full((64, 96, 3), GREY, np.uint8)
    for colour, left in zip(figures, at, strict=False):
        image[20:40, left : left + 20] = colour
        image[20:40:4, left : left + 20] //= 2
    return image


def shot(*figures: tuple[int, ...], **kwargs: Sequence[int]) -> np.ndarray:
    return np.repeat(frame(*figures, **kwargs)[None], 9, axis=0)


class Drawn:
    """Finds the coloured squares, whatever the query; embeds an image by its mean colour without grey."""

    batch_size, dtype, network = 8, torch.float32, torch.nn.Identity()

    def detect(self, frames: Tensor, query: str) -> list[Tensor]:
        found = []
        for image in frames:
            coloured = (image.amax(0) - image.amin(0)) > 0.1
            columns = coloured.any(0).nonzero().flatten().tolist()
            runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if columns else []
            boxes = [[float(run[0]), 20.0, float(run[-1] + 1), 40.0, 0.9] for run in runs]
            found.append(torch.tensor(boxes).reshape(-1, 5))
        return found

    def embed_images(self, frames: Tensor) -> Tensor:
        colour = frames - frames.mean(1, keepdim=True)
        return torch.nn.functional.normalize(colour.mean((2, 3)), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        named = [next(colour for word, colour in COLOURS.items() if word in text) for text in texts]
        return self.embed_images(torch.tensor(named)[:, :, None, None] / 255)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    (tmp_path / "walk.yaml").write_text(STORY)
    return load_story(tmp_path / "walk.yaml")


def scores(metric: Metric, story: Story, videos: Sequence[np.ndarray | None]) -> Scores:
    film = small.film_info(story, [None if video is None else len(video) for video in videos])
    seen = [
        None if video is None else metric.measure_shot(one, video, film)
        for one, video in zip(story.shots, videos, strict=True)
    ]
    return metric.compute(seen, film)


def entities() -> Entities:
    return Entities(Drawn(), Drawn(), Drawn())


TRUE = (shot(RED), shot(RED, BLUE), shot(BLUE), shot(BLUE, RED))


def test_the_true_film_has_everybody_and_they_stay_the_same(story: Story) -> None:
    found = scores(entities(), story, TRUE)
    apart = found.columns.pop("entity_contrast")
    assert found.columns == pytest.approx(dict.fromkeys(found.columns, 1.0) | {"entity_gap_5": None}, abs=1e-6)
    assert apart is not None
    assert apart > 1, "red and blue are opposites here"
    assert found.undefined == ("entity_gap_5",)
    assert found.details["entities"]["Cleo"] == {"reason": "no description"}
    assert found.details["sightings"][3]["Ada"]["box"] == (58, 18, 82, 42), "matched by description, with the margin"
    assert found.details["frames_of_shots"] == [[1, 3, 4, 5, 7]] * 4
    assert found.pairs["entity_same"][0][:2] == (0, 1)


def test_one_who_is_not_there_costs_presence_and_strict(story: Story) -> None:
    found = scores(entities(), story, [*TRUE[:3], shot(BLUE)])
    assert found.shots["entity_presence"] == (1, 1, 1, 0.5)
    assert found.columns["entity_presence"] == pytest.approx(3.5 / 4)
    assert found.columns["entity_same"] == pytest.approx(1)
    assert found.columns["entity_strict"] == pytest.approx((1 / 3 + 1) / 2), "Ada has one pair of three left"
    assert found.details["sightings"][3]["Ada"] == {"status": "absent"}


def test_a_box_that_does_not_fit_is_weak_and_without_two_crops_there_is_no_value(story: Story) -> None:
    found = scores(entities(), story, [shot(RED), shot(BLUE), shot(BLUE), shot(BLUE, BLUE)])
    assert [seen["Ada"]["status"] for seen in (found.details["sightings"][i] for i in (0, 1, 3))] == [
        "present",
        "absent",
        "weak",
    ]
    assert found.columns["entity_same"] == pytest.approx(1), "Ben's"
    assert "left out" in found.marks["entity_same"]
    assert found.details["entities"]["Ada"]["reason"] == "Ada is present in fewer than two shots"
    assert found.columns["entity_strict"] == pytest.approx((0 + 1) / 2)
    none = scores(entities(), story, [shot(RED), shot(BLUE), shot(), shot()])
    assert none.columns["entity_same"] is None
    people = " is present in fewer than two shots"
    assert none.reasons["entity_same"] == f"Ada{people}; Ben{people}"


def test_a_changed_look_shows_at_its_distance_and_all_alike_have_no_contrast(story: Story) -> None:
    changed = scores(entities(), story, [shot(PURPLE), *TRUE[1:]]).columns
    cosine = float(np.dot(*(c / np.linalg.norm(c) for c in (np.subtract(x, np.mean(x)) for x in (RED, PURPLE)))))
    assert changed["entity_gap_1"] == pytest.approx((cosine + 1 + 1) / 3, abs=2e-3)
    assert changed["entity_gap_3_4"] == pytest.approx(cosine, abs=2e-3)
    alike = scores(entities(), story, [shot(PURPLE), shot(PURPLE, PURPLE), shot(PURPLE), shot(PURPLE, PURPLE)]).columns
    assert alike["entity_same"] == pytest.approx(1)
    assert alike["entity_contrast"] == pytest.approx(0, abs=1e-6)


def test_missing_shots_and_stories_without_descriptions(story: Story, tmp_path: Path) -> None:
    found = scores(entities(), story, [*TRUE[:3], None])
    assert set(found.columns.values()) == {None}
    assert found.reasons["entity_same"] == "missing: shot 4 (scene 1, shot 4)"
    (tmp_path / "plain.yaml").write_text(
        STORY.replace(", description: A red woman", "").replace(", description: A blue man", "")
    )
    none = scores(entities(), load_story(tmp_path / "plain.yaml"), TRUE)
    assert set(none.undefined) == set(none.columns)
    assert set(none.reasons.values()) == {"no character has a description"}


@pytest.mark.parametrize("metric", [entities, lambda: Faces(DrawnFaces())])
def test_a_shot_with_values_that_are_not_finite_is_not_left_out(metric: Callable[[], Metric], story: Story) -> None:
    film = small.film_info(story, [9] * 4)
    seen = [metric().measure_shot(one, video, film) for one, video in zip(story.shots, TRUE, strict=True)]
    found = metric().compute([*seen[:3], None], film)
    assert set(found.columns.values()) == {None}
    assert "a shot has values that are not finite" in found.reasons.values()


def test_shuffled_names_are_whole_names(tmp_path: Path) -> None:
    text = STORY.replace("Ben", "Ada Lee").replace("Cleo", "Mr. B.").replace("Ada walks", "Mr. B. walks by Ada")
    (tmp_path / "walk.yaml").write_text(text)
    story = load_story(tmp_path / "walk.yaml")
    shuffled = with_names_shuffled(story)
    assert shuffled is not None
    assert shuffled.shots != story.shots
    before, after = (
        [re.sub(r"Ada Lee|Ada|Mr\. B\.", "-", shot.prompt) for shot in one.shots] for one in (story, shuffled)
    )
    assert before == after


def test_controls_move_the_columns_as_they_should(story: Story) -> None:
    metric = entities()
    film = small.film_info(story, [9] * 4)
    still = STILL.alter({})
    frozen = [still(one, video, film) for one, video in zip(story.shots, TRUE, strict=True)]
    assert all((video == TRUE[0]).all() for video in frozen)
    shuffled = with_names_shuffled(story)
    assert shuffled == with_names_shuffled(story) != story
    assert shuffled is not None
    assert all(
        set(one.characters) <= {"Ada", "Ben", "Cleo"} and one.characters[0] in one.prompt for one in shuffled.shots
    )
    empty = [metric.without_characters(one, video, film) for one, video in zip(story.shots, TRUE, strict=True)]
    assert all((video == GREY).all() for video in empty)
    gone = scores(metric, story, empty)
    assert (gone.columns["entity_presence"], gone.columns["entity_strict"]) == (0, 0)
    assert SHUFFLED.story(load_story(small.stories(story.source.parent / "s")[1].source)) is None  # type: ignore[union-attr, arg-type]


def test_sharpness_is_the_variance_of_second_differences() -> None:
    grey = np.random.default_rng(0).integers(0, 255, (9, 11)).astype(np.uint8)
    image = np.asarray(Image.fromarray(grey).convert("RGB"))
    g = grey.astype(float)
    values = [
        g[y - 1, x] + g[y + 1, x] + g[y, x - 1] + g[y, x + 1] - 4 * g[y, x] for y in range(1, 8) for x in range(1, 10)
    ]
    assert sharpness(image) == pytest.approx(np.var(values), rel=1e-3)
    assert sharpness(image[:2]) == 0


# --- references, joins, motion, faces


def test_references(story: Story, tmp_path: Path) -> None:
    for name, figure in (("ada", RED), ("pasted", PURPLE), ("ben", BLUE)):
        Image.fromarray(frame(figure)).save(tmp_path / f"{name}.png")
    text = STORY.replace("A red woman", "A red woman, references: [pasted.png, ada.png]")
    (tmp_path / "walk.yaml").write_text(text.replace("A blue man", "A blue man, references: [ben.png]"))
    metric, with_images = References(Drawn(), Drawn()), load_story(tmp_path / "walk.yaml")
    found = scores(metric, with_images, TRUE).columns
    assert found["reference_similarity"] == pytest.approx(1, abs=1e-3)
    assert found["reference_count"] == pytest.approx(100)
    pasted = scores(metric, with_images, [shot(PURPLE), *TRUE[1:3], shot(PURPLE, BLUE)]).columns
    assert found["reference_copy_margin"] < 0 < pasted["reference_copy_margin"]  # type: ignore[operator]
    less = scores(metric, with_images, [*TRUE[:3], shot(RED)])
    assert less.shots["reference_similarity"][3] == pytest.approx(0.5, abs=1e-3), "Ben has no box and counts as 0"
    assert less.shots["reference_count"][3] == pytest.approx(100 * math.exp(-1 / 2), abs=1e-3)
    assert set(scores(metric, story, TRUE).undefined) == set(found), "without images"


def test_joins_and_motion(story: Story) -> None:
    found = scores(Joins(Drawn()), story, [shot(RED), shot(BLUE), shot(RED), shot(RED)])
    assert found.shots["join_similarity"][0] is None
    red, blue = Drawn().embed_images(torch.tensor(np.stack([frame(RED), frame(BLUE)])).movedim(-1, 1) / 255)
    assert found.columns["join_similarity"] == pytest.approx(float(red @ blue), abs=1e-5)
    moving = np.stack([frame(RED, at=(10 + step,)) for step in range(9)])
    changed = np.abs(np.diff(moving.astype(float), axis=0)).mean() / 255
    assert scores(Motion(), story, [moving] * 4).columns["motion"] == pytest.approx(16 * changed)
    assert scores(Motion(), story, TRUE).columns["motion"] == 0 < NEARLY_STILL < 16 * changed


class DrawnFaces:
    """A face for each coloured square."""

    origin = "published"

    def embed_faces(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (boxes,) = Drawn().detect(torch.tensor(frame[None] / 255.0).movedim(-1, 1), "")
        colours = [frame[21, int(box[0]) + 1].astype(float) for box in boxes]
        rows = [np.subtract(c, c.mean()) / np.linalg.norm(np.subtract(c, c.mean())) for c in colours]
        return np.array(rows).reshape(-1, 3), np.full(len(rows), 0.95)


def test_faces(story: Story) -> None:
    found = scores(Faces(DrawnFaces()), story, [*TRUE[:3], shot()])
    assert found.columns == pytest.approx({"face_presence": 0.75, "face_similarity": 1.0, "face_same": 1.0})
    assert found.shots["face_presence"] == (1, 1, 1, 0)
    assert [pair for pair in found.pairs["face_similarity"] if 3 in pair[:2]] == [(i, 3, None) for i in range(3)]
    other = scores(Faces(DrawnFaces()), story, [shot(RED), shot(BLUE, BLUE), shot(BLUE), shot(BLUE)])
    assert other.columns["face_same"] == pytest.approx(3 / 5), "no face of shot 1 is in shots 2 and 4"
    nobody = scores(Faces(DrawnFaces()), story, [shot()] * 4)
    assert nobody.reasons["face_same"] == "no two shots of a character show a face"


def test_face_weights_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    with pytest.raises(
        MissingWeights, match=r"YuNet.*\n.*file: +face_detection_yunet_2023mar.onnx\n.*size: +0.23 MB\n.*MIT"
    ):
        FaceScorer.from_pretrained("nowhere/yunet", "nowhere/sface")
    for name in ("yunet.onnx", "sface.onnx"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(FileError, match=r"yunet\.onnx or .*sface\.onnx is not a network that OpenCV reads"):
        FaceScorer.from_pretrained(str(tmp_path / "yunet.onnx"), str(tmp_path / "sface.onnx"))


# --- the networks


def test_the_detector_loads_strictly_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    detector = GroundingDetector.from_config(box_threshold=0.01)
    detector.network.save_pretrained(tmp_path)
    detector.processor.tokenizer.save_pretrained(tmp_path)
    again = GroundingDetector.from_pretrained(str(tmp_path), box_threshold=0.01, batch_size=1)
    assert (detector.origin, again.origin) == ("untrained", "published")
    again.processor = detector.processor  # of small images
    images = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(detector.detect(images, "A fox."), again.detect(images, "a fox"), strict=True):
        assert one.shape[1] == 5
        assert len(one)
        assert torch.allclose(one, other, atol=1e-3)
    state = {name: tensor for name, tensor in detector.network.state_dict().items() if "input_proj" not in name}
    detector.network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(FileError, match="missing"):
        GroundingDetector.from_pretrained(str(tmp_path))


def test_boxes_are_in_pixels_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, forward = GroundingDetector.from_config(), GroundingDinoForObjectDetection.forward

    def fixed(self: GroundingDinoForObjectDetection, **inputs: Tensor) -> object:
        answer = forward(self, **inputs)
        answer.pred_boxes[:] = torch.tensor([0.5, 0.25, 0.5, 0.5])
        answer.logits[:] = -9.0
        answer.logits[:, 1, 1] = 9.0
        return answer

    monkeypatch.setattr(GroundingDinoForObjectDetection, "forward", fixed)
    (box,) = detector.detect(torch.rand(1, 3, 48, 64), "a fox")
    assert box.tolist() == [pytest.approx([16, 0, 48, 24, 1], abs=1e-3)]


def test_small_networks_give_the_same_values_for_any_batch_size(story: Story) -> None:
    from tests.scorers import tiny

    found = [
        scores(
            Entities(
                GroundingDetector.from_config(box_threshold=0.01, batch_size=size),
                tiny.clip(batch_size=size),
                Dinov2Embedder.from_config(batch_size=size),
                gate=-1,
            ),
            story,
            TRUE,
        )
        for size in (1, 64)
    ]
    assert found[0].columns == pytest.approx(found[1].columns, abs=1e-5)
    assert found[0].columns["entity_presence"] is not None
    assert Entities(GroundingDetector.from_config(), tiny.clip(), Drawn()).weights == "untrained"


def test_the_stories_of_the_benchmark_have_descriptions_in_their_own_words(story: Story) -> None:
    folder = Path(__file__).parents[2] / "st_bench"
    metric = Entities(Drawn(), Drawn(), Drawn(), descriptions=str(folder / "descriptions.csv"))
    for one in stories_of(folder / "stories"):
        prompts = " ".join(shot.prompt for shot in one.shots).lower()
        assert list(metric.descriptions[one.title]) == [character.name for character in one.characters]
        assert all(text.lower() in prompts for text in metric.descriptions[one.title].values())
    assert metric.settings()["descriptions"] != entities().settings()["descriptions"]
    metric.descriptions["The Walk"] = {"Ada": "of another", "Cleo": "A blue cat"}
    assert scores(metric, story, TRUE).details["entities"].keys() == {"Ada", "Ben", "Cleo"}
    assert metric._described(story)["Ada"] == "A red woman", "the story's own comes first"
