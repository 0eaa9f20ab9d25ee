"""Turn captioned videos into a training set: ``python scripts/prepare_data.py videos=FOLDER output=FOLDER``."""

from omegaconf import DictConfig, OmegaConf

from storymem.commands.cli import run_script
from storymem.data.prepare import prepare
from storymem.data.settings import PrepareSettings


def main(config: DictConfig) -> None:
    cache = prepare(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    if cache is not None:
        print(cache.folder)


if __name__ == "__main__":
    run_script(main, config_name="prepare_data", settings=PrepareSettings)
