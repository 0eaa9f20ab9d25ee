"""The cache holds what the pipeline would compute, knows what made it, and is never half there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from storymem.config import build_settings
from storymem.data import cache as latent_cache
from storymem.data import manifest
from storymem.data.cache import LatentCache, cache_fingerprint
from storymem.data.prepare import prepare
from storymem.data.settings import Bucket, DataSettings, PrepareSettings
from storymem.media.video import read_video
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings
from tests.data.drawn_clips import DATA, FRAMES, HEIGHT, WIDTH, scene, video
from tests.data.preparing import config
from tests.wan import tiny

LATENT = (HEIGHT // 8, WIDTH // 8)
SLOTS = (FRAMES - 1) // 4 + 1
EXACT = ("cache.dtype=float32", "cache.given=[1,5]", "memory/selector=uniform", "memory.selector.max_keyframes=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of three captions, and their set."""
    folder = tmp_path_factory.mktemp("cached")
    for number in range(5):
        video(folder / "videos" / f"{number}.mp4", scene(number, 12), caption=f"clip {number // 2}")
    prepare(config(folder, *EXACT))
    return folder


@pytest.fixture
def cache(folder: Path) -> LatentCache:
    return LatentCache.open(folder / "set")


@pytest.fixture(scope="module")
def own_pipe(folder: Path) -> WanMemoryToVideoPipeline:
    return load_pipeline(build_settings(PrepareSettings, config(folder, *EXACT)).model, runtime=tiny.CPU)


def images(folder: Path, number: int) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in read_video(folder / "videos" / f"{number}.mp4", range(FRAMES))]


def test_keyframes_are_latents_of_single_frames_as_the_pipeline_encodes_them(
    folder: Path, cache: LatentCache, own_pipe: WanMemoryToVideoPipeline
) -> None:
    assert cache.keyframes(1).shape == (2, 16, 1, *LATENT)
    every_frame = own_pipe.encode_memory(images(folder, 1))
    for keyframe in cache.keyframes(1):
        assert min((keyframe - other).abs().max() for other in every_frame) < 1e-5


@pytest.mark.parametrize("given", [0, 1, 5])
def test_conditions_are_those_of_a_generated_shot(
    folder: Path, cache: LatentCache, own_pipe: WanMemoryToVideoPipeline, given: int
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(_pipe: Any, _step: int, _timestep: Any, tensors: dict) -> dict:
        seen.update(tensors)
        return {}

    frames = images(folder, 3)
    conditions = {0: {}, 1: {"first_frame": frames[0]}, 5: {"motion_frames": frames[:5]}}[given]
    watched = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["condition"]}
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    tiny.generate(own_pipe, num_inference_steps=1, **size, **conditions, **watched)
    assert cache.given(3, given).shape == (16, SLOTS, *LATENT)
    assert torch.allclose(cache.given(3, given), seen["condition"][0, 4:].float(), atol=1e-5)


def test_the_video_is_what_diffusers_encodes(
    folder: Path, cache: LatentCache, own_pipe: WanMemoryToVideoPipeline
) -> None:
    clip = own_pipe.video_processor.preprocess_video(images(folder, 2), height=HEIGHT, width=WIDTH)
    raw = own_pipe.vae.encode(clip).latent_dist.mode()[0]
    config = own_pipe.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    assert torch.allclose(cache.video(2) * std + mean, raw, atol=1e-4)


def test_texts_are_the_pipelines_padding_included(cache: LatentCache, own_pipe: WanMemoryToVideoPipeline) -> None:
    for caption, found in ((cache.clips[4].caption, cache.text(4)), ("", cache.empty_text())):
        expected, _ = own_pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=16)
        assert torch.equal(found, expected[0].float())
    assert (cache.empty_text()[-1] == 0).all()


def test_equal_captions_are_stored_once(cache: LatentCache) -> None:
    stored = [name for path in cache.folder.glob("shard-*.safetensors") for name in load_file(path)]
    assert len([name for name in stored if name.startswith("text ")]) == 4  # three captions, and the empty text


def test_half_the_space_costs_little_and_is_another_cache(folder: Path, tmp_path: Path, cache: LatentCache) -> None:
    small = prepare(config(folder, f"output={tmp_path}", *EXACT[2:]))
    assert small is not None
    assert torch.allclose(small.video(0), cache.video(0), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"no conditioning latents of 5 first frames: .* cache\.given=\[1, 5\]"):
        small.given(0, 5)


def test_a_cache_is_opened_by_its_fingerprint(folder: Path, cache: LatentCache) -> None:
    assert LatentCache.open(folder / "set", fingerprint={"vae": cache.fingerprint["vae"]}).folder == cache.folder
    with pytest.raises(ValueError, match=r"another vae \(\w+, not c\)"):
        LatentCache.open(folder / "set", fingerprint={"vae": "c"})
    with pytest.raises(ValueError, match="no finished cache"):
        LatentCache.open(folder / "nowhere")


def test_what_the_fingerprint_depends_on(tiny_model: ModelSettings) -> None:
    base = cache_fingerprint(tiny_model, DATA)

    def differing(model: ModelSettings = tiny_model, data: DataSettings = DATA) -> set[str]:
        return {name for name, value in cache_fingerprint(model, data).items() if value != base[name]}

    network = tiny_model.network
    assert differing(replace(tiny_model, dtype="bfloat16")) == set()
    assert differing(replace(tiny_model, seed=1)) == {"vae", "text_encoder"}
    assert differing(replace(tiny_model, network=replace(network, vae=network.vae | {"base_dim": 8}))) == {"vae"}
    assert differing(replace(tiny_model, network=replace(network, text_tokens=8))) == {"text_encoder"}
    assert differing(data=replace(DATA, buckets=(Bucket(frames=5, height=32, width=48),))) == {"size"}
    assert differing(data=replace(DATA, fps=16)) == {"size"}


def test_published_weights_count_by_their_files(tmp_path: Path) -> None:
    def at(change: bytes) -> dict[str, str]:
        for part in ("vae", "text_encoder", "tokenizer"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / "weights").write_bytes(b"0" * 5_000_000)
        (tmp_path / "vae" / "weights").write_bytes(change * 5_000_000)
        weights = {"name": "x", "source": str(tmp_path)}
        return cache_fingerprint(tiny.settings(weights=weights, has_text_to_video=False), DATA)

    one, same, other = at(b"0"), at(b"0"), at(b"1")
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"vae"}


def test_a_set_of_an_older_version_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text(json.dumps(manifest.with_checksum({"format": 2})))
    with pytest.raises(ValueError, match="of an older version: prepare the data again"):
        LatentCache.open(tmp_path)
    (tmp_path / "set" / "journal").mkdir(parents=True)
    with pytest.raises(ValueError, match="by an older version: prepare the data again, in another output folder"):
        prepare(config(folder, f"output={tmp_path / 'set'}"))


def test_shards_are_written_in_time_and_few_stay_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(latent_cache, "OPEN_SHARDS", 2)
    many = prepare(config(folder, f"output={tmp_path}", *EXACT))
    assert many is not None
    assert len({clip.shard for clip in many.clips}) == 5
    one = LatentCache.open(folder / "set")
    for index in [*range(5), *range(5)]:
        assert torch.equal(many.video(index), one.video(index))
    assert many._opened.cache_info().currsize == 2
