"""Turn captioned videos into a training set: the same as ``storymem prepare``."""

try:
    from storymem.commands.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run `source .venv/bin/activate` first (`make install` creates it)") from None

if __name__ == "__main__":
    main("prepare")
