"""Generate a film from a story: the same as ``storymem generate``."""

try:
    from storymem.commands.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run `source .venv/bin/activate` first (`make install` creates it)") from None

if __name__ == "__main__":
    main("generate")
