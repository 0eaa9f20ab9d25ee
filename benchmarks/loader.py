"""Training samples per second: read from the cache, against decoding and encoding on the fly.

    python -m benchmarks.loader [--quick] [--size tiny|480p] [--device auto|cpu|cuda] [--threads N]

A sample is what a training step sees of one clip: latents of the clip, of the video with its first frame, of three
memory frames from other clips, and the prompt embeds. Both sides are one process and give the same tensors, which is
checked. On the fly, text embeddings are computed once per caption, which only flatters that side. ``480p`` has the
published VAE's shape (random weights), 81 frames of 832x480, and wants an accelerator.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storymem.commands.configuration import composed
from storymem.config import build_settings
from storymem.data.cache import LatentCache
from storymem.data.clips import Clip, read_clip
from storymem.data.prepare import prepare
from storymem.data.settings import Bucket
from storymem.media.video import write_video
from storymem.wan.conditioning import blank_padded, encode_frames, encode_video
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, RuntimeSettings, VideoSettings

CLIPS, MEMORY = 12, 3
Sample = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Samples per second of both sides in one run."""

    size: str
    device: str
    fly: float
    cache_first: float
    cache_again: float
    ratio_first: float
    ratio_again: float
    megabytes_per_clip: float
    threads: int


class OnTheFly:
    """Decodes and encodes what a sample needs when it is asked for."""

    def __init__(self, folder: Path, clips: list[Clip], pipe: WanMemoryToVideoPipeline, tokens: int) -> None:
        self.folder, self.clips, self.pipe, self.tokens = folder, clips, pipe, tokens

    def sample(self, index: int) -> Sample:
        """As :func:`from_cache`."""
        bucket = self.clips[index].bucket
        pixels = self._pixels(self.clips[index])
        given = blank_padded(pixels[:, :1], bucket.frames, bucket.height, bucket.width)
        memory = [self._pixels(self.clips[other], [0])[:, 0] for other in _others(index)]
        return (
            encode_video(self.pipe.vae, pixels[None])[0].cpu(),
            encode_video(self.pipe.vae, given)[0].cpu(),
            encode_frames(self.pipe.vae, torch.stack(memory)).cpu(),
            self._text(f"Clip {index}."),
        )

    def _pixels(self, clip: Clip, indices: list[int] | None = None) -> Tensor:
        frames = torch.from_numpy(read_clip(self.folder / clip.video, clip, indices))
        return frames.permute(3, 0, 1, 2).float() / 127.5 - 1.0

    @cache  # noqa: B019
    def _text(self, caption: str) -> Tensor:
        embeds, _ = self.pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=self.tokens)
        return embeds[0].cpu()


def from_cache(cache: LatentCache, index: int) -> Sample:
    """(clip, condition of its first frame, memory frames, text)."""
    memory = torch.stack([cache.keyframes(other)[0] for other in _others(index)])
    return cache.video(index), cache.given(index, 1), memory, cache.text(index)


def _others(index: int) -> list[int]:
    return [(index + step) % CLIPS for step in range(1, MEMORY + 1)]


def drawn_clips(folder: Path, bucket: Bucket, fps: int) -> list[Clip]:
    """Videos of moving tiles with some noise, two seconds longer than their clip."""
    clips = []
    for number in range(CLIPS):
        random = np.random.default_rng(number)
        side = max(16, bucket.height // 8)
        tiles = random.integers(0, 256, (bucket.height // side + 1, bucket.width // side + 1, 3))
        picture = tiles.repeat(side, 0).repeat(side, 1)[: bucket.height, : bucket.width]
        picture = np.clip(picture + random.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        frames = (np.roll(picture, 2 * frame, axis=1) for frame in range(bucket.frames + 2 * fps))
        write_video(folder / f"{number:03d}.mp4", frames, fps)
        clips.append(Clip(id=f"{number:03d}", video=f"{number:03d}.mp4", start=1.0, fps=fps, bucket=bucket))
    return clips


def cached(folder: Path, bucket: Bucket, model: ModelSettings, device: str) -> LatentCache:
    """The cache of the clips in float32, as on the fly."""
    for number in range(CLIPS):
        (folder / f"{number:03d}.txt").write_text(f"Clip {number}.")
    config = composed(
        "prepare_data",
        [
            *("model=tiny", f"videos={folder}", f"output={folder / 'set'}", "split.margin=1", "cache.given=[1]"),
            *("cache.dtype=float32", "cache.shard_mb=64", "memory/selector=uniform", "memory.selector.max_keyframes=1"),
            *("scorer/quality=none", "group.similarity=-1", "group.near_duplicate=1.5", f"runtime.device={device}"),
        ],
    )
    size = {"buckets": [asdict(bucket)], "fps": model.video.fps}
    cache = prepare(config | {"model": asdict(model), "data": size})
    assert cache is not None
    return cache


def samples_per_second(sample: Callable[[int], Sample], indices: list[int]) -> float:
    """One pass over ``indices``."""
    start = time.perf_counter()
    for index in indices:
        sample(index)
    return len(indices) / (time.perf_counter() - start)


def measure(size: str, device: str, *, quick: bool) -> Result:
    """Both sides on the same clips."""
    model = build_settings(ModelSettings, composed("generate", ["model=tiny", "story=none"])["model"])
    if size == "480p":
        model.network.vae.clear()  # the defaults of AutoencoderKLWan are the published shape
        model = replace(model, video=VideoSettings(frames=81, height=480, width=832, fps=16))
    video = model.video
    bucket, fps = Bucket(frames=video.frames, height=video.height, width=video.width), video.fps
    pipe = load_pipeline(model, runtime=RuntimeSettings(device=device), experts=False)
    tokens = model.network.text_tokens
    order = np.random.default_rng(0).permutation(CLIPS).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = drawn_clips(folder, bucket, fps)
        fly = OnTheFly(folder, clips, pipe, tokens)
        cache = cached(folder, bucket, model, device)
        for one, other in zip(fly.sample(0), from_cache(cache, 0), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        on_the_fly = samples_per_second(fly.sample, order[: 3 if quick else CLIPS])
        fresh = LatentCache.open(folder / "set")
        first = samples_per_second(lambda index: from_cache(fresh, index), order)
        again = samples_per_second(lambda index: from_cache(fresh, index), order * (2 if quick else 10))
        stored = sum(path.stat().st_size for path in fresh.folder.glob("shard-*.safetensors"))
    return Result(
        size=size,
        device=str(pipe.device),
        fly=round(on_the_fly, 3),
        cache_first=round(first, 1),
        cache_again=round(again, 1),
        ratio_first=round(first / on_the_fly, 1),
        ratio_again=round(again / on_the_fly, 1),
        megabytes_per_clip=round(stored / CLIPS / 1e6, 2),
        threads=torch.get_num_threads(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--size", choices=["tiny", "480p"], default="tiny")
    parser.add_argument("--device", default="cpu", help="where the VAE runs")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = measure(arguments.size, arguments.device, quick=arguments.quick)
    print(
        f"samples per second, {result.size}, VAE on {result.device}, {result.megabytes_per_clip} MB per clip (float32)"
    )
    print(f"  decoded and encoded on the fly     {result.fly:>10.2f}")
    print(f"  from the cache, first, sha256 checked {result.cache_first:>7.1f}  {result.ratio_first:g} times")
    print(f"  from the cache, later              {result.cache_again:>10.1f}  {result.ratio_again:g} times")
    print(json.dumps({"benchmark": "loader", **asdict(result)}))


if __name__ == "__main__":
    main()
