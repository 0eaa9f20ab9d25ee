"""Embeddings that a training set does not hold, such as those of joint captions: computed once for a run.

``prepare`` cannot know them, since they depend on the objective. They are computed before the experts are loaded, and
stored in the run's folder, where a resumed run reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storymem.data.cache import LatentCache, blank_key, text_key
from storymem.data.texts import encode_text
from storymem.io import FileError, hash_json, replacing
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
        texts: to be encoded, each with the tokens that are read of it; the training set holds the empty text.
        blanks: sizes of blank videos to be encoded.
    """

    texts: Mapping[str, int] = field(default_factory=dict)
    blanks: frozenset[Size] = frozenset()


class Encodings:
    """The embeddings and latents in a run's folder beside those of its training set; read by several threads."""

    def __init__(self, folder: Path, latents: LatentCache) -> None:
        self._latents, self._files = latents, _found(folder, latents)

    def text(self, text: str, length: int) -> Tensor:
        """Prompt embeds [length, D], zeros after the text's end."""
        rows = (self._latents.empty_text() if text == "" else self._tensor(text_key(text)))[:length]
        return torch.cat([rows, rows.new_zeros(length - len(rows), rows.shape[1])])

    def blank(self, size: Size) -> Tensor:
        """Normalised latents [z, T, h, w] of a blank video."""
        return self._tensor(blank_key(size))

    def _tensor(self, key: str) -> Tensor:
        return self._files[key].get_tensor(key).float()


def encode(
    needs: Needs, folder: Path, model: ModelSettings, latents: LatentCache, accelerator: Accelerator
) -> Encodings:
    """Compute what is needed and not yet in ``folder``, before the experts are loaded; processes share the work.

    Raises:
        FileError: at all processes for what fails at one, such as NaN or infinity from the text encoder.
    """
    fault = None
    try:
        _encode_share(needs, folder, model, latents, accelerator)
    except (ValueError, OSError) as error:
        fault = str(error)
    if faults := [fault for fault in gather_object([fault]) if fault is not None]:
        raise FileError(faults[0])
    return Encodings(folder, latents)


def _encode_share(
    needs: Needs, folder: Path, model: ModelSettings, latents: LatentCache, accelerator: Accelerator
) -> None:
    """The share of one process, as a file of its own."""
    found = _found(folder, latents)

    def is_mine(key: str) -> bool:  # whatever the others have written meanwhile
        return key not in found and int(hash_json(key), 16) % accelerator.num_processes == accelerator.process_index

    texts = {text: length for text, length in needs.texts.items() if text and is_mine(text_key(text))}
    blanks = [size for size in sorted(needs.blanks) if is_mine(blank_key(size))]
    if not (texts or blanks):
        return
    print(f"encoding {len(texts)} texts that the training set does not hold", file=sys.stderr)
    runtime = RuntimeSettings(device=str(accelerator.device))
    pipe = load_pipeline(model, runtime=runtime, text_encoder=bool(texts), experts=False)
    tensors, too_long = dict[str, Tensor](), 0
    with torch.no_grad():
        for text, length in sorted(texts.items()):
            encoded, tokens = encode_text(pipe, text, length)
            tensors[text_key(text)] = encoded["embeds"].contiguous()
            too_long += tokens > length
        for frames, height, width in blanks:
            blank = pipe.encode_given([], frames, height, width)
            tensors[blank_key((frames, height, width))] = blank[0].cpu().contiguous()
    del pipe
    release_memory()
    if too_long:
        print(f"{too_long} of {len(texts)} texts are longer than what is read of them and are cut", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{ENCODINGS}{hash_json(sorted(tensors))[:12]}.safetensors") as partial:
        save_file(tensors, partial, metadata=_stated(latents))


def _found(folder: Path, latents: LatentCache) -> dict[str, Any]:
    """Key -> the opened file of ``folder`` that has it; files of other networks are left out."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob(f"{ENCODINGS}*.safetensors"))]
    return {key: file for file in files if file.metadata() == _stated(latents) for key in file.keys()}  # noqa: SIM118


def _stated(latents: LatentCache) -> dict[str, str]:
    """The networks that the encodings come from."""
    return {name: latents.fingerprint[name] for name in ("vae", "text_encoder")}
