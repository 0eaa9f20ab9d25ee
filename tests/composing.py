"""Composes the project's configuration as the scripts do."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from storymem.cli import CONFIGS
from storymem.config import build_settings
from storymem.settings import GenerateSettings


def composed(*overrides: str, name: str = "generate") -> dict[str, Any]:
    """The configuration ``configs/<name>.yaml`` with overrides, as plain containers."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def generate_settings(*overrides: str, story: str = "story.yaml") -> GenerateSettings:
    """The settings that ``scripts/generate.py story overrides...`` gives."""
    return build_settings(GenerateSettings, composed(f"story={story}", *overrides))
