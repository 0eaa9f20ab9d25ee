"""Small stories and storytellers for tests of the shot loop: real classes, a few pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storymem.film.storyteller import Storyteller
from storymem.memory import KeyframeSelector
from storymem.scorers.clip import ClipScorer
from storymem.story import Story, load_story
from storymem.wan.settings import (
    Continuity,
    ModelSettings,
    NetworkSettings,
    RuntimeSettings,
    SamplerSettings,
    VideoSettings,
)
from storymem.wan.shots import OnStep, ShotRequest, WanShotGenerator

CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}

MODEL = ModelSettings(
    name="test",
    video=VideoSettings(height=32, width=48, frames=9, fps=8),
    network=NetworkSettings(
        transformer={
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
            "out_channels": 16,
        },
        vae={"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
        text_encoder={
            "vocab_size": 384,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        },
        text_tokens=16,
    ),
    dtype="float32",
)
SAMPLER = SamplerSettings(steps=2, guidance=2.0, negative_prompt="blurred")

# The frames of an untrained model are much alike: two keyframes a shot, whatever the bank holds.
EAGER = KeyframeSelector(
    similarity_threshold=1.0, threshold_step=0.0001, max_keyframes=2, bank_similarity_threshold=1.0
)


class CountingGenerator(WanShotGenerator):
    """The real generator, which also records its calls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoded_texts: list[str] = []
        self.encoded_keyframes = 0
        self.requests: list[ShotRequest] = []
        self.by_text: list[bool] = []

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        self.encoded_texts += prompts
        super().prepare(prompts, negative_prompts)

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]:
        self.encoded_keyframes += len(frames)
        return super().encode_keyframes(frames)

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        self.requests.append(request)
        self.by_text.append(True)
        return super().first(request, on_step)

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        if not self.requests or self.requests[-1] is not request:
            self.requests.append(request)
            self.by_text.append(False)
        return super().generate(request, on_step)


def storyteller(continuity: Continuity = "mi2v", **changes: Any) -> Storyteller:
    """A storyteller of real classes at the smallest size; ``changes`` are its fields, or ``model=``/``sampler=``."""
    model, sampler = changes.pop("model", MODEL), changes.pop("sampler", SAMPLER)
    generator = CountingGenerator(
        model=model, sampler=sampler, runtime=RuntimeSettings(device="cpu"), continuity=continuity
    )
    config = {"model": {"video": vars(model.video)}, "continuity": continuity, "seed": changes.get("seed", 0)}
    teller = Storyteller(
        generator=generator,
        embedder=ClipScorer.from_config(CLIP, seed=0),
        selector=EAGER,
        continuity=continuity,
        config=config,
    )
    return replace(teller, **changes)


def story(folder: Path, text: str) -> Story:
    """The story of a YAML text, written to and read from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.yaml").write_text(text)
    return load_story(folder / "story.yaml")


def plain_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> None:
    """A plain reference image."""
    Image.new("RGB", size, colour).save(path)


TWO_SHOTS = """\
title: Two
overview: A short walk.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
"""

FOUR_SHOTS = """\
title: Four
overview: A short walk.
scenes:
  - shots:
      - {prompt: "A dog walks out of a door."}
      - {prompt: "The dog looks at a tree.", cut: false}
  - shots:
      - {prompt: "A cat sits on a wall.", seed: 99}
      - {prompt: "The cat jumps off the wall.", cut: false, negative_prompt: "a bird"}
"""


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder except locks."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name != ".lock"}


def content(folder: Path) -> dict[str, Any]:
    """What a film shows and its memory holds, whatever its files are called: equal for equal films."""
    from storymem.film.folder import Film
    from storymem.media.images import read_image
    from storymem.media.video import read_video
    from storymem.memory import MemoryBank

    def image_bytes(ids: Iterable[str]) -> list[bytes]:
        return [read_image(folder / "keyframes" / f"{id}.png").tobytes() for id in ids]

    film = Film.open(folder)
    assert film.video is not None
    return {
        "film": read_video(film.video).tobytes(),
        "shots": [
            {
                "made": (shot.scene, shot.number, shot.prompt, shot.mode, shot.seed, shot.frames, shot.repeated),
                "frames": read_video(folder / shot.file).tobytes(),
                "end": film.last_frames(shot.index, 1).tobytes(),
                "memory": image_bytes(shot.memory),
                "keyframes": image_bytes(keyframe.id for keyframe in shot.keyframes),
            }
            for shot in film.shots
        ],
        "memory": [(k.sha256, k.shot, k.frame, k.embedding.tobytes()) for k in MemoryBank.load(folder)],
    }


def single_thread() -> None:
    """For a fork: threads of a pool do not survive it."""
    torch.set_num_threads(1)
