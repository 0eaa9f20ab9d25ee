"""ViCLIP: one embedding space for clips and texts (InternVid, arXiv 2307.06942; scored as in VBench)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, Unpack

from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from storymem.config import build_settings
from storymem.io import read_json_object, replacing, write_json
from storymem.scorers.checkpoint import loaded, read_checkpoint, read_sizes, seeded
from storymem.scorers.clip import ClipTokenizer
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop_in_bytes, normalise
from storymem.scorers.scorer import Placement, Scorer, check_clips, check_texts, unit
from storymem.scorers.viclip_network import VICLIP_B_16, VICLIP_L_14, Viclip, ViclipConfig
from storymem.weights import Weights, locate

_CONFIG_FILE, _WEIGHTS_FILE = "viclip.json", "model.safetensors"
_SIZES = {"L-14": VICLIP_L_14, "B-16": VICLIP_B_16}
_SIZES_GB = {"L-14": 1.71, "B-16": 0.6}


def middle_frames(length: int, count: int) -> list[int]:
    """VBench's choice of ``count`` frames out of ``length``: the middle of each of equally long intervals.

    Intervals end at floor(i * length / n) with n = min(count, length); if the video is shorter than ``count``, the last
    frame is repeated. ``ValueError`` without a frame.
    """
    if length < 1:
        raise ValueError(f"a clip needs at least one frame; got {length}")
    intervals = min(count, length)
    edges = [i * length // intervals for i in range(intervals + 1)]
    middles = [(first + end - 1) // 2 for first, end in pairwise(edges)]
    return middles + [middles[-1]] * (count - intervals)


class ViclipScorer(Scorer[Viclip]):
    """Clip and text embeddings of ViCLIP, with the frames and the preprocessing of VBench.

    Args:
        network: the network.
        tokenizer: CLIP's own by default.
        device, dtype, batch_size: see `Scorer`; ``batch_size``, 8 by default, counts clips and texts.
    """

    def __init__(
        self,
        network: Viclip,
        *,
        tokenizer: ClipTokenizer | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        placement.setdefault("batch_size", 8)
        super().__init__(network, **placement)
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
            licence="CC-BY-NC-SA-4.0: no commercial use",
        )
        return [weights]

    @classmethod
    def from_pretrained(cls, size: str = "L-14", source: str | None = None, **placement: Unpack[Placement]) -> Self:
        """Load published weights.

        Args:
            size: of the network: ``"L-14"`` or ``"B-16"``.
            source: a hub id, a folder or a file, in either public layout: ``.safetensors`` (flat), or ``.pth`` with the
                tensors under the key ``model``. By default OpenGVLab's hub repository of that size.
            placement: see `Scorer`.
        """
        (weights,) = cls.required_weights(size, source)
        return cls(_load(_SIZES[size], locate(weights)), **placement).marked("published")

    @classmethod
    def from_folder(cls, folder: str | Path, **placement: Unpack[Placement]) -> Self:
        """Load a network of any size from a folder that `save` wrote, with its own vocabulary if it has one."""
        described, path = (
            locate(Weights(name=f"ViCLIP network in {folder}", source=str(folder), file=file))
            for file in (_CONFIG_FILE, _WEIGHTS_FILE)
        )
        config = read_sizes(ViclipConfig, read_json_object(described), described)
        tokenizer = ClipTokenizer.from_folder(path.parent, config.context_length, config.vocab_size)
        return cls(_load(config, path), tokenizer=tokenizer, **placement)

    @classmethod
    def from_config(
        cls,
        config: ViclipConfig | Mapping[str, Any],
        *,
        seed: int = 0,
        **placement: Unpack[Placement],
    ) -> Self:
        """An untrained network."""
        sizes = config if isinstance(config, ViclipConfig) else build_settings(ViclipConfig, config)
        return cls(seeded(seed, lambda: Viclip(sizes)), **placement).marked("untrained")

    def save(self, folder: str | Path) -> None:
        """Write sizes and weights to ``folder``, for `from_folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _WEIGHTS_FILE) as path:
            save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, path)
        write_json(folder / _CONFIG_FILE, asdict(self.config), indent=2)

    def frame_indices(self, length: int) -> list[int]:
        """Which frames of a video of ``length`` frames are used. A clip of only these frames has the same embedding."""
        return middle_frames(length, self.config.num_frames)

    def embed_clips(self, clips: Tensor) -> Tensor:
        """Embeddings [B, D] of clips [B, T, 3, H, W] in 0..1, of which `frame_indices` chooses the frames.

        A clip of one frame is that frame repeated, as in VBench.
        """
        clips = check_clips(clips)
        return self._in_batches(clips[:, self.frame_indices(clips.shape[1])], self._encode_clips, self.dim)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts; long texts are cut."""
        ids = self.tokenizer(check_texts(texts))
        return self._in_batches(ids, lambda batch: unit(self.network.text_encoder(batch)), self.dim)

    def _encode_clips(self, clips: Tensor) -> Tensor:
        pixels = crop_in_bytes(clips.flatten(0, 1), self.config.resolution)
        pixels = normalise(pixels, CLIP_MEAN, CLIP_STD).to(self.dtype)
        return unit(self.network.vision_encoder(rearrange(pixels, "(b t) c h w -> b t c h w", b=len(clips))))


def _load(config: ViclipConfig, path: Path) -> Viclip:
    # The .pth files hold the tensors under "model"; no tensor of the network has that name.
    return loaded(lambda: Viclip(config), read_checkpoint(path, inside="model"), path)
