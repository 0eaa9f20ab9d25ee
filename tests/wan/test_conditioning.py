"""The conditioning: which latent frames the mask marks as given, and their clean latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from storymem.wan.conditioning import (
    blank_padded,
    condition_channels,
    decode_video,
    encode_frames,
    encode_video,
    latent_mask,
    memory_input,
    model_input,
)
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.spec import A14B, TI2V_5B, spec_of


@pytest.fixture(scope="module")
def vae(pipe: WanMemoryToVideoPipeline) -> AutoencoderKLWan:
    return pipe.vae


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_latent_frames_are_those_of_the_vae(vae: AutoencoderKLWan, frames: int) -> None:
    assert encode_video(vae, torch.zeros(1, 3, frames, 16, 16)).shape == (1, 16, A14B.latent_frames(frames), 2, 2)


@pytest.mark.parametrize(
    ("frames", "below", "above"), [(82, 81, 85), (80, 77, 81), (84, 81, 85), (2, 1, 5), (4, 1, 5), (-1, 1, 5)]
)
def test_other_counts_are_refused_with_the_nearest(frames: int, below: int, above: int) -> None:
    with pytest.raises(ValueError, match=rf"4n \+ 1 frames, not {frames}: the nearest are {below} and {above}"):
        A14B.latent_frames(frames)


@pytest.mark.parametrize(
    ("given", "marked"),
    [(0, [1, 1, 1, 0, 0, 0, 0]), (1, [1, 1, 1, 1, 0, 0, 0]), (2, [1, 1, 1, 1, 1, 0, 0])],
    ids=["m2v", "mi2v", "mm2v"],
)
def test_the_mask_of_each_mode(given: int, marked: list[int]) -> None:
    memory, video = random(2, 16, 3, 2, 2), random(2, 16, 4, 2, 2, seed=1)
    condition = condition_channels(memory, video, given)
    assert condition.shape == (2, 20, 7, 2, 2)
    expected = torch.tensor(marked, dtype=torch.float32).view(1, 1, 7, 1, 1).expand(2, 4, 7, 2, 2)
    assert torch.equal(condition[:, :4], expected)
    assert torch.equal(condition[:, 4:, :3], memory)
    assert torch.equal(condition[:, 4:, 3:], video)


def test_the_condition_without_memory_is_that_of_image_to_video() -> None:
    video = random(1, 16, 4, 2, 2)
    condition = condition_channels(None, video, 1)
    assert torch.equal(condition[:, 4:], video)
    assert condition[0, :4, :, 0, 0].tolist() == [[1, 0, 0, 0]] * 4
    assert not condition_channels(None, video, 0)[:, :4].any()


def test_clean_memory_is_its_own_condition() -> None:
    memory = random(1, 16, 2, 2, 2)
    seen = memory_input(memory)
    assert torch.equal(seen, torch.cat([memory, torch.ones(1, 4, 2, 2, 2), memory], dim=1))
    assert torch.equal(memory_input(memory, TI2V_5B), memory)
    assert torch.equal(model_input(memory, None), memory)


def test_base_models_are_known_by_their_shapes() -> None:
    assert spec_of(in_channels=36, latent_channels=16, spatial_stride=8) is A14B
    assert spec_of(in_channels=48, latent_channels=48, spatial_stride=16) is TI2V_5B
    with pytest.raises(ValueError, match="no known base model has 20 input channels"):
        spec_of(in_channels=20, latent_channels=16, spatial_stride=8)


def test_blank_is_zero_and_given_frames_come_first() -> None:
    given = random(3, 5, 16, 32)
    video = blank_padded(given, 9, 16, 32)
    assert video.shape == (1, 3, 9, 16, 32)
    assert torch.equal(video[0, :, :5], given)
    assert not video[:, :, 5:].any()
    assert not blank_padded(None, 9, 16, 32).any()


def test_each_memory_frame_is_encoded_alone(vae: AutoencoderKLWan) -> None:
    frames = random(3, 3, 16, 32)
    together = encode_frames(vae, frames)
    assert together.shape == (3, 16, 1, 2, 4)
    for number in range(3):
        alone = vae.encode(frames[number][None, :, None]).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        torch.testing.assert_close(together[number][None], (alone - mean) / std)
    as_video = encode_video(vae, torch.stack([frames[0]] * 5, dim=1)[None])
    assert as_video.shape[2] == 2
    assert not torch.allclose(as_video[0, :, 1:], together[0], atol=1e-3), "a video's later slots differ"


def test_a_video_is_decoded_from_normalised_latents(vae: AutoencoderKLWan) -> None:
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    raw = random(1, 16, 3, 2, 2)
    with torch.no_grad():
        expected = vae.decode(raw).sample
    video = decode_video(vae, (raw - mean) / std)
    assert video.shape == (1, 3, 9, 16, 16)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_of_pixels_reaches_the_latents_that_show_them() -> None:
    mask = torch.zeros(17, 16, 24)
    mask[0, 0, 0] = 1.0  # the first frame has a latent frame of its own
    mask[4, 15, 23] = 0.5  # the last of the second latent frame's four
    mask[5, 7, 8] = 1.0  # the first of the third's
    expected = torch.zeros(5, 2, 3)
    expected[0, 0, 0], expected[1, 1, 2], expected[2, 0, 1] = 1.0, 0.5, 1.0
    assert torch.equal(latent_mask(mask), expected)
