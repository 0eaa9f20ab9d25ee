"""diffusers' own pipeline tests on the memory-to-video pipeline; ``python -m tests.diffusers`` runs this file there.

Each class joins a kind of call with one of diffusers' test mixins: the pipeline itself, offloading, LoRA, step caches.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from storymem.wan.pipeline import WanMemoryToVideoPipeline

from ..testing_utils import (
    BasePipelineTesterConfig,
    FasterCacheTesterMixin,
    FirstBlockCacheTesterMixin,
    GroupOffloadTesterMixin,
    LayerwiseCastingTesterMixin,
    LoraTesterMixin,
    MagCacheTesterMixin,
    PipelineOffloadTesterMixin,
    PipelineTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
)


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 255 - shade, 90))


class MemoryToVideo(BasePipelineTesterConfig):
    """One kind of call: what it adds to the inputs, and the layout of memory."""

    pipeline_class = WanMemoryToVideoPipeline
    required_input_params_in_call_signature = frozenset(
        ["prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds", "negative_prompt_embeds"]
    )
    batch_input_params = frozenset(["prompt"])
    callback_cfg_params = frozenset(["prompt_embeds"])
    output_shape = (9, 3, 16, 16)
    optional_input_params = frozenset(
        ["num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type", "return_dict"]
    )
    memory_attention = "joint"
    given: dict = {}  # noqa: RUF012

    def get_dummy_components(self, num_layers: int = 2) -> dict:
        def expert() -> WanTransformer3DModel:
            torch.manual_seed(0)
            return WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=36,
                out_channels=16,
                text_dim=32,
                freq_dim=256,
                ffn_dim=32,
                num_layers=num_layers,
                rope_max_seq_len=32,
            )

        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        torch.manual_seed(0)
        shape = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        return {
            "transformer": expert(),
            "transformer_2": expert(),
            "vae": vae,
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            "text_encoder": T5EncoderModel(shape).eval(),
            "tokenizer": ByT5Tokenizer(),
            "image_encoder": None,
            "image_processor": None,
            "boundary_ratio": 0.875,
            **({} if self.memory_attention == "joint" else {"memory_attention": self.memory_attention}),
        }

    def get_dummy_inputs(self) -> dict:
        return {
            "prompt": "dance monkey",
            "negative_prompt": "negative",
            "height": 16,
            "width": 16,
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "num_frames": 9,
            "max_sequence_length": 16,
            "output_type": "pt",
            **self.given,
        }


class Whole(PipelineTesterMixin):
    def test_save_load_optional_components(self) -> None:
        pytest.skip("diffusers tests it with one expert and boundary_ratio 1; see test_one_expert_alone")

    def test_one_expert_alone(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        components = self.get_dummy_components() | {"transformer": None, "boundary_ratio": 1.0}
        pipe = self.get_pipeline(**components)
        pipe.save_pretrained(tmp_path)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        assert loaded.transformer is None
        torch.testing.assert_close(loaded(**self.get_dummy_inputs())[0], pipe(**self.get_dummy_inputs())[0])


class OneDenoiserLora(LoraTesterMixin):
    """One expert: diffusers' ``save_lora_weights`` for Wan saves the LoRA of ``transformer`` alone."""

    denoiser_components = ("transformer",)

    def get_dummy_components(self, num_layers: int = 2) -> dict:
        return super().get_dummy_components(num_layers) | {"transformer_2": None, "boundary_ratio": None}


class Broadcast(PyramidAttentionBroadcastTesterMixin):
    PAB_CONFIG = {  # noqa: RUF012
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 800),
        "spatial_attention_block_identifiers": ["blocks"],
    }


IMAGES = [image(200), image(20)]
KINDS: dict[str, dict] = {
    "Stock": {"image": image(40)},  # diffusers' own pipeline, for what fails in any case
    "Plain": {},
    "FirstFrame": {"first_frame": image(40)},
    "Motion": {"motion_frames": [image(shade) for shade in (0, 10, 20, 30, 40)]},
    "Memory": {"memory": IMAGES, "rope_stride": 2},
    "MemoryFirstFrame": {"memory": IMAGES, "rope_stride": 2, "first_frame": image(40)},
    "MemoryUnseen": {"memory": IMAGES, "rope_stride": 2, "negative_sees_memory": False},
    "Cached": {"memory": IMAGES, "rope_stride": 2},
    "CachedFirstFrame": {"memory": IMAGES, "rope_stride": 2, "first_frame": image(40)},
    "CachedUnseen": {"memory": IMAGES, "rope_stride": 2, "negative_sees_memory": False},
}
MIXINS = {
    "Pipeline": (Whole,),
    "Offload": (PipelineOffloadTesterMixin, GroupOffloadTesterMixin, LayerwiseCastingTesterMixin),
    "Lora": (OneDenoiserLora,),
    "FasterCache": (FasterCacheTesterMixin,),
    "FirstBlockCache": (FirstBlockCacheTesterMixin,),
    "TaylorSeer": (TaylorSeerCacheTesterMixin,),
    "MagCache": (MagCacheTesterMixin,),
    "Broadcast": (Broadcast,),
}
for kind, given in KINDS.items():
    layout = "cached" if kind.startswith("Cached") else "joint"
    for mixin, bases in MIXINS.items():
        name = f"Test{kind}{mixin}"
        kinds = {"pipeline_class": WanImageToVideoPipeline} if kind == "Stock" else {"memory_attention": layout}
        parents = (*bases, MemoryToVideo) if mixin in ("Lora", "Pipeline") else (MemoryToVideo, *bases)
        globals()[name] = type(name, parents, {"given": given, **kinds})
