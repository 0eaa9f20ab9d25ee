"""Train a memory adapter: ``python scripts/train.py experiment=NAME dataset=FOLDER [key=value ...]``."""

from omegaconf import DictConfig, OmegaConf

from storymem.commands.cli import run_script
from storymem.training.run import train
from storymem.training.run_settings import TrainSettings


def main(config: DictConfig) -> None:
    train(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    run_script(main, config_name="train", settings=TrainSettings)
