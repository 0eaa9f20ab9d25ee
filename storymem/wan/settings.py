"""Settings of the video model, as the config groups ``model``, ``sampler`` and ``runtime`` hold them."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from storymem.config import STRICT
from storymem.weights import Weights

Continuity = Literal["none", "mi2v", "mm2v"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoSettings:
    """Size and length of a shot: pixels, frames (4n + 1) and frames per second."""

    height: int
    width: int
    frames: int
    fps: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, not {getattr(self, name)}")
        if self.frames < 5 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4n + 1 and at least 5, not {self.frames}")
        if self.fps < 1:
            raise ValueError(f"fps must be 1 or more, not {self.fps}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkSettings:
    """Shape of the networks.

    With published weights it serves to plan (tokens, FLOPs) without reading them; without weights the networks are
    built from it.

    Args:
        transformer: arguments of ``WanTransformer3DModel``; ``in_channels`` is left out, it follows from the task.
        vae: arguments of ``AutoencoderKLWan``; only for networks built from their configuration.
        text_encoder: arguments of ``UMT5Config``; only for networks built from their configuration.
        text_tokens: length to which prompts are padded.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    text_tokens: int = 512


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterSettings:
    """The memory LoRA.

    Args:
        weights: where it lies; a local folder or a hub repository.
        folders: for each ``continuity`` the sub-folder that holds its two files; empty if ``weights`` is that folder.
        alpha: for files that do not say it; None: the published 128.
        use_rslora: for files that do not say it; None: the published true.
        weight: strength of the adapter; 1.0 as trained.
    """

    weights: Weights
    folders: dict[Continuity, str] = field(default_factory=dict)
    alpha: float | None = None
    use_rslora: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """A Wan2.2-style video model with memory.

    Args:
        name: for plans and manifests.
        video: size and length of its shots.
        network: shape of its networks.
        weights: a diffusers folder or repository of the image-to-video model; None builds the networks from
            ``network`` with random weights drawn from ``seed``.
        text_to_video: the same for the text-to-video model of the first shot (only its transformers are used);
            None: see ``has_text_to_video``.
        has_text_to_video: whether ``first_shot: t2v`` has a model of its own. If not, the memory-to-video model
            makes the first shot from text alone.
        adapter: the memory LoRA; None: the weights themselves know memory, or are random.
        rope_stride: S, the distance between memory slots on the temporal axis.
        boundary: timesteps >= boundary * 1000 go to the high-noise expert.
        text_to_video_boundary: the same for the text-to-video model.
        dtype: of the transformers and the text encoder.
        vae_dtype: of the VAE.
        seed: of random weights.
    """

    name: str
    video: VideoSettings
    network: NetworkSettings
    weights: Weights | None = None
    text_to_video: Weights | None = None
    has_text_to_video: bool = True
    adapter: AdapterSettings | None = None
    rope_stride: int = 5
    boundary: float = 0.9
    text_to_video_boundary: float = 0.875
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rope_stride < 1:
            raise ValueError(f"rope_stride must be 1 or more, not {self.rope_stride}")
        if self.weights is not None and self.has_text_to_video and self.text_to_video is None:
            raise ValueError("text_to_video names no weights: give them, or set has_text_to_video to false")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplerSettings:
    """How a shot is sampled; the defaults are the published settings.

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance of the high-noise expert; 1.0 means none (and half the work).
        guidance_low: of the low-noise expert; None: as ``guidance``.
        shift: of the noise levels, for memory-to-video.
        text_to_video_shift: for a first shot by text-to-video.
        negative_prompt: what a shot should not show, unless the shot says its own.
    """

    steps: int = 40
    guidance: float = 3.5
    guidance_low: float | None = None
    shift: float = 4.0
    text_to_video_shift: float = 12.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if self.guidance < 1 or (self.guidance_low is not None and self.guidance_low < 1):
            raise ValueError("guidance must be 1 (none) or more")
        if self.guidance == 1 and (self.guidance_low or 1) > 1:
            raise ValueError("guidance_low needs guidance above 1: without it no negative prompt is run at all")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RuntimeSettings:
    """Where and how the networks run; none of it changes what film is made, beyond rounding.

    Args:
        device: "auto" (the accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
        offload: "none" keeps all on the device; "model" moves whole networks there one at a time; "group" streams
            the blocks of the transformers, so that a 14B expert fits a small card.
        vae_tiling: decode in tiles: less memory, a little slower.
        threads: CPU threads for torch; None leaves torch's choice.
    """

    device: str = "auto"
    offload: Literal["none", "model", "group"] = "none"
    vae_tiling: bool = False
    threads: int | None = None
