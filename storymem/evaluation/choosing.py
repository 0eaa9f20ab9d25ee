"""The same command with another method: what ``methods=[a,b]`` stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from storymem.cli import CONFIGS
from storymem.config import nearest

_PRIMARY = "eval_stbench"


def experiment_chosen() -> str | None:
    """The experiment of this run, if there is one: a method under other settings goes by its name."""
    return HydraConfig.get().runtime.choices.get("experiment")


def with_method(name: str) -> dict[str, Any]:
    """The configuration of this run with the method or ablation called ``name`` in place of its own."""
    return compose_with_method(name, HydraConfig.get().overrides.task)


def compose_with_method(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """``eval_stbench.yaml`` with ``overrides``, ``configs/method/<name>.yaml`` or, with StoryMem as the method,
    ``configs/experiment/<name>.yaml``.

    Raises:
        ValueError: if there is neither.
    """
    known = {
        group: sorted(path.stem for path in (CONFIGS / group).glob(pattern))
        for group, pattern in (("method", "*.yaml"), ("experiment", "ablation_*.yaml"))
    }
    if name in known["method"]:
        chosen = [f"method={name}"]
    elif name in known["experiment"]:
        chosen = ["method=storymem", f"experiment={name}"]
    else:
        raise ValueError(f"methods: there is no {name!r}{nearest(name, [*known['method'], *known['experiment']])}")
    kept = [text for text in overrides if text.split("=", 1)[0].lstrip("+") not in ("method", "experiment", "methods")]
    if GlobalHydra.instance().is_initialized():  # inside a run
        config = compose(_PRIMARY, overrides=[*kept, *chosen])
    else:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(_PRIMARY, overrides=[*kept, *chosen])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
