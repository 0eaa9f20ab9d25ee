"""What latents and text embeddings were made with, in a few hashes that can be compared; loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storymem.data.settings import DataSettings
from storymem.io import hash_json
from storymem.wan.settings import ModelSettings
from storymem.weights import locate, sample_hash


def cache_fingerprint(model: ModelSettings, data: DataSettings) -> dict[str, str]:
    """What a cache depends on: ``vae``, ``text_encoder`` and ``size``.

    Published weights count by their files, random ones by their configuration and seed. The dtype in which networks
    run does not count: it changes latents by rounding only.

    Raises:
        MissingWeights: if the model's weights are not on this machine.
    """
    network = model.network
    if model.weights is None:
        vae = _hash_of({"config": network.vae, "seed": model.seed})
        text = _hash_of({"config": network.text_encoder, "seed": model.seed})
    else:
        folder = locate(model.weights)
        vae = sample_hash(folder / "vae")
        text = sample_hash(folder / "text_encoder", folder / "tokenizer")
    return {
        "vae": vae,
        "text_encoder": f"{text}, {network.text_tokens} tokens",
        "size": ", ".join(sorted(str(bucket) for bucket in data.buckets)) + f" at {data.fps:g} fps",
    }


def fingerprint_name(fingerprint: Mapping[str, str]) -> str:
    """A folder's name for it."""
    return _hash_of(dict(fingerprint))


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line per entry of ``wanted`` that ``found`` has otherwise or not at all."""
    return [
        f"another {name.replace('_', ' ')} ({found.get(name, 'unknown')}, not {value})"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _hash_of(content: Mapping[str, Any]) -> str:
    return hash_json(content)[:12]
