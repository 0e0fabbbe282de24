"""``python -m mue`` is the command ``mue``."""

from mue.cli import main

if __name__ == "__main__":
    main()
