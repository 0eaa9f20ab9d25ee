"""All that depends on the base model: sizes, conditioning, experts. No other module has these numbers. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Expert = Literal["high_noise", "low_noise"]

#: The attribute of a diffusers pipeline that holds each expert; also the prefix of its keys in a file for both.
COMPONENTS: dict[Expert, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}

#: The text encoder of all Wan models: arguments of ``UMT5Config``.
UMT5_XXL: dict[str, Any] = {
    **{"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "model_type": "umt5"},
}


def experts_of(pipe: Any) -> dict[Expert, Any]:
    """The transformers of a pipeline, of which one may be absent; a ``ValueError`` if both are."""
    experts = {expert: getattr(pipe, name, None) for expert, name in COMPONENTS.items()}
    present = {expert: transformer for expert, transformer in experts.items() if transformer is not None}
    if not present:
        raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a transformer_2 to adapt")
    return present


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A base model.

    Args:
        name: for messages.
        repository: of its weights in diffusers' layout.
        latent_channels: z of its VAE.
        temporal_stride: video frames per latent frame, but for the first latent frame, which is one frame.
        spatial_stride: pixels per latent pixel.
        patch: latent pixels per token, in height and width.
        mask_channels: of the conditioning, which is concatenated to the noisy latents with ``latent_channels`` clean
            ones; 0: there are no conditioning channels.
        clean_frames: without conditioning channels: whether given frames can be clean latents at timestep 0.
        experts: its transformers, from high to low noise.
        boundary: timesteps >= boundary * 1000 go to the first expert, others to the second; None: there is one.
        layouts: of memory that it can be trained for; none for a text-to-video model.
        shift: of the noise levels.
        fps: frames per second of its training data.
    """

    name: str
    repository: str
    latent_channels: int
    temporal_stride: int
    spatial_stride: int
    patch: int = 2
    mask_channels: int = 0
    clean_frames: bool = False
    experts: tuple[Expert, ...]
    boundary: float | None
    layouts: tuple[Literal["joint", "cached"], ...]
    shift: float
    fps: int

    @property
    def in_channels(self) -> int:
        """Input channels of its transformers."""
        return self.latent_channels + self.condition_channels

    @property
    def condition_channels(self) -> int:
        """Channels concatenated to the noisy latents: mask and clean latents."""
        return self.mask_channels + self.latent_channels if self.mask_channels else 0

    @property
    def multiple(self) -> int:
        """Pixels of which height and width must be multiples."""
        return self.spatial_stride * self.patch

    def latent_frames(self, frames: int) -> int:
        """T for F frames of video; 0 for none, and a ``ValueError`` unless F = 4n + 1."""
        stride = self.temporal_stride
        if frames == 0:
            return 0
        if frames < 1 or frames % stride != 1:
            below = max(1, (frames - 1) // stride * stride + 1)
            raise ValueError(
                f"a shot has {stride}n + 1 frames, not {frames}: the nearest are {below} and {below + stride}"
            )
        return (frames - 1) // stride + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of latents for pixels; ``ValueError`` unless both are positive multiples of ``multiple``."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels < self.multiple or pixels % self.multiple:
                raise ValueError(f"{name} must be a positive multiple of {self.multiple} for {self.name}, not {pixels}")
        return height // self.spatial_stride, width // self.spatial_stride

    def nearest_size(self, aspect: float, pixels: int) -> tuple[int, int]:
        """Height and width in multiples of ``multiple``, with at most ``pixels`` and width / height near ``aspect``.

        The ratio to the aspect and the ratio to the pixels weigh equally; of equal sizes it is the nearest in aspect.
        """

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            height, width = size
            error = abs(math.log(width / height / aspect))
            return round(error + math.log(pixels / (height * width)), 9), error

        step = self.multiple
        heights = range(step, 2 * math.isqrt(int(pixels / aspect)) + step, step)
        sizes = ((height, width) for height in heights for width in range(step, pixels // height + 1, step))
        return min(sizes, key=distance)


A14B = ModelSpec(
    name="Wan2.2-I2V-A14B",
    repository="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    latent_channels=16,
    temporal_stride=4,
    spatial_stride=8,
    mask_channels=4,
    experts=("high_noise", "low_noise"),
    boundary=0.9,
    layouts=("joint", "cached"),
    shift=4.0,
    fps=16,
)
T2V_A14B = replace(
    A14B,
    name="Wan2.2-T2V-A14B",
    repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    mask_channels=0,
    boundary=0.875,
    layouts=(),
    shift=12.0,
)
TI2V_5B = ModelSpec(
    name="Wan2.2-TI2V-5B",
    repository="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    latent_channels=48,
    temporal_stride=4,
    spatial_stride=16,
    clean_frames=True,
    experts=("high_noise",),
    boundary=None,
    layouts=("cached",),
    shift=5.0,
    fps=24,
)
SPECS = (A14B, T2V_A14B, TI2V_5B)

#: ``model.name`` -> WIDTHxHEIGHT that the weights were trained at, where that is known.
TRAINED_SIZES = {
    "toy": ("96x64",),
    "wan2.2-a14b": ("832x480", "480x832", "1280x720", "720x1280"),
    "wan2.2-ti2v-5b": ("1280x704", "704x1280"),
}


def spec_of(*, in_channels: int, latent_channels: int, spatial_stride: int) -> ModelSpec:
    """The base model whose networks have these shapes; a ``ValueError`` if there is none."""
    wanted = (in_channels, latent_channels, spatial_stride)
    for spec in SPECS:
        if (spec.in_channels, spec.latent_channels, spec.spatial_stride) == wanted:
            return spec
    known = "; ".join(f"{s.name}: {s.in_channels}, {s.latent_channels}, {s.spatial_stride}" for s in SPECS)
    raise ValueError(
        f"no known base model has {in_channels} input channels, {latent_channels} latent channels and spatial stride "
        f"{spatial_stride} ({known})"
    )
