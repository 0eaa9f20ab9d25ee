"""Which frames become keyframes; the published scan itself is in ``tests/test_reference.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from storymem.memory import KeyframeSelector, UniformSelector, embed_in_batches

NOTHING = np.zeros((0, 0), dtype=np.float32)


def on_circle(*degrees: float) -> np.ndarray:
    """Embeddings in the plane: the cosine of two frames is that of the angle between them."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Scores:
    """Quality scores that count their calls."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.asked: Counter[int] = Counter()

    def __call__(self, frame: int) -> float:
        self.asked[frame] += 1
        return self.scores[frame]


def test_the_length_of_embeddings_does_not_matter() -> None:
    embeddings = on_circle(0, 10, 20, 40, 90)
    stretched = embeddings * np.array([[1], [7], [0.2], [3], [100]], dtype=np.float32)
    selector = KeyframeSelector()
    bank = on_circle(45)
    assert selector.select(stretched, bank=bank * 9).kept == selector.select(embeddings, bank=bank).kept


def test_quality_is_asked_lazily_and_once() -> None:
    scores = Scores(1, 5, 5, 1, 5, 5, 5, 5)
    embeddings = on_circle(0, 0, 5, 60, 65, 65, 125, 190)
    selection = KeyframeSelector(max_keyframes=2).select(embeddings, bank=NOTHING, quality=scores, quality_threshold=3)
    # 0 fails, 1 is the first keyframe, 2 and 5 are like the keyframe before them and are never scored.
    assert scores.asked == {0: 1, 1: 1, 3: 1, 4: 1, 6: 1, 7: 1}
    assert selection.quality == {0: 1, 1: 5, 3: 1, 4: 5, 6: 5, 7: 5}


def test_without_scores_there_is_no_filter() -> None:
    assert KeyframeSelector().select(on_circle(0, 0, 60), bank=NOTHING).kept == (0, 2)


def test_a_score_that_is_not_a_number_does_not_pass() -> None:
    scores = Scores(float("nan"), 4)
    selection = KeyframeSelector().select(on_circle(0, 60), bank=NOTHING, quality=scores, quality_threshold=3)
    assert selection.selected == (1,)


@pytest.mark.parametrize("halves", [{"quality": len}, {"quality_threshold": 3.0}])
def test_scores_and_their_threshold_come_together(halves: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        KeyframeSelector().select(on_circle(0), bank=NOTHING, **halves)


def test_similarity_to_the_bank_is_reported() -> None:
    selector = KeyframeSelector()
    selection = selector.select(on_circle(0, 0, 60), bank=on_circle(20, 180))
    assert selection.similarity[0] == pytest.approx(np.cos(np.deg2rad(20)), abs=1e-6)
    assert selection.similarity[2] == pytest.approx(np.cos(np.deg2rad(40)), abs=1e-6)
    assert (selection.selected, selection.kept) == ((0, 2), (2,))
    assert selector.select(on_circle(0, 0, 60), bank=NOTHING).similarity == {0: None, 2: None}


def test_a_bank_threshold_of_one_keeps_even_the_same_image() -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(50, 7)).astype(np.float32)
    selection = KeyframeSelector(bank_similarity_threshold=1, max_keyframes=50).select(frames, bank=frames)
    assert selection.kept == selection.selected
    assert len(selection.kept) > 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"similarity_threshold": 1.5}, "cosine lies between"),
        ({"bank_similarity_threshold": -2}, "cosine lies between"),
        ({"threshold_step": 0}, "threshold_step=0"),
        ({"max_keyframes": 0}, "max_keyframes=0"),
        ({"first_scanned_frame": 0}, "first_scanned_frame=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyframeSelector(**wrong)


def test_a_bank_of_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="different encoders"):
        KeyframeSelector().select(on_circle(0), bank=np.ones((2, 3), np.float32))


def test_frames_without_direction_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] are zero or not finite"):
        KeyframeSelector().select(np.array([[1, 0], [0, 0]], np.float32), bank=NOTHING)
    with pytest.raises(ValueError, match="at least one frame"):
        KeyframeSelector().select(np.zeros((0, 4), np.float32), bank=NOTHING)


@pytest.mark.parametrize(
    ("count", "frames", "selected"),
    [(3, 81, (0, 27, 54)), (1, 81, (0,)), (4, 10, (0, 2, 5, 7)), (3, 2, (0, 1))],
)
def test_uniform_selection_ignores_what_frames_show(count: int, frames: int, selected: tuple[int, ...]) -> None:
    static = on_circle(*[0] * frames)
    selection = UniformSelector(max_keyframes=count).select(static, bank=static[:1])
    assert selection.kept == selection.selected == selected
    assert selection.similarity == pytest.approx(dict.fromkeys(selected, 1.0))


def test_uniform_selection_takes_the_first_good_frame_of_each_part() -> None:
    scores = Scores(1, 5, 5, 1, 1, 1, 1, 1, 5)
    selection = UniformSelector(max_keyframes=3).select(
        on_circle(*range(9)), bank=NOTHING, quality=scores, quality_threshold=3
    )
    assert selection.kept == (1, 8)
    assert scores.asked == dict.fromkeys([0, 1, 3, 4, 5, 6, 7, 8], 1)


def mean_colours(seen: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    def embed(frames: np.ndarray) -> np.ndarray:
        seen.append(len(frames))
        return frames.mean(axis=(1, 2))

    return embed


def test_every_frame_is_embedded_once_in_batches() -> None:
    frames = np.random.default_rng(0).integers(1, 255, (21, 4, 6, 3), dtype=np.uint8)
    batches: list[int] = []
    embeddings = embed_in_batches(frames, mean_colours(batches), batch_size=8)
    assert batches == [8, 8, 5]
    assert embeddings.dtype == np.float32
    expected = frames.mean(axis=(1, 2))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5)


def test_frames_of_another_kind_are_not_embedded() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\].*float64 \[2, 4, 4, 3\]"):
        embed_in_batches(np.zeros((2, 4, 4, 3)), mean_colours([]))
    with pytest.raises(ValueError, match="zero or not finite"):
        embed_in_batches(np.zeros((2, 4, 4, 3), np.uint8), mean_colours([]))
