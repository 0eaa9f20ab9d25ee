"""HPSv3: human preference score of pictures, by a vision-language model (arXiv 2508.03789)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from storymem.config import build_settings
from storymem.io import FileError, read_text
from storymem.scorers.hpsv3_inputs import (
    IMAGE_TOKEN,
    PIXELS,
    REWARD_TOKEN,
    PixelPatcher,
    assemble_prompt,
    reduce_as_selector,
    selector_size,
    visual_tokens,
)
from storymem.scorers.hpsv3_network import (
    PUBLISHED,
    Hpsv3Config,
    Hpsv3Network,
    cast_backbone,
    load_network,
    load_network_in_4_bits,
)
from storymem.scorers.inputs import check_frames, check_prompts
from storymem.scorers.preprocessing import to_bytes
from storymem.scorers.scorer import Scorer, check_threshold, resolve_device, resolve_dtype
from storymem.weights import Weights, locate

_PREPROCESSINGS = ("published_selector", "published_hpsv3")
_TOKENIZER_FILE = "tokenizer.json"


class Hpsv3Scorer(Scorer[Hpsv3Network]):
    """Human preference score of pictures, given a prompt or none; unbounded, about 10 for good generators.

    Args:
        network: the network.
        tokenizer: that of Qwen2-VL; the reward token is added to it.
        threshold: a frame that scores less is of low quality; 3.0 as published with StoryMem, for empty
            prompts.
        preprocessing: ``"published_selector"`` (frames are first reduced as StoryMem's selector does, so that
            480x832 is scored at 364x616; the threshold belongs to it) or ``"published_hpsv3"`` (as the scorer
            alone does).
        max_batch_pixels: bound on the pixels, after resizing, that go through the network at once (at least
            one picture does).
        device, dtype, batch_size: see `Scorer`. The head computes in float32 whatever ``dtype`` is.

    Raises:
        ValueError: if tokenizer and network do not agree on the special tokens.
    """

    name = "hpsv3"

    def __init__(
        self,
        network: Hpsv3Network,
        tokenizer: PreTrainedTokenizerBase,
        *,
        threshold: float = 3.0,
        preprocessing: str = "published_selector",
        max_batch_pixels: int = 8 * PIXELS,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
        batch_size: int = 32,
    ) -> None:
        if preprocessing not in _PREPROCESSINGS:
            names = ", ".join(_PREPROCESSINGS)
            raise ValueError(f"unknown preprocessing {preprocessing!r}; write one of {names}")
        self.config = network.config
        self._quantised = getattr(network.model, "is_quantized", False)
        super().__init__(network, device=device, dtype=dtype, batch_size=batch_size)
        self.threshold = check_threshold(threshold)
        self.preprocessing = preprocessing
        self.max_batch_pixels = max_batch_pixels
        self.tokenizer = _with_reward_token(tokenizer, self.config)
        self._patcher = PixelPatcher(
            patch=self.config.patch,
            merge=self.config.merge,
            temporal_patch=self.config.temporal_patch,
            pixels=self.config.pixels,
        )

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
        threshold: float = 3.0,
        preprocessing: str = "published_selector",
        max_batch_pixels: int = 8 * PIXELS,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
        batch_size: int = 32,
    ) -> Self:
        """Load the published weights.

        Args:
            source: file, folder or hub repository of the checkpoint.
            tokenizer_source: folder or hub repository of Qwen2-VL's tokenizer.
            four_bit: the backbone in 4 bits by bitsandbytes (about 6 GB instead of 17); scores move a little.
            threshold, preprocessing, max_batch_pixels, device, dtype, batch_size: see the class.

        Raises:
            MissingWeights: if the weights or the tokenizer are not on this machine.
            FileError, CheckpointError: if a file is damaged or holds something else.
            ImportError: if ``four_bit`` is asked for and bitsandbytes is not installed.
        """
        path, words = (locate(weights) for weights in cls.required_weights(source, tokenizer_source))
        if four_bit:
            network = load_network_in_4_bits(path, PUBLISHED, resolve_device(device))
        else:
            network = load_network(path, PUBLISHED, resolve_dtype(dtype))
        scorer = cls(
            network,
            _read_tokenizer(words),
            threshold=threshold,
            preprocessing=preprocessing,
            max_batch_pixels=max_batch_pixels,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        scorer.origin = "published"
        return scorer

    @classmethod
    def from_config(
        cls,
        config: Hpsv3Config | Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        threshold: float = 3.0,
        preprocessing: str = "published_selector",
        max_batch_pixels: int = 8 * PIXELS,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """An untrained network of any size, the same for the same ``seed``; for tests and trials only."""
        sizes = config if isinstance(config, Hpsv3Config) else build_settings(Hpsv3Config, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Hpsv3Network(sizes)
        scorer = cls(
            network,
            tokenizer,
            threshold=threshold,
            preprocessing=preprocessing,
            max_batch_pixels=max_batch_pixels,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        scorer.origin = "untrained"
        return scorer

    @torch.no_grad()
    def score(self, frames: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores of pictures.

        Args:
            frames: [N, 3, H, W], float in 0..1, RGB, of any size.
            prompts: what each picture should show; ``None`` is an empty prompt for each, as the keyframe
                filter asks.

        Returns:
            [N] float32 on the CPU, unbounded, higher is better.

        Raises:
            ValueError: for anything else; see `check_frames`.
            NotFiniteError: if a score is NaN or infinite: every frame would be refused, or pass.
        """
        frames = check_frames(frames)
        prompts = check_prompts(prompts, len(frames))
        rows = self._rows_at_once(*frames.shape[-2:])
        scores = [
            self._score_batch(frames[start : start + rows], prompts[start : start + rows])
            for start in range(0, len(frames), rows)
        ]
        return self._finite(torch.cat(scores), "scores") if scores else torch.empty(0)

    def _rows_at_once(self, height: int, width: int) -> int:
        if self.preprocessing == "published_selector":
            height, width = selector_size(height, width)
        height, width = self._patcher.size(height, width)
        return max(1, min(self.batch_size, self.max_batch_pixels // (height * width)))

    def _score_batch(self, frames: Tensor, prompts: list[str]) -> Tensor:
        pictures = to_bytes(frames).to(torch.uint8).cpu()
        if self.preprocessing == "published_selector":
            pictures = reduce_as_selector(pictures)
        patches, grids = self._patcher(pictures)
        tokens = visual_tokens(grids[0].tolist(), self.config.merge)
        texts = self.tokenizer(
            [assemble_prompt(prompt, tokens) for prompt in prompts],
            padding=True,
            padding_side="right",  # positions count padding too
            return_tensors="pt",
        )
        rewards = self.network(
            texts["input_ids"].to(self.device),
            texts["attention_mask"].to(self.device),
            patches.to(self.device),
            grids.to(self.device),
        )
        return rewards[:, 0].float().cpu()

    def _move(self) -> None:
        self.network.to(self.device)
        if not self._quantised:
            cast_backbone(self.network, self.dtype)


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a ``tokenizer.json``; what lies beside it, code included, is not looked at.

    Raises:
        FileError: if it is damaged.
    """
    content = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing more precise
        raise FileError(f"{path} is not a tokenizer: {error}") from None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")


def _with_reward_token(tokenizer: PreTrainedTokenizerBase, config: Hpsv3Config) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    wanted = {REWARD_TOKEN: config.reward_token, IMAGE_TOKEN: config.image_token}
    for token, number in wanted.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise ValueError(
                f"the tokenizer gives {token} the id {found}, the network expects {number};"
                " use the tokenizer of Qwen/Qwen2-VL-7B-Instruct, without added tokens"
            )
    return tokenizer
