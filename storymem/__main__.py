"""``python -m storymem``, for ``torchrun -m storymem``: the console command."""

from storymem.commands.cli import main

if __name__ == "__main__":
    main()
