"""GroundingDINO by transformers: boxes of what a text describes."""

from __future__ import annotations

from typing import Any, Self, Unpack

import torch
from torch import Tensor
from transformers import (
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

from storymem.scorers.checkpoint import load_pretrained, seeded
from storymem.scorers.preprocessing import to_bytes
from storymem.scorers.scorer import Placement, Scorer, check_frames
from storymem.weights import Weights, locate

TINY: dict[str, Any] = {
    "backbone_config": {
        **{"model_type": "swin", "image_size": 32, "window_size": 7, "embed_dim": 8, "out_indices": [2, 3, 4]},
        **{"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    },
    "text_config": {
        **{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "vocab_size": 1100, "max_position_embeddings": 64},
    },
    **{"d_model": 32, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
}
"""Sizes of the untrained network for tests and trials."""

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


class GroundingDetector(Scorer[GroundingDinoForObjectDetection]):
    """Boxes by GroundingDINO (arXiv 2303.05499).

    Images are resized as published (short side 800, long side at most 1333 pixels). The published text threshold only
    decides which words of a query are reported for a box; as each query names one thing, it has no effect here.

    Args:
        network: of any size.
        processor: of images and queries, for this network.
        box_threshold: lowest score of a box.
        device, dtype, batch_size: see `Scorer`; ``batch_size`` counts images.
    """

    def __init__(
        self,
        network: GroundingDinoForObjectDetection,
        processor: GroundingDinoProcessor,
        *,
        box_threshold: float = 0.25,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(network, **placement)
        self.processor, self.box_threshold = processor, box_threshold

    @staticmethod
    def required_weights(source: str = "IDEA-Research/grounding-dino-tiny", **_: Any) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        name = "GroundingDINO"
        weights = Weights(name=name, source=source, file="model.safetensors", size_gb=0.69, licence="Apache-2.0")
        return [weights, *(Weights(name=name, source=source, file=file) for file in _FILES)]

    @classmethod
    def from_pretrained(
        cls,
        source: str = "IDEA-Research/grounding-dino-tiny",
        *,
        box_threshold: float = 0.25,
        **placement: Unpack[Placement],
    ) -> Self:
        """Load published weights from a hub repository or a folder in transformers' layout."""
        path, described, *_ = (locate(weights) for weights in cls.required_weights(source))
        network = load_pretrained(GroundingDinoForObjectDetection, GroundingDinoConfig, path, described)
        words = BertTokenizerFast.from_pretrained(path.parent, local_files_only=True)
        processor = GroundingDinoProcessor(GroundingDinoImageProcessor(), words)  # its defaults are as published
        return cls(network, processor, box_threshold=box_threshold, **placement).marked("published")

    @classmethod
    def from_config(cls, *, seed: int = 0, box_threshold: float = 0.25, **placement: Unpack[Placement]) -> Self:
        """An untrained network of the sizes `TINY`, that reads letters."""
        settings = GroundingDinoConfig(**TINY)
        network = seeded(seed, lambda: GroundingDinoForObjectDetection(settings))
        images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        processor = GroundingDinoProcessor(images, _letters(settings.text_config.vocab_size))
        return cls(network, processor, box_threshold=box_threshold, **placement).marked("untrained")

    @torch.no_grad()
    def detect(self, frames: Tensor, query: str) -> list[Tensor]:
        """The boxes of what ``query`` describes in each image, the best first.

        Args:
            frames: [N, 3, H, W] in 0..1.
            query: a short phrase.

        Returns:
            for each image float32 [K, 5]: left, top, right, bottom in pixels, and the score in 0..1; K may be 0.
        """
        found = []
        for batch in to_bytes(check_frames(frames)).split(self.batch_size):
            text = [f"{query.lower().strip(' .')}."] * len(batch)
            inputs = self.processor(images=list(batch), text=text, return_tensors="pt").to(self.device, self.dtype)
            answers = self.network(**inputs)
            self._finite(answers.pred_boxes, "boxes")
            self._finite(answers.logits.sigmoid(), "scores of boxes")
            sizes = [batch.shape[-2:]] * len(batch)
            for one in self.processor.post_process_grounded_object_detection(
                answers, inputs["input_ids"], threshold=self.box_threshold, target_sizes=sizes
            ):
                order = one["scores"].argsort(descending=True, stable=True)
                boxes = torch.cat([one["boxes"], one["scores"][:, None]], dim=1)
                found.append(boxes[order].float().cpu())
        return found


def _letters(size: int) -> BertTokenizerFast:
    """A tokenizer of letters; the network requires BERT's ids of its special tokens."""
    words = {100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?", 0: "[PAD]"}
    for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789"):
        words |= {200 + place: letter, 300 + place: f"##{letter}"}
    return BertTokenizerFast(vocab={words.get(i, f"[unused{i}]"): i for i in range(size)})
