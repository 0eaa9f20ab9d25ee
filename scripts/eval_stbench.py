"""Score films, or the films of a method, on ST-Bench: the same as ``storymem evaluate``."""

try:
    from storymem.commands.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run `source .venv/bin/activate` first (`make install` creates it)") from None

if __name__ == "__main__":
    main("evaluate")
