"""DINOv2 by transformers: embeddings of pictures that tell single things apart, for identity consistency."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from transformers import Dinov2Model

from storymem.scorers.inputs import check_frames
from storymem.scorers.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalise, squash
from storymem.scorers.scorer import Scorer, unit
from storymem.weights import Weights, locate


class Dinov2Embedder(Scorer[Dinov2Model]):
    """Class-token embeddings of DINOv2 (arXiv 2304.07193).

    The whole picture is squashed to the input size, so that nobody at its edge is cut off.

    Args:
        network: of any size; position embeddings are interpolated by transformers.
        resolution: side of the square input in pixels, a multiple of the patch size.
        device, dtype, batch_size: see `Scorer`.
    """

    preprocessing = "squash, bilinear"

    def __init__(
        self,
        network: Dinov2Model,
        *,
        resolution: int = 224,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        if resolution % network.config.patch_size:
            raise ValueError(
                f"resolution={resolution}: must be a multiple of the patch size {network.config.patch_size}"
            )
        super().__init__(network, device=device, dtype=dtype, batch_size=batch_size)
        self.resolution = resolution
        self.dim: int = network.config.hidden_size

    @classmethod
    def from_pretrained(
        cls,
        source: str = "facebook/dinov2-base",
        *,
        resolution: int = 224,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Load published weights from a hub repository or a folder in transformers' layout.

        Raises:
            MissingWeights: if they are not on this machine.
        """
        weights = Weights(name="DINOv2", source=source, size_gb=0.35, licence="Apache-2.0")
        network = Dinov2Model.from_pretrained(locate(weights), local_files_only=True)
        return cls(network, resolution=resolution, device=device, dtype=dtype, batch_size=batch_size)

    def embed_images(self, frames: Tensor) -> Tensor:
        """Embeddings [N, D], float32 on the CPU, of unit length, of pictures [N, 3, H, W] in 0..1."""
        return self._in_batches(check_frames(frames), self._encode, self.dim)

    def _encode(self, frames: Tensor) -> Tensor:
        pixels = squash(frames, (self.resolution, self.resolution))
        pixels = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        return unit(self.network(pixel_values=pixels).pooler_output)
