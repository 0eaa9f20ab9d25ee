"""LAION aesthetic score: a small head on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from storymem.io import check_finite
from storymem.scorers.checkpoint import loaded, read_checkpoint, seeded
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import Origin, Placement, check_threshold
from storymem.weights import Weights, locate

_DIM = 768  # embedding of CLIP ViT-L/14
_CLIP = ("ViT-L-14-quickgelu", "openai")
_PREPROCESSING = "published_aesthetic"
_HEAD_FILE = "aesthetic_head.safetensors"


def _weights(version: str, file: str, repository: str, licence: str, size_gb: float) -> Weights:
    return Weights(
        name=f"LAION aesthetic head {version}",
        source=f"~/.cache/storymem/{file}",
        file=file,
        size_gb=size_gb,
        licence=licence,
        url=f"https://github.com/{repository}/raw/main/{file}",
    )


_PUBLISHED = {
    "v1": _weights("v1", "sa_0_4_vit_l_14_linear.pth", "LAION-AI/aesthetic-predictor", "MIT", 0.000004),
    "v2": _weights(
        *("v2", "sac+logos+ava1-l14-linearMSE.pth", "christophschuhmann/improved-aesthetic-predictor"),
        *("Apache-2.0", 0.0037),
    ),
}


class LinearsHead(nn.Module):
    """V2: linear layers without activations between them, as published; dropout is inactive."""

    def __init__(self, dim: int = _DIM) -> None:
        super().__init__()
        # The indices 0, 2, 4, 6 and 7 of the linears are their published names.
        self.layers = nn.Sequential(
            *(nn.Linear(dim, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _head(version: str, dim: int = _DIM) -> nn.Module:
    return nn.Linear(dim, 1) if version == "v1" else LinearsHead(dim)


class AestheticScorer:
    """Aesthetic score of images, about 0..10; VBench and ST-Bench report a tenth of it.

    Args:
        clip: gives the embeddings; OpenAI's ViT-L/14 with the preprocessing ``"published_aesthetic"``.
        head: [N, D] unit-length embeddings to [N, 1]; stays in float32 on the CPU, where it costs nothing.
        name: of the head, such as ``"laion-v1"``.
        threshold: a frame that scores less is of low quality.

    Raises:
        ValueError: if ``clip`` preprocesses images in another way than the head was trained with.
    """

    def __init__(self, clip: ClipScorer, head: nn.Module, *, name: str, threshold: float) -> None:
        if clip.preprocessing != _PREPROCESSING:
            raise ValueError(f"the aesthetic head needs preprocessing {_PREPROCESSING!r}; got {clip.preprocessing!r}")
        self.clip = clip
        self.head = head.float().cpu().eval().requires_grad_(False)
        self.name, self.preprocessing, self.dtype = name, clip.preprocessing, clip.dtype
        self.threshold = check_threshold(threshold)

    @property
    def network(self) -> nn.Module:
        """CLIP and the head."""
        return nn.ModuleDict({"clip": self.clip.network, "head": self.head})

    @property
    def origin(self) -> Origin:
        """Where the weights of head and CLIP are from."""
        return self.clip.origin

    @staticmethod
    def required_weights(
        version: str = "v1", source: str | None = None, clip_source: str | None = None, **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads: the head and its CLIP."""
        if version not in _PUBLISHED:
            raise ValueError(f"unknown version {version!r}; write one of {', '.join(_PUBLISHED)}")
        head = _PUBLISHED[version]
        return [replace(head, source=source or head.source), *ClipScorer.required_weights(*_CLIP, clip_source)]

    @classmethod
    def from_pretrained(
        cls,
        version: str = "v1",
        source: str | None = None,
        clip_source: str | None = None,
        *,
        threshold: float = 4.5,
        **placement: Unpack[Placement],
    ) -> Self:
        """Load a published head and its CLIP.

        Args:
            version: ``"v1"``, one linear layer, the one VBench uses; ``"v2"``, trained on more ratings.
            source: file of the head, or the folder or hub repository that holds it under its published name; by default
                in ``~/.cache/storymem``.
            clip_source: file, folder or hub repository of OpenAI's ViT-L/14; by default timm's.
            threshold: see the class. 4.5 is our choice; no published value exists.
            placement: of the CLIP model; see `Scorer`.
        """
        path = locate(cls.required_weights(version, source)[0])
        head = loaded(lambda: _head(version), read_checkpoint(path), path)
        clip = ClipScorer.from_pretrained(*_CLIP, clip_source, preprocessing=_PREPROCESSING, **placement)
        return cls(clip, head, name=f"laion-{version}", threshold=threshold)

    @classmethod
    def from_folder(cls, folder: str | Path, *, threshold: float, **placement: Unpack[Placement]) -> Self:
        """Load a CLIP as `ClipScorer.from_folder` and the linear head ``aesthetic_head.safetensors`` beside it."""
        clip = ClipScorer.from_folder(folder, preprocessing=_PREPROCESSING, **placement)
        path = locate(Weights(name=f"aesthetic head in {folder}", source=str(folder), file=_HEAD_FILE))
        head = loaded(lambda: _head("v1", clip.dim), read_checkpoint(path), path)
        return cls(clip, head, name="laion-style v1", threshold=threshold)

    @classmethod
    def from_config(
        cls,
        clip: Mapping[str, Any],
        *,
        version: str = "v1",
        seed: int = 0,
        threshold: float = 0.0,
        **placement: Unpack[Placement],
    ) -> Self:
        """An untrained head, with scores around 5, on the untrained CLIP of `ClipScorer.from_config`."""
        embedder = ClipScorer.from_config(clip, seed=seed, preprocessing=_PREPROCESSING, **placement)
        head = seeded(seed, lambda: _head(version, embedder.dim))
        last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.constant_(last.bias, 5.0)
        return cls(embedder, head, name=f"untrained laion-{version}", threshold=threshold)

    @torch.no_grad()
    def score(self, frames: Tensor) -> Tensor:
        """Scores [N], about 0..10, of images [N, 3, H, W] in 0..1."""
        scores = self.head(self.clip.embed_images(frames)).squeeze(-1)
        check_finite(scores, f"aesthetic scores by {self.name}", "its head is damaged")
        return scores

    def to(self, device: str | torch.device) -> Self:
        """Move CLIP, for example ``to("cpu")`` between shots; returns the scorer itself."""
        self.clip.to(device)
        return self
