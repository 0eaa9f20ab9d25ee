"""LAION aesthetic score: a small head on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from storymem.io import check_finite
from storymem.scorers.checkpoint import load_strictly, read_checkpoint
from storymem.scorers.clip import ClipConfig, ClipScorer
from storymem.scorers.inputs import check_prompts
from storymem.scorers.scorer import Origin, check_threshold
from storymem.weights import Weights, locate

_DIM = 768  # embedding of CLIP ViT-L/14
_LAION = "https://github.com/LAION-AI/aesthetic-predictor/raw/main"
_V2_AUTHOR = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main"
_CLIP = ("ViT-L-14-quickgelu", "openai")
_FILES = {"v1": "sa_0_4_vit_l_14_linear.pth", "v2": "sac+logos+ava1-l14-linearMSE.pth"}
_URLS = {"v1": f"{_LAION}/{_FILES['v1']}", "v2": f"{_V2_AUTHOR}/{_FILES['v2']}"}
_LICENCES = {"v1": "MIT", "v2": "Apache-2.0"}
_HEAD_FILE = "aesthetic_head.safetensors"
_SIZES_GB = {"v1": 0.000004, "v2": 0.0037}


class LinearsHead(nn.Module):
    """V2: linear layers without activations between them, as published; dropout is inactive."""

    def __init__(self, dim: int = _DIM, widths: Sequence[int] = (1024, 128, 64, 16)) -> None:
        super().__init__()
        sizes = [dim, *widths, 1]
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        first, second, third, *rest = linears
        # Dropout sits after each of the first three linears, which gives the published indices 0, 2, 4, 6, 7.
        self.layers = nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _head(version: str, dim: int = _DIM) -> nn.Module:
    if version not in _FILES:
        raise ValueError(f"unknown version {version!r}; write one of {', '.join(_FILES)}")
    return nn.Linear(dim, 1) if version == "v1" else LinearsHead(dim)


class AestheticScorer:
    """Aesthetic score of pictures, about 0..10; VBench and ST-Bench report a tenth of it.

    Args:
        clip: gives the embeddings; OpenAI's ViT-L/14 with the preprocessing ``"published_aesthetic"``.
        head: [N, D] unit-length embeddings to [N, 1]; stays in float32 on the CPU, where it costs nothing.
        name: for a film's manifest.
        threshold: a frame that scores less is of low quality.

    Raises:
        ValueError: if ``clip`` preprocesses pictures in another way than the head was trained with.
    """

    def __init__(self, clip: ClipScorer, head: nn.Module, *, name: str, threshold: float) -> None:
        if clip.preprocessing != "published_aesthetic":
            raise ValueError(
                f"the aesthetic head needs preprocessing 'published_aesthetic'; got {clip.preprocessing!r}"
            )
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
        return [head_weights(version, source), *ClipScorer.required_weights(*_CLIP, clip_source)]

    @classmethod
    def from_pretrained(
        cls,
        version: str = "v1",
        source: str | None = None,
        clip_source: str | None = None,
        *,
        threshold: float = 4.5,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ) -> Self:
        """Load a published head and its CLIP.

        Args:
            version: ``"v1"``, one linear layer, the one VBench uses; ``"v2"``, trained on more ratings.
            source: file of the head, or the folder or hub repository that holds it under its published name;
                by default in ``~/.cache/storymem``.
            clip_source: file, folder or hub repository of OpenAI's ViT-L/14; by default timm's.
            threshold: see the class. 4.5 is our choice; nothing published sets it.
            device, dtype, batch_size: of the CLIP model; see `ClipScorer`.

        Raises:
            MissingWeights: if the head or CLIP is not on this machine.
            CheckpointError: if a file holds something else.
        """
        head = _head(version)
        path = locate(head_weights(version, source))
        load_strictly(head, read_checkpoint(path), path)
        clip = ClipScorer.from_pretrained(
            *_CLIP,
            clip_source,
            preprocessing="published_aesthetic",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        return cls(clip, head, name=f"laion-{version}", threshold=threshold)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        version: str = "v1",
        threshold: float,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ) -> Self:
        """Load a head and a CLIP of any size from one folder.

        Args:
            folder: as `ClipScorer.from_folder` takes it, and the head in ``aesthetic_head.safetensors``.
            version: the kind of head.
            threshold: see the class.
            device, dtype, batch_size: of the CLIP model; see `ClipScorer`.

        Raises:
            MissingWeights: if the folder lacks a file.
            CheckpointError: if the files do not fit each other.
        """
        clip = ClipScorer.from_folder(
            folder, preprocessing="published_aesthetic", device=device, dtype=dtype, batch_size=batch_size
        )
        head = _head(version, clip.dim)
        path = locate(Weights(name=f"aesthetic head in {folder}", source=str(folder), file=_HEAD_FILE))
        load_strictly(head, read_checkpoint(path), path)
        return cls(clip, head, name=f"laion-style {version}", threshold=threshold)

    @classmethod
    def from_config(
        cls,
        clip: ClipConfig | Mapping[str, Any],
        *,
        version: str = "v1",
        seed: int = 0,
        threshold: float = 0.0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ) -> Self:
        """An untrained head on an untrained CLIP of any size, scores around 5; for tests and trials only.

        Args:
            clip: open_clip's model configuration; see `ClipScorer.from_config`.
            version, threshold, device, dtype, batch_size: see `from_pretrained`.
            seed: of the random weights; the global random state is left as it was.
        """
        embedder = ClipScorer.from_config(
            clip,
            seed=seed,
            preprocessing="published_aesthetic",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = _head(version, embedder.dim)
        last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.constant_(last.bias, 5.0)
        return cls(embedder, head, name=f"untrained laion-{version}", threshold=threshold)

    @property
    def device(self) -> torch.device:
        """Where CLIP runs."""
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        """The type CLIP computes in."""
        return self.clip.dtype

    @torch.no_grad()
    def score(self, frames: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores of pictures.

        Args:
            frames: [N, 3, H, W], float in 0..1, RGB, of any size.
            prompts: accepted, checked and not used: this score looks at the picture only.

        Returns:
            [N] float32 on the CPU, about 0..10.

        Raises:
            ValueError: for anything else; see `check_frames`.
            NotFiniteError: if a score is NaN or infinite: every frame would be refused, or pass.
        """
        embeddings = self.clip.embed_images(frames)
        check_prompts(prompts, len(embeddings))
        scores = self.head(embeddings).squeeze(-1)
        check_finite(scores, f"aesthetic scores by {self.name}", "its head is damaged")
        return scores

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """Move CLIP, for example ``to("cpu")`` between shots; returns the scorer itself."""
        self.clip.to(device, dtype)
        return self

    def free(self) -> None:
        """Drop CLIP's weights for good and give accelerator memory back."""
        self.clip.free()


def head_weights(version: str, source: str | None = None) -> Weights:
    """Where the head of ``version`` lies; its default place is ``~/.cache/storymem``."""
    file = _FILES[version]
    return Weights(
        name=f"LAION aesthetic head {version}",
        source=source or str(Path("~/.cache/storymem") / file),
        file=file,
        size_gb=_SIZES_GB[version],
        licence=_LICENCES[version],
        url=_URLS[version],
    )
