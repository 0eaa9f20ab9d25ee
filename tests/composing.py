"""Composes the project's configuration as the scripts do."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from typing import Any

from storymem import composition
from storymem.config import build_settings
from storymem.film.settings import GenerateSettings

_PATH = re.compile(
    r"(story|output|films|videos|dataset|stbench\.stories)='?(?=[^']*[A-Za-z])(?=[^']*[./])([^'\[\]{},=$]*)'?"
)


def composed(*overrides: str, name: str = "generate") -> dict[str, Any]:
    """The configuration ``configs/<name>.yaml`` with overrides, as plain containers.

    It takes a tenth of a second, so what was composed once is copied, and folders of a test are filled in afterwards.
    """
    paths = [found for override in overrides if (found := _PATH.fullmatch(override))]
    others = [override for override in overrides if not _PATH.fullmatch(override)]
    made = deepcopy(_composed(name, (*others, *(f"{path[1]}=x" for path in paths))))
    for path in paths:
        *nodes, key = path[1].split(".")
        node = made[nodes[0]] if nodes else made
        node[key] = path[2]
    return made


@cache
def _composed(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return composition.composed(name, overrides)


def generate_settings(*overrides: str, story: str = "story.yaml") -> GenerateSettings:
    """The settings that ``scripts/generate.py story overrides...`` gives."""
    return build_settings(GenerateSettings, composed(f"story={story}", *overrides))


TINY = (
    *("model=tiny", "runtime=cpu", "sampler.steps=1", "sampler.guidance=1"),
    "model.video={height: 32, width: 48, frames: 9, fps: 8}",
    "model.network.transformer={num_layers: 1, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 32}",
    *("model.network.vae.dim_mult=[1,1,2,2]", "model.network.text_tokens=16"),
)
"""The smallest model."""
SMALL = (*TINY, "memory/selector=uniform", "memory.selector.max_keyframes=2")
"""The smallest film that the command makes, of shots that leave two keyframes each."""
