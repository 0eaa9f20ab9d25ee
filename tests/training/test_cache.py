"""The cache holds what the pipeline would compute, knows what made it, and is never half there."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from storymem.data.cache import LatentCache
from storymem.data.caching import CacheBuilder, CacheItem, KeyframeChooser, build_cache
from storymem.data.fingerprint import cache_fingerprint
from storymem.data.settings import Bucket, CacheSettings, DataSettings
from storymem.memory import UniformSelector
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings
from tests.training.drawn_clips import DATA, scene
from tests.wan import tiny

BUCKET = (tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH)
TOKENS = 16
FLOAT32 = CacheSettings(dtype="float32")
CHOOSER = KeyframeChooser(
    embed=lambda frames: frames.reshape(len(frames), -1)[:, ::97].astype(np.float32) + 1,
    selector=UniformSelector(max_keyframes=2),
)


def item(number: int, **changes: Any) -> CacheItem:
    values: dict[str, Any] = {
        "id": f"clips/{number}.mp4@0.000",
        "caption": f"clip {number // 2}",
        "group": number // 3,
        "split": "valid" if number >= 3 else "train",
        "bucket": BUCKET,
        "frames": lambda: scene(number, tiny.FRAMES),
        "made": "once",
    }
    return CacheItem(**values | changes)


def build(folder: Path, pipe: WanMemoryToVideoPipeline, items: list[CacheItem], **changes: Any) -> LatentCache:
    values: dict[str, Any] = {"fingerprint": {"vae": "a", "size": "b"}, "settings": FLOAT32, "text_tokens": TOKENS}
    return build_cache(folder, items, pipe, CHOOSER, **values | changes)


@pytest.fixture(scope="module")
def cache(pipe: WanMemoryToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build(tmp_path_factory.mktemp("cache"), pipe, [item(number) for number in range(5)])


def pictures(number: int) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in scene(number, tiny.FRAMES)]


def test_clips_and_groups(cache: LatentCache) -> None:
    assert [clip.id for clip in cache.clips] == [f"clips/{number}.mp4@0.000" for number in range(5)]
    assert cache.clips[2].caption == "clip 1"
    assert cache.clips[2].bucket == BUCKET
    assert cache.groups("train") == {0: [0, 1, 2]}
    assert cache.groups("valid") == {1: [3, 4]}
    assert len(cache) == 5


def test_keyframes_are_latents_of_single_frames_as_the_pipeline_encodes_them(
    cache: LatentCache, pipe: WanMemoryToVideoPipeline
) -> None:
    chosen = CHOOSER.choose(scene(1, tiny.FRAMES))
    assert cache.clips[1].keyframes == len(chosen) == 2
    expected = pipe.encode_memory([pictures(1)[frame] for frame in chosen])
    assert cache.keyframes(1).shape == (2, 16, 1, *tiny.LATENT)
    assert torch.allclose(cache.keyframes(1), expected, atol=1e-5)


@pytest.mark.parametrize("given", [0, 1, 5])
def test_conditions_are_those_of_a_generated_shot(
    cache: LatentCache, pipe: WanMemoryToVideoPipeline, given: int
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(_pipe: Any, _step: int, _timestep: Any, tensors: dict) -> dict:
        seen.update(tensors)
        return {}

    conditions = {0: {}, 1: {"first_frame": pictures(3)[0]}, 5: {"motion_frames": pictures(3)[:5]}}[given]
    watched = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["condition"]}
    tiny.generate(pipe, num_inference_steps=1, **conditions, **watched)
    assert cache.given(3, given).shape == (16, tiny.SLOTS, *tiny.LATENT)
    assert torch.allclose(cache.given(3, given), seen["condition"][0, 4:].float(), atol=1e-5)


def test_the_video_is_what_diffusers_encodes(cache: LatentCache, pipe: WanMemoryToVideoPipeline) -> None:
    video = pipe.video_processor.preprocess_video(pictures(2), height=tiny.HEIGHT, width=tiny.WIDTH)
    raw = pipe.vae.encode(video).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1) for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    assert torch.allclose(cache.video(2) * std + mean, raw, atol=1e-4)


def test_texts_are_the_pipelines_padding_included(cache: LatentCache, pipe: WanMemoryToVideoPipeline) -> None:
    for caption, found in ((cache.clips[4].caption, cache.text(4)), ("", cache.empty_text())):
        expected, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        assert torch.equal(found, expected[0].float())
    assert (cache.empty_text()[-1] == 0).all()


def test_equal_captions_are_stored_once(cache: LatentCache) -> None:
    stored = [name for path in cache.folder.glob("texts-*.safetensors") for name in load_file(path)]
    assert len(stored) == 4  # three captions of five clips, and the empty text


def test_a_cache_can_be_sent_to_another_process(cache: LatentCache) -> None:
    cache.video(0)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.video(0), cache.video(0))


def test_half_the_space_costs_little(tmp_path: Path, cache: LatentCache, pipe: WanMemoryToVideoPipeline) -> None:
    small = build(tmp_path, pipe, [item(0)], settings=CacheSettings(given=(1,)))
    assert small.video(0).dtype == torch.float32
    assert torch.allclose(small.video(0), cache.video(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"no condition of 5 first frames: .* cache\.given=\[1, 5\]"):
        small.given(0, 5)


def test_another_fingerprint_is_another_cache(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    one = build(tmp_path, pipe, [item(0)])
    other = build(tmp_path, pipe, [item(1)], fingerprint={"vae": "new", "size": "b"})
    assert one.folder != other.folder
    assert LatentCache.open(tmp_path, fingerprint={"vae": "a", "size": "b"}).folder == one.folder
    assert LatentCache.open(tmp_path, fingerprint={"vae": "new"}).clips[0].id == item(1).id
    with pytest.raises(ValueError, match=r"another vae \(a, not c\)"):
        LatentCache.open(tmp_path, fingerprint={"vae": "c", "size": "b"})
    with pytest.raises(ValueError, match=r"another size \(b, not z\)"):
        LatentCache.open(one.folder, fingerprint={"vae": "a", "size": "z"})
    with pytest.raises(ValueError, match="several caches"):
        LatentCache.open(tmp_path)
    with pytest.raises(ValueError, match="no finished cache"):
        LatentCache.open(tmp_path / "nowhere")


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


def test_published_weights_count_by_their_files(tmp_path: Path, tiny_model: ModelSettings) -> None:
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


def test_a_damaged_shard_is_found_when_it_is_first_read(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    folder = build(tmp_path, pipe, [item(0)]).folder
    (shard,) = folder.glob("clips-*.safetensors")
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(bytes(whole))
    cache = LatentCache.open(tmp_path)
    with pytest.raises(ValueError, match=r"clips-w000-00000\.safetensors is damaged: .* Delete it"):
        cache.video(0)
    shard.unlink()
    with pytest.raises(
        ValueError, match=r"is not complete \(clips-w000-00000\.safetensors is missing\): run prepare_data again"
    ):
        LatentCache.open(tmp_path)
    assert torch.isfinite(build(tmp_path, pipe, [item(0)]).video(0)).all(), "and so it is mended"


def test_a_damaged_index_is_refused(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    (index,) = build(tmp_path, pipe, [item(0)]).folder.glob("index-*.jsonl")
    index.write_text(index.read_text().replace("clip 0", "clip 9"))
    with pytest.raises(ValueError, match="missing or damaged"):
        LatentCache.open(tmp_path)


class Stopped(Exception):
    """What a killed process is to the code after it."""


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    read: list[int] = []

    def counting(number: int, *, stop: bool = False) -> CacheItem:
        def frames() -> np.ndarray:
            if stop:
                raise Stopped
            read.append(number)
            return scene(number, tiny.FRAMES)

        return item(number, frames=frames)

    small = CacheSettings(dtype="float32", shard_mb=0.001)  # every clip in a shard of its own
    builder = CacheBuilder(tmp_path, fingerprint={}, settings=small, text_tokens=TOKENS)
    with pytest.raises(Stopped):
        build(tmp_path, pipe, [counting(n, stop=n == 3) for n in range(5)], fingerprint={}, settings=small)
    (builder.folder / "clips-w000-00003.safetensors").write_bytes(b"begun")
    with pytest.raises(ValueError, match="no finished cache"):
        LatentCache.open(tmp_path)
    cache = build(tmp_path, pipe, [counting(n) for n in range(5)], fingerprint={}, settings=small)
    assert read == [0, 1, 2, 3, 4]
    assert len(cache) == 5
    assert len({clip.shard for clip in cache.clips}) == 5
    assert all(torch.isfinite(cache.video(index)).all() for index in range(5))


def test_a_clip_that_changed_is_made_again_and_a_regrouped_one_is_not(
    tmp_path: Path, pipe: WanMemoryToVideoPipeline
) -> None:
    def forbidden() -> np.ndarray:
        raise AssertionError("this clip was cached already")

    before = build(tmp_path, pipe, [item(0), item(1)])
    changed = item(1, made="twice", frames=lambda: scene(9, tiny.FRAMES))
    after = build(tmp_path, pipe, [item(0, frames=forbidden, group=7, caption="new words"), changed])
    assert (after.clips[0].group, after.clips[0].caption) == (7, "new words")
    assert torch.equal(after.video(0), before.video(0))
    assert not torch.equal(after.video(1), before.video(1))


def test_broken_clips_are_told_and_lonely_ones_left_out(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    def broken() -> np.ndarray:
        raise ValueError("broken: ends before 1.00 s")

    items = [item(0), item(1), item(2, frames=broken), item(3), item(4, frames=broken)]
    builder = CacheBuilder(tmp_path, fingerprint={}, settings=FLOAT32, text_tokens=TOKENS)
    told: dict[str, str] = {}
    builder.add_texts(builder.missing_texts(one.caption for one in items), pipe)
    builder.add_clips(items, pipe, CHOOSER, reject=lambda one, reason: told.update({one.id: reason}))
    builder.add_blanks([BUCKET], pipe)
    cache = builder.finish(items, min_size=2)
    assert told == {items[2].id: "broken: ends before 1.00 s", items[4].id: "broken: ends before 1.00 s"}
    assert [clip.id for clip in cache.clips] == [items[0].id, items[1].id], "3 lost its only companion"


def test_frames_below_the_quality_threshold_are_no_keyframes() -> None:
    dim = scene(0, 9)
    dim[3:] //= 4
    chooser = replace(CHOOSER, score=lambda frame: float(frame.mean()), threshold=60.0)
    assert all(frame < 3 for frame in chooser.choose(dim))
    with pytest.raises(ValueError, match="quality: no frame reaches the threshold 256"):
        replace(chooser, threshold=256.0).choose(dim)


def test_many_shards_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storymem.data import shards

    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    writer = shards.ShardWriter(tmp_path, "x", shard_bytes=1)
    for number in range(5):
        writer.add(str(number), {"t": torch.full((3,), float(number))})
    done = shards.finished(tmp_path, "x")
    reader = shards.ShardReader(tmp_path, done.hashes)
    for _ in range(2):
        found = [reader.read(done.get(str(n))["shard"], str(n), "t")[0].item() for n in range(5)]
        assert found == [0, 1, 2, 3, 4]
    assert len(reader._open) == 2


def test_a_shard_without_its_record_was_never_written(tmp_path: Path) -> None:
    from storymem.data import shards

    save_file({"a/t": torch.zeros(1)}, tmp_path / "x-00000.safetensors")
    assert shards.finished(tmp_path, "x") == shards.Finished({}, {}, [])
    writer = shards.ShardWriter(tmp_path, "x", shard_bytes=1)
    writer.add("b", {"t": torch.ones(1)})
    assert set(shards.finished(tmp_path, "x").records) == {("b", "")}


def test_a_shard_is_written_before_it_is_full_if_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storymem.data import shards

    writer = shards.ShardWriter(tmp_path, "x", shard_bytes=2**30)
    writer.add("a", {"t": torch.zeros(2)})
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    writer.add("b", {"t": torch.ones(2)})
    assert set(shards.finished(tmp_path, "x").records) == {("a", ""), ("b", "")}


def test_a_clip_keeps_its_mask_and_others_have_none(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    mask = np.zeros(BUCKET, np.float32)
    mask[1:5, :8, :8] = 0.75
    cache = build(tmp_path, pipe, [item(0, mask=lambda: mask), item(1)])
    assert [clip.mask for clip in cache.clips] == [True, False]
    assert cache.mask(0).shape == cache.video(0).shape[1:]
    assert cache.mask(0)[1, 0, 0] == 0.75
    assert cache.mask(0).sum() == 0.75
    assert torch.equal(cache.mask(1), torch.zeros(cache.video(1).shape[1:]))
