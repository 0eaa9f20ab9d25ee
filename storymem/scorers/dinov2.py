"""DINOv2 by transformers: image embeddings that distinguish individual objects, for identity consistency."""

from __future__ import annotations

from typing import Any, Self, Unpack

from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from storymem.scorers.checkpoint import load_pretrained, seeded
from storymem.scorers.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalise, squash
from storymem.scorers.scorer import Placement, Scorer, check_frames, unit
from storymem.weights import Weights, locate

_WEIGHTS_FILE, _CONFIG_FILE = "model.safetensors", "config.json"
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}  # for tests and trials


class Dinov2Embedder(Scorer[Dinov2Model]):
    """Class-token embeddings of DINOv2 (arXiv 2304.07193).

    The whole image is squashed to the input size, so that nothing at its edge is cut off.

    Args:
        network: of any size; position embeddings are interpolated by transformers.
        resolution: side of the square input in pixels, a multiple of the patch size.
        device, dtype, batch_size: see `Scorer`.
    """

    preprocessing = "squash, bilinear"

    def __init__(self, network: Dinov2Model, *, resolution: int = 224, **placement: Unpack[Placement]) -> None:
        if resolution % network.config.patch_size:
            raise ValueError(
                f"resolution={resolution}: must be a multiple of the patch size {network.config.patch_size}"
            )
        super().__init__(network, **placement)
        self.resolution = resolution
        self.dim: int = network.config.hidden_size

    @staticmethod
    def required_weights(source: str = "facebook/dinov2-base", **_: Any) -> list[Weights]:
        """What :meth:`from_pretrained` loads."""
        name = "DINOv2"
        return [
            Weights(name=name, source=source, file=_WEIGHTS_FILE, size_gb=0.35, licence="Apache-2.0"),
            Weights(name=name, source=source, file=_CONFIG_FILE),
        ]

    @classmethod
    def from_pretrained(
        cls, source: str = "facebook/dinov2-base", *, resolution: int = 224, **placement: Unpack[Placement]
    ) -> Self:
        """Load published weights from a hub repository or a folder in transformers' layout."""
        network = load_pretrained(Dinov2Model, Dinov2Config, *map(locate, cls.required_weights(source)))
        return cls(network, resolution=resolution, **placement).marked("published")

    @classmethod
    def from_config(cls, *, seed: int = 0, resolution: int = 28, **placement: Unpack[Placement]) -> Self:
        """An untrained small network."""
        network = seeded(seed, lambda: Dinov2Model(Dinov2Config(**_TINY)))
        return cls(network, resolution=resolution, **placement).marked("untrained")

    def embed_images(self, frames: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, 3, H, W] in 0..1."""
        return self._in_batches(check_frames(frames), self._encode, self.dim)

    def _encode(self, frames: Tensor) -> Tensor:
        pixels = squash(frames, self.resolution)
        pixels = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        return unit(self.network(pixel_values=pixels).pooler_output)
