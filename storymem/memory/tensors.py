"""The tensors of a keyframe on disk: its embedding, and its latent once there is one. Loads torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from storymem.io import FileError, check_finite, check_regular
from storymem.memory.keyframes import Keyframe

_NOTE = "storymem"  # metadata: the sha256 of the tensors, and the bank's `made_with`
EMBED_AGAIN = "delete the sha256 of its entry in memory.json, and the image is embedded again"


def tensors_of(keyframe: Keyframe, made_with: str | None) -> bytes:
    """The content of the file; ``made_with`` identifies the networks behind the tensors."""
    tensors = {"embedding": torch.from_numpy(keyframe.embedding)}
    if keyframe.latent is not None:
        tensors["latent"] = keyframe.latent.detach().cpu().contiguous()
    return save(tensors, {_NOTE: f"{_digest(tensors)} {made_with or ''}"})


def read_tensors(path: Path, made_with: str | None) -> dict[str, torch.Tensor]:
    """Embedding and latent; none if other networks than ``made_with`` made them. ``FileError`` for a damaged file."""
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            digest, _, made_by = (file.metadata() or {}).get(_NOTE, "").partition(" ")
            if made_with and made_by not in ("", made_with):
                return {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in ("embedding", "latent")}  # noqa: SIM118
    except FileNotFoundError:
        raise FileError(f"{path} is missing: put it back, or {EMBED_AGAIN}") from None
    except SafetensorError as error:
        raise FileError(f"{path} is corrupt ({error}): {EMBED_AGAIN}") from None
    if digest not in ("", _digest(tensors)):
        raise FileError(f"{path} is damaged: {EMBED_AGAIN}")
    embedding, latent = tensors.get("embedding"), tensors.get("latent")
    if embedding is None or embedding.ndim != 1 or embedding.dtype != torch.float32:
        raise FileError(f"{path} holds no embedding: {EMBED_AGAIN}")
    if latent is not None and (latent.ndim != 4 or not latent.is_floating_point()):
        raise FileError(f"{path} holds a latent of another shape, {list(latent.shape)}: {EMBED_AGAIN}")
    for name, tensor in tensors.items():
        check_finite(tensor, f"the {name} in {path}", EMBED_AGAIN)
    return tensors


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    contents = (tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(contents)).hexdigest()
