"""Measure a model at true size with random weights: the same as ``storymem benchmark``."""

try:
    from storymem.commands.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run `source .venv/bin/activate` first (`make install` creates it)") from None

if __name__ == "__main__":
    main("benchmark")
