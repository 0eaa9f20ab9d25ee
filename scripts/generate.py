"""Turn a story into a film: ``python scripts/generate.py story.yaml [key=value ...]``."""

from omegaconf import DictConfig, OmegaConf

from storymem.commands.cli import run_script
from storymem.film.generate import generate
from storymem.film.settings import GenerateSettings


def main(config: DictConfig) -> None:
    generate(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    run_script(main, config_name="generate", positional="story", settings=GenerateSettings)
