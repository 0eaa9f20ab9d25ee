"""Keyframes: pictures worth remembering, with where they came from, and how frames are embedded."""

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
"""Frames, uint8 [F, H, W, 3] -> embeddings, float [F, D]: an image encoder seen from the memory's side."""

ID_PATTERN = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True, eq=False)
class Keyframe:
    """One remembered picture.

    Args:
        id: unique in its bank and part of file names: letters, digits, ``_``, ``-`` and ``.``. See
            :meth:`of_shot` and :func:`reference_id` for the usual ones.
        image: uint8 [H, W, 3], RGB. Copied, so that a keyframe does not keep its whole shot in memory.
        embedding: float32 [D], L2-normalised.
        shot: the shot (counted from 0) that it was taken from or added for; ``None`` for references of the
            story.
        frame: its index in that shot; ``None`` for reference images.
        source: path of the reference image as the story gave it; ``None`` for frames of a shot.
        character: whom it shows, for a reference image of a character and a frame of a shot with one character.
        quality: the quality scorer's verdict, if one was asked.
        similarity: highest cosine to what the bank held when it was added; ``None`` if that was nothing.
        latent: [z, 1, h, w], the picture encoded alone by the VAE, once that is done.
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
    latent: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not ID_PATTERN.fullmatch(self.id):
            raise ValueError(f"keyframe id {self.id!r}: use letters, digits, '_', '-' and '.' only")
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[-1] != 3:
            raise ValueError(f"keyframe {self.id}: image must be uint8 [H, W, 3], is {_describe(self.image)}")
        if self.embedding.dtype != np.float32 or self.embedding.ndim != 1:
            raise ValueError(f"keyframe {self.id}: embedding must be float32 [D], is {_describe(self.embedding)}")
        if self.latent is not None and (self.latent.ndim != 4 or self.latent.shape[1] != 1):
            raise ValueError(f"keyframe {self.id}: latent must be [C, 1, h, w], is {list(self.latent.shape)}")
        if self.latent is not None:
            check_finite(self.latent, f"the latent of keyframe {self.id}", "check the VAE's weights and precision")
        object.__setattr__(self, "image", self.image.copy())
        object.__setattr__(self, "embedding", self.embedding.copy())

    @property
    def is_by_hand(self) -> bool:
        """Whether a person added it: it is neither a frame of a shot nor a reference of the story."""
        return self.frame is None and self.source is None

    @cached_property
    def sha256(self) -> str:
        """Of the picture; see :func:`picture_hash`."""
        return picture_hash(self.image)

    @classmethod
    def of_shot(
        cls,
        shot: int,
        frame: int,
        *,
        image: np.ndarray,
        embedding: np.ndarray,
        quality: float | None = None,
        similarity: float | None = None,
        character: str | None = None,
        taken: Container[str] = (),
    ) -> Keyframe:
        """A frame of a generated shot. Its id is ``s003_f012``: shot 3 and frame 12, both counted from 0.

        If that is among ``taken``, it is ``s003_f012_2`` or the next number that is free.
        """
        return cls(
            id=unused_id(f"s{shot:03d}_f{frame:03d}", taken),
            image=image,
            embedding=embedding,
            shot=shot,
            frame=frame,
            quality=quality,
            similarity=similarity,
            character=character,
        )


def reference_id(name: str, taken: Container[str] = ()) -> str:
    """Id of a reference image: ``ref_tam_1``, ``ref_tam_2``, ... for the name "Tam".

    Args:
        name: the character's name, or the file's name without suffix.
        taken: ids in use (a :class:`~storymem.memory.MemoryBank` will do); the first free number is taken.
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", name).lower())
    stem = "_".join(["ref", *words])[:40]
    number = 1
    while f"{stem}_{number}" in taken:
        number += 1
    return f"{stem}_{number}"


def unused_id(id: str, taken: Container[str]) -> str:
    """``id``, or the first of ``id_2``, ``id_3``, ... that is not among ``taken``."""
    return id if id not in taken else next(new for number in count(2) if (new := f"{id}_{number}") not in taken)


def picture_hash(image: np.ndarray) -> str:
    """sha256 of the size and the RGB values of a picture, uint8 [H, W, 3]."""
    return hashlib.sha256(f"{image.shape[0]}x{image.shape[1]} ".encode() + image.tobytes()).hexdigest()


def embed_in_batches(frames: np.ndarray, embed: EmbedFrames, batch_size: int = 32) -> np.ndarray:
    """Embed every frame exactly once.

    Args:
        frames: uint8 [F, H, W, 3].
        embed: called with at most ``batch_size`` consecutive frames at a time.

    Returns:
        float32 [F, D], L2-normalised.

    Raises:
        ValueError: if frames are of another type or shape, or an embedding is zero or not finite.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F > 0, are {_describe(frames)}")
    batches = [embed(frames[start : start + batch_size]) for start in range(0, len(frames), batch_size)]
    embeddings = np.concatenate([np.asarray(batch, dtype=np.float32) for batch in batches])
    assert embeddings.shape[:-1] == (len(frames),), f"embed made {embeddings.shape} of {len(frames)} frames"
    return normalised(embeddings)


def normalised(embeddings: np.ndarray) -> np.ndarray:
    """Scale the rows of [N, D] to unit length, as float32. ``ValueError`` for a row that has no direction."""
    rows = np.asarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        raise NotFiniteError(f"embeddings of rows {bad.tolist()} are zero or not finite: check the encoder's weights")
    return rows / lengths


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
