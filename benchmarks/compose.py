"""Configurations for benchmarks, composed as the scripts compose them."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from storymem.commands.cli import CONFIGS


def composed(name: str, overrides: list[str]) -> dict[str, Any]:
    """``configs/<name>.yaml`` with overrides, as plain containers."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(name, overrides), resolve=True)  # type: ignore[return-value]
