"""Embeddings that a training set does not hold, such as those of joint captions: computed once for a run.

``prepare`` cannot know them, since they depend on the objective. They are computed before the experts are loaded, and
stored in the run's folder, where a resumed run reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem.data.cache import LatentCache, blank_key, text_key
from storymem.data.encoding import encode_text
from storymem.io import replacing
from storymem.training.resume import ENCODINGS
from storymem.wan.loading import load_pipeline
from storymem.wan.runtime import release_memory
from storymem.wan.settings import ModelSettings, RuntimeSettings

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective needs beside what a training set holds.

    Args:
        texts: to be encoded, each with the tokens that are read of it.
        blanks: sizes of blank videos to be encoded.
    """

    texts: Mapping[str, int] = field(default_factory=dict)
    blanks: frozenset[Size] = frozenset()


class Encodings:
    """The embeddings and latents of a run beside those of its training set; read by several threads."""

    def __init__(self, path: Path | None, latents: LatentCache) -> None:
        self._latents, self._file = latents, None if path is None else safe_open(path, framework="pt")

    def text(self, text: str, length: int) -> Tensor:
        """Prompt embeds [length, D], zeros after the text's end."""
        rows = (self._latents.empty_text() if text == "" else self._tensor(text_key(text)))[:length]
        return torch.cat([rows, rows.new_zeros(length - len(rows), rows.shape[1])])

    def blank(self, size: Size) -> Tensor:
        """Normalised latents [z, T, h, w] of a blank video."""
        return self._tensor(blank_key(size))

    def _tensor(self, key: str) -> Tensor:
        assert self._file is not None
        return self._file.get_tensor(key).float()


def encode(needs: Needs, folder: Path, model: ModelSettings, latents: LatentCache) -> None:
    """Compute what is needed and not yet in ``folder``; one process does this, before the experts are loaded.

    Raises:
        NotFiniteError: for NaN or infinity from the text encoder, with the text.
    """
    stated = {name: latents.fingerprint[name] for name in ("vae", "text_encoder")}
    path, found = folder / ENCODINGS, dict[str, Tensor]()
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            found = load_file(path) if file.metadata() == stated else {}
    texts = {text: length for text, length in needs.texts.items() if text and text_key(text) not in found}
    blanks = [size for size in sorted(needs.blanks) if blank_key(size) not in found]
    if not (texts or blanks):
        return
    print(f"encoding {len(texts)} texts that the training set does not hold", file=sys.stderr)
    pipe = load_pipeline(model, runtime=RuntimeSettings(device="cpu"), text_encoder=bool(texts), experts=False)
    too_long = 0
    with torch.no_grad():
        for text, length in sorted(texts.items()):
            encoded, tokens = encode_text(pipe, text, length)
            found[text_key(text)] = encoded["embeds"].contiguous()
            too_long += tokens > length
        for frames, height, width in blanks:
            blank = pipe._video_latents(None, frames, height, width)
            found[blank_key((frames, height, width))] = blank[0].contiguous()
    del pipe
    release_memory()
    if too_long:
        print(f"{too_long} of {len(texts)} texts are longer than what is read of them and are cut", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(found, partial, metadata=stated)
