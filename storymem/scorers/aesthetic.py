"""LAION aesthetic score: a small head on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn

from storymem.io import check_finite
from storymem.scorers.checkpoint import load_strictly, read_checkpoint, seeded
from storymem.scorers.clip import ClipScorer
from storymem.scorers.scorer import Origin, Placement, check_threshold
from storymem.weights import Weights, locate

_DIM = 768  # embedding of CLIP ViT-L/14
_CLIP = ("ViT-L-14-quickgelu", "openai")
_PREPROCESSING = "published_aesthetic"
_HEAD_FILE = "aesthetic_head.safetensors"


class _Published(NamedTuple):
    file: str
    folder: str
    licence: str
    size_gb: float


_PUBLISHED = {
    "v1": _Published(
        "sa_0_4_vit_l_14_linear.pth", "https://github.com/LAION-AI/aesthetic-predictor/raw/main", "MIT", 0.000004
    ),
    "v2": _Published(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main",
        "Apache-2.0",
        0.0037,
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


def _published(version: str) -> _Published:
    if version not in _PUBLISHED:
        raise ValueError(f"unknown version {version!r}; write one of {', '.join(_PUBLISHED)}")
    return _PUBLISHED[version]


def _head(version: str, dim: int = _DIM) -> nn.Module:
    _published(version)
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
        self.name = name
        self.threshold = check_threshold(threshold)

    @property
    def origin(self) -> Origin:
        """Where the weights of head and CLIP are from."""
        return self.clip.origin

    @staticmethod
    def required_weights(
        version: str = "v1", source: str | None = None, clip_source: str | None = None, **_: Any
    ) -> list[Weights]:
        """What :meth:`from_pretrained` loads: the head and its CLIP."""
        published = _published(version)
        head = Weights(
            name=f"LAION aesthetic head {version}",
            source=source or str(Path("~/.cache/storymem") / published.file),
            file=published.file,
            size_gb=published.size_gb,
            licence=published.licence,
            url=f"{published.folder}/{published.file}",
        )
        return [head, *ClipScorer.required_weights(*_CLIP, clip_source)]

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

        Raises:
            MissingWeights: if the head or CLIP is not on this machine.
            FileError: if a file is damaged or holds something else.
        """
        head = _head(version)
        path = locate(cls.required_weights(version, source)[0])
        load_strictly(head, read_checkpoint(path), path)
        clip = ClipScorer.from_pretrained(*_CLIP, clip_source, preprocessing=_PREPROCESSING, **placement)
        return cls(clip, head, name=f"laion-{version}", threshold=threshold)

    @classmethod
    def from_folder(cls, folder: str | Path, *, threshold: float, **placement: Unpack[Placement]) -> Self:
        """Load a linear head and a CLIP of any size from one folder.

        Args:
            folder: as `ClipScorer.from_folder` takes it, and the head in ``aesthetic_head.safetensors``.
            threshold: see the class.
            placement: of the CLIP model; see `Scorer`.

        Raises:
            MissingWeights: if the folder lacks a file.
            FileError: if a file is damaged, or they do not fit each other.
        """
        clip = ClipScorer.from_folder(folder, preprocessing=_PREPROCESSING, **placement)
        head = _head("v1", clip.dim)
        path = locate(Weights(name=f"aesthetic head in {folder}", source=str(folder), file=_HEAD_FILE))
        load_strictly(head, read_checkpoint(path), path)
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
        """An untrained head on an untrained CLIP of any size, scores around 5; for tests and trials only.

        Args:
            clip: open_clip's model configuration; see `ClipScorer.from_config`.
            version, threshold, placement: see `from_pretrained`.
            seed: of the random weights; the global random state is left as it was.
        """
        embedder = ClipScorer.from_config(clip, seed=seed, preprocessing=_PREPROCESSING, **placement)
        head = seeded(seed, lambda: _head(version, embedder.dim))
        last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.constant_(last.bias, 5.0)
        return cls(embedder, head, name=f"untrained laion-{version}", threshold=threshold)

    @torch.no_grad()
    def score(self, frames: Tensor) -> Tensor:
        """Scores of images.

        Args:
            frames: [N, 3, H, W], float in 0..1, RGB, of any size.

        Returns:
            [N] float32 on the CPU, about 0..10.

        Raises:
            ValueError: for anything else; see `check_frames`.
            NotFiniteError: if a score is NaN or infinite.
        """
        scores = self.head(self.clip.embed_images(frames)).squeeze(-1)
        check_finite(scores, f"aesthetic scores by {self.name}", "its head is damaged")
        return scores

    def to(self, device: str | torch.device) -> Self:
        """Move CLIP, for example ``to("cpu")`` between shots; returns the scorer itself."""
        self.clip.to(device)
        return self
