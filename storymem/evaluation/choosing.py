"""The same command with another method: what ``methods=[a,b]`` stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from storymem.config import CONFIGS, nearest

_PRIMARY = "eval_stbench"
_BENCHMARK = "stbench"  # experiments called so say what is compared; all others, how films are made


def experiment_chosen() -> str | None:
    """The experiment of this run, if there is one: a method under other settings goes by its name."""
    chosen = [name for name in experiments_among(HydraConfig.get().overrides.task) if not name.startswith(_BENCHMARK)]
    return chosen[-1] if chosen else None


def with_method(name: str) -> dict[str, Any]:
    """The configuration of this run with the method or ablation called ``name`` in place of its own."""
    return compose_with_method(name, HydraConfig.get().overrides.task)


def compose_with_method(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """``eval_stbench.yaml`` with ``overrides``, ``configs/method/<name>.yaml`` or, with StoryMem as the method,
    ``configs/experiment/<name>.yaml``.

    Of experiments among the overrides, only those that say what is compared (``stbench_*``) are kept.

    Raises:
        ValueError: if there is neither.
    """
    known = {
        group: sorted(path.stem for path in (CONFIGS / group).glob(pattern))
        for group, pattern in (("method", "*.yaml"), ("experiment", "ablation_*.yaml"))
    }
    experiments = [chosen for chosen in experiments_among(overrides) if chosen.startswith(_BENCHMARK)]
    if name in known["method"]:
        chosen = [f"method={name}"]
    elif name in known["experiment"]:
        chosen = ["method=storymem"]
        experiments.append(name)
    else:
        raise ValueError(f"methods: there is no {name!r}{nearest(name, [*known['method'], *known['experiment']])}")
    chosen += [f"experiment=[{','.join(experiments)}]"] if experiments else []
    kept = [text for text in overrides if _key(text) not in ("method", "experiment", "methods")]
    if GlobalHydra.instance().is_initialized():  # inside a run
        config = compose(_PRIMARY, overrides=[*kept, *chosen])
    else:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(_PRIMARY, overrides=[*kept, *chosen])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def experiments_among(overrides: Sequence[str]) -> list[str]:
    """Names after ``experiment=``, one or a list."""
    said = [text.split("=", 1)[1] for text in overrides if _key(text) == "experiment"]
    names = [name.strip(" '\"") for text in said for name in text.strip("[]").split(",")]
    return [name for name in names if name not in ("", "null")]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")
