"""Train a memory adapter: ``python scripts/train.py experiment=NAME dataset=FOLDER [key=value ...]``."""

from omegaconf import DictConfig, OmegaConf

from storymem.cli import run_script
from storymem.settings import TrainSettings
from storymem.train import train


def main(config: DictConfig) -> None:
    train(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    run_script(main, config_name="train", settings=TrainSettings)
