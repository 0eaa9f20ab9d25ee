"""The toy VAE and the latents that the denoisers learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from storymem.wan.conditioning import encode_video
from toyworld.latents import channel_statistics, encode, fill_cache, load_cache, shot_of_story
from toyworld.vae import build_vae, clip_plan, psnr_of, reconstruct, to_frames, to_video, training_clips, vae_loss
from toyworld.world import story


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return build_vae()


def test_strides_are_wans(vae: AutoencoderKLWan) -> None:
    latents = vae.encode(torch.zeros(1, 3, 9, 64, 96)).latent_dist.mode()
    assert latents.shape == (1, 16, 3, 8, 12)
    assert vae.decode(latents).sample.shape == (1, 3, 9, 64, 96)


def test_reconstruct_is_the_vaes_own_encode_and_decode(vae: AutoencoderKLWan) -> None:
    video = to_video(story(1).shots[0].frames[None, :9])
    with torch.no_grad():
        ours, _ = reconstruct(vae, video, sample=False)
        theirs = vae.decode(vae.encode(video).latent_dist.mode()).sample
    torch.testing.assert_close(ours.clamp(-1, 1), theirs)


def test_kl_is_torchs(vae: AutoencoderKLWan) -> None:
    video = to_video(story(1).shots[0].frames[None, :1])
    posterior = vae.encode(video).latent_dist
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(reconstruct(vae, video, sample=False)[1], expected.mean())


def test_frames_and_videos_are_two_forms_of_one_thing() -> None:
    frames = story(2).shots[0].frames[None]
    video = to_video(frames)
    assert video.shape == (1, 3, 17, 64, 96)
    assert video.min() >= -1
    assert video.max() <= 1
    np.testing.assert_array_equal(to_frames(video), frames)


def test_only_the_decoder_learns_when_the_encoder_is_kept() -> None:
    vae = build_vae()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    vae_loss(vae, 0, 0.0)[0].backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for part in (vae.encoder, vae.quant_conv) for p in part.parameters())


def test_characters_weigh_more_than_their_place() -> None:
    clips, weights = training_clips(0, 2, 3)
    assert clips.shape == (2, 3, 3, 64, 96)
    assert weights.shape == (2, 1, 3, 64, 96)
    assert set(weights.unique().tolist()) == {1.0, 4.0}


def test_clips_grow_longer_as_training_goes_on() -> None:
    lengths = [clip_plan(progress)[1] for progress in (0.0, 0.2, 0.4, 0.8, 1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == 17


def test_psnr_of_a_known_error() -> None:
    """A decoder that always says mid-grey misses by a known amount."""
    vae = build_vae()
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    shot = story(3).shots[0]
    error = np.square(shot.frames[:1].astype(float) - 128).mean()
    value, decoded = psnr_of(vae, [shot], 1)
    assert (decoded == 128).all()
    assert value == pytest.approx(10 * np.log10(255**2 / error))


def test_batched_latents_agree_with_those_of_generation(vae: AutoencoderKLWan) -> None:
    video = to_video(np.stack([story(seed).shots[0].frames[:5] for seed in (4, 5)]))
    one_by_one = torch.cat([encode_video(vae, v[None]) for v in video])
    assert (encode(vae, video) - one_by_one).abs().max() < 0.05 * one_by_one.std()


def test_statistics_bring_latents_to_zero_mean_and_unit_deviation() -> None:
    vae = build_vae()
    mean, std = channel_statistics(vae, range(3))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    latents = torch.cat([encode(vae, to_video(shot_of_story(seed)[0].frames[None])) for seed in range(3)])
    values = latents.permute(1, 0, 2, 3, 4).flatten(1)
    assert values.mean(dim=1).abs().max() < 0.05
    assert (values.std(dim=1) - 1).abs().max() < 0.05


def test_the_cache_is_filled_once_and_read_back(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    fill_cache(vae, tmp_path, range(2), count=2)
    stamp = (tmp_path / "0000.pt").stat().st_mtime_ns
    fill_cache(vae, tmp_path, range(2), count=2)
    assert (tmp_path / "0000.pt").stat().st_mtime_ns == stamp
    data = load_cache(tmp_path)
    assert data.shots.shape == data.firsts.shape == (4, 16, 5, 8, 12)
    shot, described = shot_of_story(3)
    assert (data.prompts[3], data.described[3]) == (shot.prompt, described)
    torch.testing.assert_close(data.shots[3], encode(vae, to_video(shot.frames[None]))[0].half(), rtol=0.05, atol=0.05)


def test_an_empty_cache_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage `latents`"):
        load_cache(tmp_path)
