"""What every scorer promises: what it takes and gives, in which type, and that it can be moved and freed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from storymem.scorers.quality import NoQuality
from tests.scorers import tiny
from tests.scorers.tiny import pictures

# name -> (how it is built, how it is called on frames [N, 3, H, W], shape of a result's row)
SCORERS: dict[str, tuple[Callable[..., Any], Callable[[Any, Tensor], Tensor], list[int]]] = {
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


def call(kind: str, scorer: Any, frames: Tensor) -> Tensor:
    return SCORERS[kind][1](scorer, frames)


def test_empty_input_gives_an_empty_result(kind: str) -> None:
    result = call(kind, build(kind), pictures(1, 3, 40, 56)[:0])
    assert list(result.shape) == [0, *SCORERS[kind][2]]
    assert result.dtype == torch.float32


def test_one_frame_is_enough(kind: str) -> None:
    result = call(kind, build(kind), pictures(1, 3, 40, 56))
    assert list(result.shape) == [1, *SCORERS[kind][2]]
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_range_0_to_255_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1; got values from .* probably 0\.\.255: write .* / 255"):
        call(kind, build(kind), pictures(2, 3, 40, 56) * 255)


def test_range_minus_1_to_1_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"probably -1\.\.1"):
        call(kind, build(kind), pictures(2, 3, 40, 56) * 2 - 1)


def test_nan_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="NaN"):
        call(kind, build(kind), pictures(2, 3, 40, 56) * torch.nan)


def test_uint8_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"got torch\.uint8: write \w+\.float\(\) / 255"):
        call(kind, build(kind), (pictures(2, 3, 40, 56) * 255).to(torch.uint8))


def test_channels_last_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"channels seem to be last: write \w+\.permute"):
        call(kind, build(kind), pictures(2, 3, 40, 56).permute(0, 2, 3, 1))


def test_single_frame_without_its_axis_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"must have the axes .* got shape \[3, "):
        call(kind, build(kind), pictures(1, 3, 40, 56)[0])


def test_arrays_are_refused_with_what_to_write(kind: str) -> None:
    scorer = build(kind)
    method = scorer.embed_images if kind == "clip" else scorer.embed_clips if kind == "viclip" else scorer.score
    with pytest.raises(ValueError, match="from_numpy"):
        method(pictures(2, 3, 40, 56).numpy())


def test_bf16_agrees_within_its_precision(kind: str) -> None:
    frames = pictures(3, 3, 40, 56)
    exact = call(kind, build(kind), frames)
    rounded = call(kind, build(kind, dtype="bfloat16"), frames)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.03


def test_half_precision_frames_are_taken(kind: str) -> None:
    frames = pictures(2, 3, 40, 56).to(torch.bfloat16)
    assert torch.equal(call(kind, build(kind), frames), call(kind, build(kind), frames.float()))


def test_result_does_not_depend_on_the_batch(kind: str) -> None:
    frames = pictures(5, 3, 40, 56)
    whole = call(kind, build(kind, batch_size=8), frames)
    parts = call(kind, build(kind, batch_size=2), frames)
    torch.testing.assert_close(whole, parts, atol=2e-6, rtol=0)


def test_rows_keep_their_order(kind: str) -> None:
    frames = pictures(4, 3, 40, 56)
    scorer = build(kind, batch_size=3)
    torch.testing.assert_close(
        call(kind, scorer, frames.flip(0)), call(kind, scorer, frames).flip(0), atol=2e-6, rtol=0
    )


def test_same_seed_same_weights_and_the_global_state_is_left_alone(kind: str) -> None:
    frames = pictures(2, 3, 40, 56)
    torch.manual_seed(3)
    first = call(kind, build(kind, seed=1), frames)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, call(kind, build(kind, seed=1), frames))
    assert not torch.equal(first, call(kind, build(kind, seed=2), frames))


def test_moves_and_stays_usable(kind: str) -> None:
    frames = pictures(2, 3, 40, 56)
    scorer = build(kind)
    before = call(kind, scorer, frames)
    assert scorer.to("cpu") is scorer
    assert torch.equal(call(kind, scorer, frames), before)
    assert scorer.to(dtype="bfloat16").dtype == torch.bfloat16
    assert not torch.equal(call(kind, scorer, frames), before)


def test_freed_scorer_says_so(kind: str) -> None:
    scorer = build(kind)
    scorer.free()
    scorer.free()
    with pytest.raises(RuntimeError, match="was freed"):
        call(kind, scorer, pictures(1, 3, 40, 56))


def test_no_gradients_anywhere(kind: str) -> None:
    scorer = build(kind)
    network = scorer.clip.network if kind == "aesthetic" else scorer.network
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert not call(kind, scorer, pictures(1, 3, 40, 56)).requires_grad


def test_wrong_settings_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        build(kind, dtype="half")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        build(kind, batch_size=0)
    with pytest.raises(TypeError, match="batchsize"):
        build(kind, batchsize=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_the_cpu(kind: str) -> None:
    frames = pictures(3, 3, 40, 56)
    scorer = build(kind)
    before = call(kind, scorer, frames)
    scorer.to("cuda", "bfloat16")
    result = call(kind, scorer, frames.cuda())
    assert result.device.type == "cpu"
    assert (result - before).abs().max() < 0.03


@pytest.mark.parametrize("kind", ["clip", "viclip"])
def test_texts_become_unit_vectors_beside_the_pictures(kind: str) -> None:
    scorer = build(kind)
    texts = scorer.embed_texts(["a cat", "a dog in the rain"])
    assert texts.shape == (2, 32)
    assert texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(call(kind, scorer, pictures(2, 3, 40, 56)).norm(dim=-1), torch.ones(2))
    assert scorer.embed_texts([]).shape == (0, 32)
    with pytest.raises(ValueError, match=r"write \['a cat'\]"):
        scorer.embed_texts("a cat")
    with pytest.raises(ValueError, match=r"texts\[1\] is int"):
        scorer.embed_texts(["a cat", 3])


@pytest.mark.parametrize("kind", ["aesthetic", "hpsv3"])
def test_quality_scorers_take_one_prompt_a_frame(kind: str) -> None:
    scorer, frames = build(kind), pictures(2, 3, 40, 56)
    assert isinstance(scorer.threshold, float)
    assert isinstance(scorer.name, str)
    assert torch.equal(scorer.score(frames), scorer.score(frames, ["", ""]))
    with pytest.raises(ValueError, match="1 prompts for 2 frames"):
        scorer.score(frames, ["a cat"])


def test_no_quality_lets_every_frame_pass() -> None:
    scorer = NoQuality()
    assert (scorer.score(pictures(2, 3, 40, 56)) >= scorer.threshold).all()
    assert scorer.score(pictures(1, 3, 40, 56)[:0]).shape == (0,)
    assert scorer.to("cpu") is scorer
    scorer.free()
    with pytest.raises(ValueError, match=r"probably 0\.\.255"):
        scorer.score(pictures(2, 3, 40, 56) * 255)
