"""The HPSv3 network: transformers' Qwen2-VL with a reward head (arXiv 2508.03789)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from storymem.config import STRICT
from storymem.scorers.checkpoint import load_strictly, read_checkpoint
from storymem.scorers.hpsv3_inputs import PIXELS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Hpsv3Config:
    """Sizes and token ids of an HPSv3 network; the defaults are those of the published checkpoint.

    Args:
        hidden, intermediate, layers, heads, kv_heads: of the language model.
        vocab_size: rows of the token embedding: the published table is cut to the tokenizer's length.
        mrope_section: how the halves of a head's dimensions are shared among the three rotary axes.
        max_position: longest input in tokens.
        vision_depth, vision_width, vision_heads, vision_mlp_ratio: of the vision tower.
        patch, temporal_patch, merge: see `PixelPatcher`.
        head_widths: hidden layers of the reward head.
        image_token, video_token, vision_start, vision_end, reward_token: token ids.
        pixels: the number of pixels pictures are brought to.
    """

    hidden: int = 3584
    intermediate: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocab_size: int = 151658
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: list[int] = Field(default_factory=lambda: [16, 24, 24])
    max_position: int = 32768
    vision_depth: int = 32
    vision_width: int = 1280
    vision_heads: int = 16
    vision_mlp_ratio: int = 4
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    head_widths: list[int] = Field(default_factory=lambda: [1024, 16])
    image_token: int = 151655
    video_token: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653
    reward_token: int = 151657
    pixels: int = PIXELS

    def qwen(self) -> Qwen2VLConfig:
        """The same as transformers' configuration."""
        text = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.mrope_section),
            },
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": self.hidden**-0.5,
        }
        vision = {
            "depth": self.vision_depth,
            "embed_dim": self.vision_width,
            "hidden_size": self.hidden,
            "num_heads": self.vision_heads,
            "mlp_ratio": self.vision_mlp_ratio,
            "patch_size": self.patch,
            "temporal_patch_size": self.temporal_patch,
            "spatial_merge_size": self.merge,
            "initializer_range": self.vision_width**-0.5,
        }
        return Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self.image_token,
            video_token_id=self.video_token,
            vision_start_token_id=self.vision_start,
            vision_end_token_id=self.vision_end,
        )


PUBLISHED = Hpsv3Config()


class Hpsv3Network(nn.Module):
    """Qwen2-VL read at the reward token. The head stays in float32 whatever the backbone computes in."""

    def __init__(self, config: Hpsv3Config, backbone: Qwen2VLModel | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = backbone if backbone is not None else Qwen2VLModel(config.qwen())
        first, second = config.head_widths
        # Indices 0, 3 and 5 are the published names of the linears.
        self.rm_head = nn.Sequential(
            nn.Linear(config.hidden, first),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 2),
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> Tensor:
        """Rewards [B, 2], float32: the score, and an uncertainty that scoring ignores.

        Args:
            input_ids: [B, L], padded on the right, with one image and one reward token each.
            attention_mask: [B, L], 0 on padding.
            pixel_values: [patches of all images, pixels of a patch].
            image_grid_thw: [B, 3], patch grid of each image.

        Raises:
            ValueError: if a row has no reward token or several.
        """
        return self.rm_head(self.hidden_at_reward(input_ids, attention_mask, pixel_values, image_grid_thw).float())

    def hidden_at_reward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> Tensor:
        """The language model's last hidden state at the reward token, [B, hidden]; arguments as `forward`."""
        at_reward = input_ids == self.config.reward_token
        if not bool((at_reward.sum(dim=1) == 1).all()):
            raise ValueError("every input must hold the reward token exactly once")
        # The original never hands position ids to the decoder, so all three rotary axes count 0, 1, 2, ...
        # instead of Qwen2-VL's rows and columns of the image. The weights were trained that way.
        batch, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).expand(3, batch, length)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=False,
        )
        return output.last_hidden_state[at_reward]


def rename_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint's names as those of `Hpsv3Network`; the unused ``lm_head`` is left out."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            renamed[f"model.{name}"] = tensor
        elif name.startswith("model."):
            renamed[f"model.language_model.{name.removeprefix('model.')}"] = tensor
        elif name != "lm_head.weight":
            renamed[name] = tensor
    return renamed


def load_network(path: Path, config: Hpsv3Config, dtype: torch.dtype) -> Hpsv3Network:
    """The network with the weights of the published file, on the CPU; the head in float32.

    Raises:
        CheckpointError: if the file holds another network.
    """
    with init_empty_weights(include_buffers=False):
        network = Hpsv3Network(config)
    load_strictly(network, rename_published(read_checkpoint(path)), path, assign=True)
    return cast_backbone(network, dtype)


def load_network_in_4_bits(path: Path, config: Hpsv3Config, device: torch.device) -> Hpsv3Network:
    """As `load_network`, on ``device``, with the backbone's linears in 4 bits (NF4) and the rest in bfloat16.

    Raises:
        ImportError: if bitsandbytes is not installed; the message says how to install it.
        CheckpointError: if the file holds another network.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        message = "HPSv3 in 4 bits needs bitsandbytes; write: pip install 'storymem[four-bit]'"
        raise ImportError(message) from error
    from transformers import BitsAndBytesConfig

    tensors = rename_published(read_checkpoint(path))
    with init_empty_weights(include_buffers=False):
        load_strictly(Hpsv3Network(config), tensors, path, assign=True)  # the check only
    backbone = Qwen2VLModel.from_pretrained(
        None,
        config=config.qwen(),
        state_dict={name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    network = Hpsv3Network(config, backbone)
    head = {name.removeprefix("rm_head."): t for name, t in tensors.items() if name.startswith("rm_head.")}
    load_strictly(network.rm_head, head, path)
    network.rm_head.float().to(device)
    return network


def cast_backbone(network: Hpsv3Network, dtype: torch.dtype) -> Hpsv3Network:
    """Bring the backbone's weights to ``dtype`` and the head's to float32, in place.

    Buffers keep their type: rotary frequencies rounded to bfloat16 are off by radians at the end of the
    prompt.
    """
    for parameter in network.model.parameters():
        parameter.data = parameter.data.to(dtype)
    network.rm_head.float()
    return network
