"""Names of methods: what ``methods=[a,b]`` and ``method=NAME experiment=...`` stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig

from storymem.composition import composed
from storymem.config import CONFIGS, nearest

_PRIMARY = "eval_stbench"
_BENCHMARK = "stbench"  # these experiments specify what is compared; all others, how films are made


def of_command(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of this run, with the name of its method; ``method=NAME`` replaces an experiment's methods."""
    given = {_key(text) for text in HydraConfig.get().overrides.task}
    methods = () if "method" in given and "methods" not in given else config["methods"]
    return {**config, "methods": methods, "label": config.get("label") or chosen_name()}


def chosen_name() -> str | None:
    """The name of this run's method: the experiment that changes it, or its file in ``configs/method``."""
    experiments = [name for name in _experiments(HydraConfig.get().overrides.task) if not name.startswith(_BENCHMARK)]
    return experiments[-1] if experiments else HydraConfig.get().runtime.choices.get("method")


def with_method(name: str) -> dict[str, Any]:
    """The configuration of this run with the method or ablation ``name`` instead of its own."""
    return compose_with_method(name, HydraConfig.get().overrides.task)


def compose_with_method(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """``eval_stbench.yaml`` with ``overrides`` and the method ``name``.

    Args:
        name: of a file ``configs/method/NAME.yaml``, or ``configs/experiment/ablation_*.yaml``: StoryMem under that
            experiment.
        overrides: of the command line; other methods and experiments among them are dropped, except ``stbench_*``.

    Raises:
        ValueError: if there is no such file.
    """
    files = CONFIGS.glob("method/*.yaml"), CONFIGS.glob("experiment/ablation_*.yaml")
    methods, ablations = (sorted(path.stem for path in group) for group in files)
    if name not in (*methods, *ablations):
        raise ValueError(f"methods: there is no {name!r}{nearest(name, [*methods, *ablations])}")
    experiments = [chosen for chosen in _experiments(overrides) if chosen.startswith(_BENCHMARK)]
    experiments += [name] if name in ablations else []
    wanted = [text for text in overrides if _key(text) not in ("method", "experiment", "methods")]
    wanted.append(f"method={name if name in methods else 'storymem'}")
    wanted += [f"experiment=[{','.join(experiments)}]"] if experiments else []
    return composed(_PRIMARY, wanted)


def _experiments(overrides: Sequence[str]) -> list[str]:
    """The names after ``experiment=``, one or a list."""
    texts = [text.split("=", 1)[1] for text in overrides if _key(text) == "experiment"]
    names = [name.strip(" '\"") for text in texts for name in text.strip("[]").split(",")]
    return [name for name in names if name not in ("", "null")]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")
