"""The HPSv3 network: transformers' Qwen2-VL with a reward head (arXiv 2508.03789)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from storymem.scorers.checkpoint import loaded, read_checkpoint

PUBLISHED = Qwen2VLConfig(
    text_config={
        "vocab_size": 151658,  # the published table is cut to the tokenizer's length
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)
"""The published checkpoint's configuration."""


class Hpsv3Network(nn.Module):
    """Qwen2-VL read at the reward token, the last of its vocabulary.

    The head is always in float32.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.reward_token: int = config.text_config.vocab_size - 1
        self.model = Qwen2VLModel(config)
        # The indices 0, 3 and 5 of the linears are their published names.
        self.rm_head = nn.Sequential(
            *(nn.Linear(config.text_config.hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05)),
            *(nn.Linear(1024, 16), nn.ReLU()),
            nn.Linear(16, 2),
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
        at_reward = input_ids == self.reward_token
        if not bool((at_reward.sum(dim=1) == 1).all()):
            raise ValueError("every input must hold the reward token exactly once")
        # The original passes no position ids to the decoder, so all three rotary axes count 0, 1, 2, ... instead of
        # Qwen2-VL's rows and columns of the image. The weights were trained that way.
        batch, length = input_ids.shape
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=torch.arange(length, device=input_ids.device).expand(3, batch, length),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=False,
        )
        return output.last_hidden_state[at_reward]


def load_network(path: Path, config: Qwen2VLConfig) -> Hpsv3Network:
    """The network with the weights of a file in the published layout, on the CPU.

    Raises:
        FileError: if the file is damaged or holds another network.
    """
    renamed = {}
    for name, tensor in read_checkpoint(path).items():
        if name.startswith("visual."):
            renamed[f"model.{name}"] = tensor
        elif name.startswith("model."):
            renamed[f"model.language_model.{name.removeprefix('model.')}"] = tensor
        elif name != "lm_head.weight":  # which nothing uses
            renamed[name] = tensor
    return loaded(lambda: Hpsv3Network(config), renamed, path)


def in_4_bits(network: Hpsv3Network, device: torch.device) -> Hpsv3Network:
    """Replace the backbone by one on ``device`` with its linears in 4 bits (NF4) and the rest in bfloat16.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        message = "HPSv3 in 4 bits needs bitsandbytes; write: pip install 'storymem[four-bit]'"
        raise ImportError(message) from error
    from transformers import BitsAndBytesConfig

    network.model = Qwen2VLModel.from_pretrained(
        None,
        config=network.config,
        state_dict=network.model.state_dict(),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    return network
