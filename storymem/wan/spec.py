"""What depends on the base model: sizes, condition, experts. Nothing else knows these numbers. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Expert = Literal["high_noise", "low_noise"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A base model.

    Args:
        name: for messages.
        repository: where its weights are published in diffusers' layout.
        latent_channels: z of its VAE.
        temporal_stride: frames of video a latent frame stands for; the first latent frame stands for one.
        spatial_stride: pixels a latent pixel stands for.
        patch: latent pixels a token stands for, in height and width.
        mask_channels: of the condition, which stands beside the noisy latents together with ``latent_channels`` clean
            ones; 0: there are no condition channels.
        clean_frames: without condition channels: whether given frames can be clean latents at timestep 0.
        experts: its transformers, from high to low noise.
        boundary: timesteps >= boundary * 1000 go to the first expert, others to the second; None: there is one.
        layouts: of memory, which it can be trained for; none for a model of text alone.
        shift: of the noise levels.
        fps: frames per second it was trained on.
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
        """Channels beside the noisy latents: mask and clean latents."""
        return self.mask_channels + self.latent_channels if self.mask_channels else 0

    @property
    def multiple(self) -> int:
        """Pixels of which height and width must be multiples."""
        return self.spatial_stride * self.patch

    def latent_frames(self, frames: int) -> int:
        """T for F frames of video (F = 4n + 1); 0 for none.

        Raises:
            ValueError: if F is not 4n + 1.
        """
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
T2V_A14B = ModelSpec(
    name="Wan2.2-T2V-A14B",
    repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    latent_channels=16,
    temporal_stride=4,
    spatial_stride=8,
    experts=("high_noise", "low_noise"),
    boundary=0.875,
    layouts=(),
    shift=12.0,
    fps=16,
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


def spec_of(*, in_channels: int, latent_channels: int, spatial_stride: int) -> ModelSpec:
    """The base model that networks of these shapes belong to.

    Raises:
        ValueError: for shapes of another model.
    """
    for spec in SPECS:
        if (spec.in_channels, spec.latent_channels, spec.spatial_stride) == (
            in_channels,
            latent_channels,
            spatial_stride,
        ):
            return spec
    known = "; ".join(f"{s.name}: {s.in_channels}, {s.latent_channels}, {s.spatial_stride}" for s in SPECS)
    raise ValueError(
        f"networks of {in_channels} input channels, {latent_channels} latent channels and spatial stride "
        f"{spatial_stride} belong to no base model that is known ({known})"
    )
