"""Score films, or films of a method, on ST-Bench: ``python scripts/eval_stbench.py films=FOLDER [key=value ...]``."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from storymem.commands.cli import run_script
from storymem.evaluation.choosing import experiment_chosen, with_method
from storymem.evaluation.stbench import EvaluateSettings, evaluate


def main(config: DictConfig) -> None:
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    evaluate({"label": experiment_chosen(), **plain}, with_method)


if __name__ == "__main__":
    run_script(main, config_name="eval_stbench", settings=EvaluateSettings)
