"""Keyframes: images with their origin, and the embedding of frames."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from storymem.io import NotFiniteError, check_finite

if TYPE_CHECKING:
    import torch

EmbedFrames = Callable[[np.ndarray], np.ndarray]
"""An image encoder: frames, uint8 [F, H, W, 3] -> embeddings, float [F, D]."""

ID_PATTERN = r"\w[\w.-]*"


@dataclass(frozen=True, kw_only=True, eq=False)
class Keyframe:
    """An image in the memory.

    Args:
        id: unique in its bank, and part of file names: letters, digits, ``_``, ``-`` and ``.``. See :func:`frame_id`
            and :func:`reference_id`.
        image: uint8 [H, W, 3], RGB; copied, so that a keyframe does not keep its whole shot in RAM.
        embedding: float32 [D], L2-normalised.
        shot: the shot (from 1) that it was taken from or added for; None for references of the story.
        frame: its place in that shot, from 1; None for images that are no frame of a shot.
        source: path of a reference image as the story gives it.
        character: who is shown, for a character's reference image and a frame of a shot with one character.
        quality: its score, if it was scored.
        similarity: highest cosine to the bank when it was added; None if the bank was empty.
        pinned: whether every shot that knows it recalls it.
        latent: [z, 1, h, w], the image encoded alone by the VAE; None until it is first recalled.
    """

    id: str
    image: np.ndarray
    embedding: np.ndarray
    shot: int | None = None
    frame: int | None = None
    source: str | None = None
    character: str | None = None
    quality: float | None = None
    similarity: float | None = None
    pinned: bool = False
    latent: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(ID_PATTERN, self.id):
            raise ValueError(f"keyframe id {self.id!r}: use letters, digits, '_', '-' and '.' only")
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[-1] != 3:
            raise ValueError(f"keyframe {self.id}: image must be uint8 [H, W, 3], is {_describe(self.image)}")
        if self.embedding.dtype != np.float32 or self.embedding.ndim != 1:
            raise ValueError(f"keyframe {self.id}: embedding must be float32 [D], is {_describe(self.embedding)}")
        if self.latent is not None:
            if self.latent.ndim != 4 or self.latent.shape[1] != 1:
                raise ValueError(f"keyframe {self.id}: latent must be [z, 1, h, w], is {list(self.latent.shape)}")
            check_finite(self.latent, f"the latent of keyframe {self.id}", "check the VAE's weights and precision")
        object.__setattr__(self, "image", self.image.copy())
        object.__setattr__(self, "embedding", self.embedding.copy())

    @property
    def is_users(self) -> bool:
        """Whether the user added it to the memory: it is neither a frame of a shot nor a reference of the story."""
        return self.frame is None and self.source is None

    @cached_property
    def sha256(self) -> str:
        """See :func:`image_hash`."""
        return image_hash(self.image)


def frame_id(shot: int, frame: int, taken: Container[str] = ()) -> str:
    """The id of a frame of a shot, both from 1: ``shot02_frame013``, or ``shot02_frame013_2`` if that is taken."""
    return unused_id(f"shot{shot:02d}_frame{frame:03d}", taken)


def reference_id(name: str, taken: Container[str] = ()) -> str:
    """The id of a reference image: the first of ``ref_tam_1``, ``ref_tam_2``, ... for "Tam" that is not taken."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", name).lower())
    stem = "_".join(["ref", *words])[:40]
    return next(id for number in count(1) if (id := f"{stem}_{number}") not in taken)


def unused_id(id: str, taken: Container[str]) -> str:
    """``id``, or the first of ``id_2``, ``id_3``, ... that is not taken."""
    return id if id not in taken else next(new for number in count(2) if (new := f"{id}_{number}") not in taken)


def image_hash(image: np.ndarray) -> str:
    """sha256 of the size and the RGB values of an image, uint8 [H, W, 3]."""
    return hashlib.sha256(f"{image.shape[0]}x{image.shape[1]} ".encode() + image.tobytes()).hexdigest()


def embed_in_batches(frames: np.ndarray, embed: EmbedFrames, batch_size: int = 32) -> np.ndarray:
    """Embed each of the frames, uint8 [F, H, W, 3], once: float32 [F, D], L2-normalised.

    Raises:
        ValueError: for frames of another type or shape.
        NotFiniteError: for an embedding that is zero or not finite.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F > 0, are {_describe(frames)}")
    batches = [embed(frames[start : start + batch_size]) for start in range(0, len(frames), batch_size)]
    embeddings = np.concatenate([np.asarray(batch, dtype=np.float32) for batch in batches])
    assert embeddings.shape[:-1] == (len(frames),), f"embed returned {embeddings.shape} for {len(frames)} frames"
    return normalised(embeddings)


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """The rows of [N, D] at unit length, float32. ``NotFiniteError`` for a row that is zero or not finite."""
    rows = np.asarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
        raise NotFiniteError(f"embeddings of rows {bad} are zero or not finite: check the encoder's weights")
    return rows / lengths


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
