"""HPSv3: human preference score of images, by a vision-language model (arXiv 2508.03789)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torchvision.transforms.functional import resize
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from storymem.devices import resolve_device
from storymem.io import FileError, read_text
from storymem.scorers.hpsv3_network import PUBLISHED, Hpsv3Network, in_4_bits, load_network
from storymem.scorers.preprocessing import to_bytes
from storymem.scorers.scorer import Placement, Scorer, check_frames, check_threshold
from storymem.weights import Weights, locate

REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
PIXELS = 256 * 28 * 28  # the area to which images are resized, up to rounding
_SELECTOR_MIN_PIXELS = 48 * 28 * 28  # the published selector enlarges smaller frames only
_PREPROCESSINGS = ("published_selector", "published_hpsv3")
_TOKENIZER_FILE = "tokenizer.json"


class Hpsv3Scorer(Scorer[Hpsv3Network]):
    """Human preference score of images for an empty prompt; unbounded, about 10 for good generators.

    Args:
        network: the network.
        tokenizer: that of Qwen2-VL; the reward token is added to it.
        threshold: a frame that scores less is of low quality; 3.0 as published with StoryMem.
        preprocessing: ``"published_selector"`` (frames are first reduced as StoryMem's selector does, so that 480x832
            is scored at 364x616; the threshold belongs to it) or ``"published_hpsv3"`` (as the scorer alone does).
        max_batch_pixels: bound on the pixels, after resizing, that go through the network at once (at least one image
            does).
        device, dtype, batch_size: see `Scorer`; ``dtype`` is bfloat16 by default. The head always computes in float32.

    Raises:
        ValueError: if tokenizer and network do not agree on the special tokens.
    """

    pixels = PIXELS

    def __init__(
        self,
        network: Hpsv3Network,
        tokenizer: PreTrainedTokenizerBase,
        *,
        threshold: float = 3.0,
        preprocessing: str = "published_selector",
        max_batch_pixels: int = 8 * PIXELS,
        **placement: Unpack[Placement],
    ) -> None:
        if preprocessing not in _PREPROCESSINGS:
            raise ValueError(f"unknown preprocessing {preprocessing!r}; write one of {', '.join(_PREPROCESSINGS)}")
        placement.setdefault("dtype", "bfloat16")
        super().__init__(network, **placement)
        self.threshold = check_threshold(threshold)
        self.preprocessing = preprocessing
        self.max_batch_pixels = max_batch_pixels
        self.tokenizer = _with_reward_token(tokenizer, network)

    @staticmethod
    def required_weights(
        source: str = "MizzenAI/HPSv3", tokenizer_source: str = "Qwen/Qwen2-VL-7B-Instruct", **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads: the checkpoint and the tokenizer."""
        checkpoint = Weights(
            name="HPSv3",
            source=source,
            file="HPSv3.safetensors",
            size_gb=16.6,
            licence="see the model card of MizzenAI/HPSv3",
        )
        tokenizer = Weights(
            name="Qwen2-VL tokenizer (for HPSv3)",
            source=tokenizer_source,
            file=_TOKENIZER_FILE,
            size_gb=0.007,
            licence="Apache-2.0",
        )
        return [checkpoint, tokenizer]

    @classmethod
    def from_pretrained(
        cls,
        source: str = "MizzenAI/HPSv3",
        tokenizer_source: str = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        four_bit: bool = False,
        **options: Any,
    ) -> Self:
        """Load the published weights.

        Args:
            source: file, folder or hub repository of the checkpoint.
            tokenizer_source: folder or hub repository of Qwen2-VL's tokenizer.
            four_bit: the backbone in 4 bits by bitsandbytes (about 6 GB instead of 17); scores move a little.
            options: see the class.

        Raises:
            ImportError: also if ``four_bit`` is set and bitsandbytes is not installed.
        """
        path, tokenizer = (locate(weights) for weights in cls.required_weights(source, tokenizer_source))
        network = load_network(path, PUBLISHED)
        if four_bit:
            network = in_4_bits(network, resolve_device(options.get("device", "cpu"), "device"))
        return cls(network, _read_tokenizer(tokenizer), **options).marked("published")

    @torch.no_grad()
    def score(self, frames: Tensor) -> Tensor:
        """Scores [N], unbounded, higher is better, of images [N, 3, H, W] in 0..1."""
        images = to_bytes(check_frames(frames)).cpu()
        if not len(images):
            return torch.empty(0)
        if self.preprocessing == "published_selector":
            images = resize(images, list(selector_size(*images.shape[-2:])), antialias=True)
        height, width = resized_size(images.shape[-2], images.shape[-1], self.pixels)
        rows = max(1, min(self.batch_size, self.max_batch_pixels // (height * width)))
        return self._finite(torch.cat([self._score_batch(batch) for batch in images.split(rows)]), "scores")

    def _score_batch(self, images: Tensor) -> Tensor:
        patches, grids = patches_of(images, self.pixels)
        text = assemble_prompt("", visual_tokens=len(patches) // len(images) // 4)
        ids = self.tokenizer([text] * len(images), return_tensors="pt")["input_ids"].to(self.device)
        rewards = self.network(ids, torch.ones_like(ids), patches.to(self.device), grids.to(self.device))
        return rewards[:, 0].float().cpu()

    def _cast(self) -> None:
        """The backbone's weights to ``dtype``, unless in 4 bits, and the head's to float32.

        Buffers keep their type: rotary frequencies rounded to bfloat16 are off by radians at the end of the prompt.
        """
        self.network.rm_head.float()
        if not getattr(self.network.model, "is_quantized", False):
            for parameter in self.network.model.parameters():
                parameter.data = parameter.data.to(self.dtype)


def assemble_prompt(prompt: str, visual_tokens: int = 1) -> str:
    """The text around ``prompt`` in the published template, with placeholders for ``visual_tokens`` tokens of image."""
    template = _template()
    prefix = template["chat_prefix"].replace(IMAGE_TOKEN, IMAGE_TOKEN * visual_tokens)
    instruction = template["instruction"].replace(template["instruction_placeholder"], prompt)
    return prefix + instruction + template["suffix"] + template["chat_suffix"]


@cache
def _template() -> dict[str, str]:
    return json.loads((Path(__file__).parent / "data" / "hpsv3_prompt.json").read_text(encoding="utf-8"))


def resized_size(height: int, width: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Height and width, multiples of 28, of an image resized to about ``pixels`` pixels.

    The rule is not idempotent, because rounding up may exceed the area: 480x832 becomes 336x588, and that 364x616.

    Raises:
        ValueError: if one side is more than 200 times the other.
    """
    return smart_resize(height, width, 28, pixels, pixels)


def selector_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to which the published keyframe selector reduces frames before it scores them."""
    return smart_resize(height, width, 28, _SELECTOR_MIN_PIXELS, PIXELS)


def patches_of(images: Tensor, pixels: int = PIXELS) -> tuple[Tensor, Tensor]:
    """Images as Qwen2-VL's vision tower takes them: resized (Pillow's bicubic), normalised and cut into patches.

    Args:
        images: uint8 [N, 3, H, W] on the CPU, N > 0.
        pixels: see `resized_size`.

    Returns:
        float32 [patches of all images, 3 * 2 * 14 * 14] and the patch grid [N, 3] of each image; four patches are one
        visual token.
    """
    height, width = resized_size(images.shape[-2], images.shape[-1], pixels)
    resized = [
        np.array(Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC))
        for image in images.permute(0, 2, 3, 1).contiguous()
    ]
    cut = Qwen2VLImageProcessor(do_resize=False)(
        images=list(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)), return_tensors="pt"
    )
    return cut["pixel_values"], cut["image_grid_thw"]


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a ``tokenizer.json``; other files beside it, code included, are not read.

    Raises:
        FileError: if it is damaged.
    """
    content = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing more precise
        raise FileError(f"{path} is not a tokenizer: {error}") from None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")


def _with_reward_token(tokenizer: PreTrainedTokenizerBase, network: Hpsv3Network) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    for token, wanted in ((REWARD_TOKEN, network.reward_token), (IMAGE_TOKEN, network.config.image_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ValueError(
                f"the tokenizer gives {token} the id {found}, the network expects {wanted};"
                " use the tokenizer of Qwen/Qwen2-VL-7B-Instruct, without added tokens"
            )
    return tokenizer
