"""Image models are loaded from folders in diffusers' layout, as their published weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from storymem.config import build_settings
from storymem.methods.agent import AgentSettings, QwenEditor
from storymem.methods.in_context import FluxPanels, InContextSettings
from storymem.methods.storydiffusion import StableDiffusion, StoryDiffusionImages
from storymem.wan.settings import RuntimeSettings, VideoSettings
from storymem.weights import Weights
from tests.evaluation.test_methods import generate
from tests.methods import tiny

CPU = RuntimeSettings(device="cpu")


def weights(folder: Path, **more: Any) -> dict[str, Any]:
    return {"name": "saved", "source": str(folder), **more}


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    saved = tiny.stable_diffusion_xl(tmp_path)
    saved.save_pretrained(tmp_path / "xl")
    images = StableDiffusion(CPU, Weights(**weights(tmp_path / "xl")))
    images.check()
    pipe = images.pipe
    assert images.pipe is pipe, "loaded once"
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.unet.dtype == torch.float32, "16 bits are for accelerators"
    assert (pipe.unet.up_blocks[0].b1, pipe.unet.up_blocks[0].s2) == (1.1, 0.4), "FreeU"
    assert torch.equal(pipe.unet.conv_in.weight, saved.unet.conv_in.weight)
    method = StoryDiffusionImages(generate=generate(), storydiffusion={"weights": weights(tmp_path / "xl")})
    recorded = method.storyteller.config["weights"]
    (tmp_path / "xl" / "unet" / "config.json").write_text("{}")
    method = StoryDiffusionImages(generate=generate(), storydiffusion={"weights": weights(tmp_path / "xl")})
    assert recorded.keys() == {"saved"}, "a film records the weights of its image model"
    assert recorded != method.storyteller.config["weights"]


def test_flux_with_a_lora(tmp_path: Path) -> None:
    saved = tiny.flux(tmp_path)
    saved.save_pretrained(tmp_path / "flux")
    saved.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    saved.save_lora_weights(
        str(tmp_path / "lora"), transformer_lora_layers=get_peft_model_state_dict(saved.transformer)
    )
    lora = weights(tmp_path / "lora", file="pytorch_lora_weights.safetensors")
    given = {"weights": weights(tmp_path / "flux"), "lora": lora, "steps": 1, "height": 32, "width": 32}
    with_lora = FluxPanels(build_settings(InContextSettings, given), CPU)
    with_lora.check()
    panels = with_lora.panels("a", None, 0)
    assert [panel.shape for panel in panels] == [(31, 32, 3), (30, 32, 3), (31, 32, 3)]
    with_lora.pipe.disable_lora()
    assert any((a != b).any() for a, b in zip(panels, with_lora.panels("a", None, 0), strict=True))


def test_qwen_image_edit(tmp_path: Path) -> None:
    tiny.qwen_image_edit(tmp_path).save_pretrained(tmp_path / "qwen")
    settings = build_settings(AgentSettings, {"weights": weights(tmp_path / "qwen")})
    editor = QwenEditor(settings, CPU, VideoSettings(height=32, width=48, frames=5, fps=8))
    editor.check()
    assert editor.pipe.transformer.dtype == torch.float32
    editor.free()
