"""DINOv2 by transformers: image embeddings that distinguish individual objects, for identity consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Self, Unpack

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from storymem.config import STRICT, build_settings
from storymem.io import FileError, read_json_object
from storymem.scorers.checkpoint import Count, Width, load_pretrained, read_sizes, seeded
from storymem.scorers.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalise, squash
from storymem.scorers.scorer import Placement, Scorer, check_frames, unit
from storymem.weights import Weights, locate

_WEIGHTS_FILE, _CONFIG_FILE = "model.safetensors", "config.json"
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}  # for tests and trials


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dinov2Sizes:
    """What decides a DINOv2 network, as transformers names it."""

    hidden_size: Width = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    mlp_ratio: Annotated[int, Field(ge=1, le=16)] = 4
    image_size: Annotated[int, Field(ge=1, le=2048)] = 224
    patch_size: Annotated[int, Field(ge=1, le=256)] = 14
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if not self.patch_size <= self.image_size <= 128 * self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not 1 to 128 times patch_size={self.patch_size}")


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
        path, described = (locate(weights) for weights in cls.required_weights(source))
        scorer = cls(_load(path, described), resolution=resolution, **placement)
        scorer.origin = "published"
        return scorer

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        resolution: int = 28,
        **placement: Unpack[Placement],
    ) -> Self:
        """An untrained network of the sizes in ``config`` (see `Dinov2Sizes`)."""
        sizes = build_settings(Dinov2Sizes, {**_TINY, **(config or {})})
        network = seeded(seed, lambda: Dinov2Model(Dinov2Config(**asdict(sizes))))
        scorer = cls(network, resolution=resolution, **placement)
        scorer.origin = "untrained"
        return scorer

    def embed_images(self, frames: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, 3, H, W] in 0..1."""
        return self._in_batches(check_frames(frames), self._encode, self.dim)

    def _encode(self, frames: Tensor) -> Tensor:
        pixels = squash(frames, self.resolution)
        pixels = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        return unit(self.network(pixel_values=pixels).pooler_output)


def _load(path: Path, described: Path) -> Dinov2Model:
    content = read_json_object(described)
    if content.get("model_type") != "dinov2":
        raise FileError(f"{described}: model_type is {content.get('model_type')!r}, not 'dinov2'")
    known = {field.name for field in fields(Dinov2Sizes)}
    sizes = read_sizes(Dinov2Sizes, {key: value for key, value in content.items() if key in known}, described)
    return load_pretrained(Dinov2Model, path, described, Dinov2Config(**asdict(sizes)))
