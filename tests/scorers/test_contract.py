"""What every scorer promises: what it takes and gives, in which type, and that it can be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from storymem.scorers.scorer import NoQuality
from tests.scorers import tiny
from tests.scorers.tiny import images

# name -> (how it is built, how it is called on frames [N, 3, H, W], shape of a result's row)
SCORERS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Tensor], list[int]]] = {
    "clip": (tiny.clip, lambda scorer, frames: scorer.embed_images(frames), [32]),
    "viclip": (tiny.viclip, lambda scorer, frames: scorer.embed_clips(frames[:, None]), [32]),
    "aesthetic": (tiny.aesthetic, lambda scorer, frames: scorer.score(frames), []),
    "hpsv3": (tiny.hpsv3, lambda scorer, frames: scorer.score(frames), []),
}


@pytest.fixture(params=SCORERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: str, **arguments: Any) -> Any:
    return SCORERS[kind][0](**arguments)


def call(kind: str, scorer: Any, frames: Any) -> Tensor:
    return SCORERS[kind][1](scorer, frames)


@pytest.mark.parametrize("count", [0, 1])
def test_a_row_per_image_in_float32(kind: str, count: int) -> None:
    result = call(kind, build(kind), images(1, 3, 40, 56)[:count])
    assert list(result.shape) == [count, *SCORERS[kind][2]]
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames: frames * 255, r"RGB images in 0\.\.1 as a float tensor .*, not torch.float32 .* to 2\d\d"),
        (lambda frames: frames * 2 - 1, r"from -"),
        (lambda frames: frames * torch.nan, "from nan to nan"),
        (lambda frames: (frames * 255).to(torch.uint8), r"not torch\.uint8"),
        (lambda frames: frames.permute(0, 2, 3, 1), r"\[2, .*40, 56, 3\]"),
        (lambda frames: frames[0], r"tensor \[.*, not torch\.float32 \[3, "),
        (lambda frames: frames[..., :0], r"40, 0\]"),
        (lambda frames: frames.numpy(), "not ndarray .*as_images"),
    ],
)
def test_other_inputs_are_refused(kind: str, change: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kind, build(kind), change(images(2, 3, 40, 56)))


def test_bf16_agrees_within_its_precision(kind: str) -> None:
    frames = images(3, 3, 40, 56)
    exact, rounded = call(kind, build(kind), frames), call(kind, build(kind, dtype="bfloat16"), frames)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.03
    half = frames.to(torch.bfloat16)
    assert torch.equal(call(kind, build(kind), half), call(kind, build(kind), half.float()))


def test_result_does_not_depend_on_batch_or_order(kind: str) -> None:
    frames = images(5, 3, 40, 56)
    whole = call(kind, build(kind, batch_size=8), frames)
    parts = call(kind, build(kind, batch_size=2), frames.flip(0)).flip(0)
    torch.testing.assert_close(whole, parts, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "viclip", "aesthetic"])
def test_same_seed_same_weights_and_the_global_state_is_unchanged(kind: str) -> None:
    frames = images(2, 3, 40, 56)
    state = torch.get_rng_state()
    first = call(kind, build(kind, seed=1), frames)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, call(kind, build(kind, seed=1), frames))
    assert not torch.equal(first, call(kind, build(kind, seed=2), frames))


def test_wrong_settings_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        build(kind, dtype="half")
    with pytest.raises(ValueError, match="batch_size=0: must be 1 or more"):
        build(kind, batch_size=0)
    with pytest.raises(ValueError, match=r"device=toaster cannot be used here .* try auto or cpu"):
        build(kind, device="toaster")
    with pytest.raises(TypeError, match="batchsize"):
        build(kind, batchsize=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_the_cpu(kind: str) -> None:
    frames = images(3, 3, 40, 56)
    scorer = build(kind, dtype="bfloat16")
    before = call(kind, scorer, frames)
    assert scorer.to("cuda") is scorer
    result = call(kind, scorer, frames.cuda())
    assert result.device.type == "cpu"
    assert (result - before).abs().max() < 0.03
    torch.testing.assert_close(call(kind, scorer.to("cpu"), frames), before)


@pytest.mark.parametrize("kind", ["clip", "viclip"])
def test_texts_and_images_become_unit_vectors(kind: str) -> None:
    scorer = build(kind)
    texts = scorer.embed_texts(["a cat", "a dog in the rain"])
    assert texts.shape == (2, 32)
    assert texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(call(kind, scorer, images(2, 3, 40, 56)).norm(dim=-1), torch.ones(2))
    assert scorer.embed_texts([]).shape == (0, 32)
    with pytest.raises(ValueError, match=r"write \['a cat'\]"):
        scorer.embed_texts("a cat")
    with pytest.raises(ValueError, match=r"texts\[1\] is int"):
        scorer.embed_texts(["a cat", 3])


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "3", None, True])
@pytest.mark.parametrize("kind", ["aesthetic", "hpsv3"])
def test_thresholds_are_numbers(kind: str, threshold: Any) -> None:
    with pytest.raises(ValueError, match="write a number"):
        build(kind, threshold=threshold)


def test_no_quality_lets_every_frame_pass() -> None:
    scorer = NoQuality()
    assert (scorer.score(images(2, 3, 40, 56)) >= scorer.threshold).all()
    assert scorer.to("cpu") is scorer
    with pytest.raises(ValueError, match=r"RGB images in 0\.\.1"):
        scorer.score(images(2, 3, 40, 56) * 255)
