"""``python -m asyncguard`` is the command ``asyncguard``."""

from asyncguard.cli import main

if __name__ == "__main__":
    main()
