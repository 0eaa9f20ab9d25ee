"""ViCLIP: one embedding space for clips and texts (InternVid, arXiv 2307.06942; scored as in VBench)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from storymem.config import ConfigError, build_settings
from storymem.io import FileError, read_json_object, replacing, write_json
from storymem.scorers.checkpoint import load_strictly, read_checkpoint
from storymem.scorers.inputs import check_clips, check_texts
from storymem.scorers.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    crop_in_bytes,
    normalise,
    squash_in_bytes,
)
from storymem.scorers.scorer import Scorer, unit
from storymem.scorers.texts import ClipTokenizer
from storymem.scorers.viclip_network import VICLIP_B_16, VICLIP_L_14, Viclip, ViclipConfig
from storymem.weights import Weights, locate

_LICENCE = "CC-BY-NC-SA-4.0: no commercial use"
_CONFIG_FILE, _WEIGHTS_FILE = "viclip.json", "model.safetensors"
_SIZES = {"L-14": VICLIP_L_14, "B-16": VICLIP_B_16}
_SIZES_GB = {"L-14": 1.71, "B-16": 0.6}


def middle_frames(length: int, count: int) -> list[int]:
    """VBench's choice of ``count`` frames out of ``length``: the middle of each of equally long intervals.

    Intervals end at floor(i * length / n) with n = min(count, length); if the video is shorter than
    ``count``, the last frame is repeated.
    """
    _check_length(length, 1)
    intervals = min(count, length)
    edges = [i * length // intervals for i in range(intervals + 1)]
    middles = [(first + end - 1) // 2 for first, end in pairwise(edges)]
    return middles + [middles[-1]] * (count - intervals)


def strided_frames(length: int, count: int) -> list[int]:
    """InternVid's choice: the first ``count`` frames at stride length // count, of no fewer frames."""
    _check_length(length, count)
    return [i * (length // count) for i in range(count)]


def _check_length(length: int, least: int) -> None:
    if length < least:
        raise ValueError(f"a clip needs at least {least} frames here; got {length}")


@dataclass(frozen=True, kw_only=True)
class FrameProfile:
    """How frames are chosen from a clip and turned into the network's pixels."""

    choose: Callable[[int, int], list[int]]
    preprocess: Preprocessing
    mean: Sequence[float]
    std: Sequence[float]


PROFILES = {
    # Comparable with published numbers.
    "vbench": FrameProfile(choose=middle_frames, preprocess=crop_in_bytes, mean=CLIP_MEAN, std=CLIP_STD),
    # How the network was trained.
    "internvid": FrameProfile(choose=strided_frames, preprocess=squash_in_bytes, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


class ViclipScorer(Scorer[Viclip]):
    """Clip and text embeddings of ViCLIP.

    ``tokenizer.texts_truncated`` of ``tokenizer.texts_seen`` counts the texts that were longer than the
    context of 32 tokens and so were cut: to be said beside any result.

    Args:
        network: the network.
        tokenizer: CLIP's own by default.
        profile: ``"vbench"`` (comparable with published numbers) or ``"internvid"`` (how it was trained).
        device, dtype, batch_size: see `Scorer`; the batch counts clips and texts.
    """

    def __init__(
        self,
        network: Viclip,
        *,
        tokenizer: ClipTokenizer | None = None,
        profile: str = "vbench",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
    ) -> None:
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r}; write one of {', '.join(PROFILES)}")
        super().__init__(network, device=device, dtype=dtype, batch_size=batch_size)
        self.profile = profile
        self.config = network.config
        self.dim = network.config.output_dim
        self.tokenizer = tokenizer or ClipTokenizer(network.config.context_length)

    @staticmethod
    def required_weights(size: str = "L-14", source: str | None = None, **_: Any) -> list[Weights]:
        """What :meth:`from_pretrained` loads. Raises ``ValueError`` for an unknown size."""
        if size not in _SIZES:
            raise ValueError(f"unknown size {size!r}; write one of {', '.join(_SIZES)}")
        weights = Weights(
            name=f"ViCLIP-{size}",
            source=source or f"OpenGVLab/ViCLIP-{size}-hf",
            file=_WEIGHTS_FILE,
            size_gb=_SIZES_GB[size],
            licence=_LICENCE,
        )
        return [weights]

    @classmethod
    def from_pretrained(
        cls,
        size: str = "L-14",
        source: str | None = None,
        *,
        profile: str = "vbench",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
    ) -> Self:
        """Load published weights of size ``"L-14"`` or ``"B-16"``.

        Args:
            size: of the network.
            source: a hub id, a folder or a file, in either public layout: ``.safetensors`` (flat), or
                ``.pth`` with the tensors under the key ``model``. By default OpenGVLab's hub repository of
                that size.
            profile, device, dtype, batch_size: see the class.

        Raises:
            MissingWeights: if the weights are not on this machine.
            CheckpointError: if the file holds another network.
        """
        (weights,) = cls.required_weights(size, source)
        network = _load(_SIZES[size], locate(weights))
        scorer = cls(network, profile=profile, device=device, dtype=dtype, batch_size=batch_size)
        scorer.origin = "published"
        return scorer

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        profile: str = "vbench",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
    ) -> Self:
        """Load a network of any size from a folder that `save` wrote, by its own vocabulary if it has one.

        Raises:
            MissingWeights: if the folder lacks ``viclip.json`` or ``model.safetensors``.
            FileError, CheckpointError: if a file is damaged, or they do not fit each other.
        """
        name = f"ViCLIP network in {folder}"
        described = locate(Weights(name=name, source=str(folder), file=_CONFIG_FILE))
        path = locate(Weights(name=name, source=str(folder), file=_WEIGHTS_FILE))
        sizes = read_json_object(described)
        try:
            config = build_settings(ViclipConfig, sizes)
        except ConfigError as error:
            raise FileError(f"{described}: {error}") from None
        network = _load(config, path)
        tokenizer = ClipTokenizer.from_folder(path.parent, network.config.context_length, network.config.vocab_size)
        return cls(network, tokenizer=tokenizer, profile=profile, device=device, dtype=dtype, batch_size=batch_size)

    @classmethod
    def from_config(
        cls,
        config: ViclipConfig | Mapping[str, Any],
        *,
        seed: int = 0,
        profile: str = "vbench",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
    ) -> Self:
        """An untrained network of any size, the same for the same ``seed``; for tests and trials only.

        The temporal embedding is drawn too, not left at zero, so that frame order matters.
        """
        sizes = config if isinstance(config, ViclipConfig) else build_settings(ViclipConfig, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Viclip(sizes)
            torch.nn.init.normal_(network.vision_encoder.temporal_positional_embedding, std=sizes.width**-0.5)
        scorer = cls(network, profile=profile, device=device, dtype=dtype, batch_size=batch_size)
        scorer.origin = "untrained"
        return scorer

    def save(self, folder: str | Path) -> None:
        """Write sizes and weights to ``folder``, for `from_folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _WEIGHTS_FILE) as path:
            save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, path)
        write_json(folder / _CONFIG_FILE, asdict(self.config), indent=2)

    def frame_indices(self, length: int) -> list[int]:
        """Which frames of a video of ``length`` frames are looked at: read only these to save memory.

        A clip of exactly these frames is embedded as it is: both profiles keep all of ``num_frames`` frames.
        """
        return PROFILES[self.profile].choose(length, self.config.num_frames)

    def embed_clips(self, clips: Tensor) -> Tensor:
        """Embeddings of clips.

        Args:
            clips: [B, T, 3, H, W], float in 0..1, RGB, of any size and length; `frame_indices` chooses the
                frames. A clip of one frame is that frame repeated, as in VBench.

        Returns:
            [B, D] float32 on the CPU, of unit length.

        Raises:
            ValueError: for anything else; see `check_clips`. Profile ``internvid`` refuses clips of fewer
                frames than the network takes.
        """
        clips = check_clips(clips)
        return self._in_batches(clips[:, self.frame_indices(clips.shape[1])], self._encode_clips, self.dim)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, [N, D] float32 on the CPU, of unit length; long texts are cut."""
        ids = self.tokenizer(check_texts(texts))
        return self._in_batches(ids, lambda batch: unit(self.network.text_encoder(batch)), self.dim)

    def _encode_clips(self, clips: Tensor) -> Tensor:
        profile, side = PROFILES[self.profile], self.config.resolution
        pixels = profile.preprocess(clips.flatten(0, 1), (side, side))
        pixels = normalise(pixels, profile.mean, profile.std).to(self.dtype)
        return unit(self.network.vision_encoder(rearrange(pixels, "(b t) c h w -> b t c h w", b=len(clips))))


def _load(config: ViclipConfig, path: Path) -> Viclip:
    # The .pth files keep the tensors one level down; no tensor of the network itself is called "model".
    tensors = read_checkpoint(path, inside="model")
    with torch.device("meta"):
        network = Viclip(config)
    load_strictly(network, tensors, path, assign=True)
    return network
