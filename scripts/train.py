"""Train a memory adapter: the same as ``storymem train``."""

try:
    from storymem.commands.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run `source .venv/bin/activate` first (`make install` creates it)") from None

if __name__ == "__main__":
    main("train")
