"""The embedded model ``model=tiny`` made smaller still, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from storymem.config import build_settings
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings

CONFIGS = Path(__file__).parents[2] / "configs"
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 4
SLOTS, LATENT = 3, (HEIGHT // 8, WIDTH // 8)
CPU = RuntimeSettings(device="cpu")


def settings(**changes: Any) -> ModelSettings:
    """``configs/model/tiny.yaml`` at 48x32 pixels and 9 frames, with one-layer networks."""
    values = deepcopy(_tiny())
    values["video"] = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "fps": 8}
    values["network"]["transformer"] |= {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 96,
    }
    values["network"]["text_encoder"]["num_layers"] = 1
    values["network"]["text_tokens"] = 16
    return build_settings(ModelSettings, values | changes)


@cache
def _tiny() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "model" / "tiny.yaml").read_text())["model"]


def adapt(pipe: WanMemoryToVideoPipeline, *names: str, seed: int = 0) -> WanMemoryToVideoPipeline:
    """Adapters of rank 2 on all experts, whose products are not zero; "memory" if no name is given."""
    generator = torch.Generator().manual_seed(seed)
    for expert in pipe.experts.values():
        for name in names or ("memory",):
            expert.add_adapter(memory_lora_config(rank=2, alpha=2, dropout=0.0), adapter_name=name)
        expert.set_adapter(list(names or ("memory",)))
        for name, weight in expert.named_parameters():
            if "lora_B" in name:
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return pipe


def images(count: int, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[Image.Image]:
    """Random images, no two alike."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def generate(pipe: WanMemoryToVideoPipeline, **changes: Any) -> Tensor:
    """One small shot through the public call; latents unless ``output_type`` is given."""
    arguments: dict[str, Any] = {
        "prompt": "a fox",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "max_sequence_length": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    pipe.set_progress_bar_config(disable=True)
    arguments |= changes
    if "prompt_embeds" in changes:
        del arguments["prompt"]
    return pipe(**arguments).frames


@contextmanager
def counting(*modules: nn.Module) -> Iterator[dict[str, int]]:
    """How often each module (by class name) runs forward inside the block."""
    calls = {type(module).__name__: 0 for module in modules}

    def count(module: nn.Module, *_: object) -> None:
        calls[type(module).__name__] += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def text_to_video(model: ModelSettings, vae: Any, sampler: SamplerSettings | None = None) -> WanMemoryToVideoPipeline:
    """The pipeline of a first shot from text alone."""
    sampler = (sampler or SamplerSettings()).text_sampler
    return load_pipeline(model.text_model, vae=vae, runtime=CPU, sampler=sampler, text_encoder=False)


def shot_by_text(model: ModelSettings, vae: Any, sampler: SamplerSettings | None = None) -> Tensor:
    """Latents of a first shot by the text-to-video networks."""
    pipe = text_to_video(model, vae, sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.ones(1, 16, 32),
        negative_prompt_embeds=torch.zeros(1, 16, 32),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
