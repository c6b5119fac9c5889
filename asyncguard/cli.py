"""The command ``asyncguard``: serve an application guarded, or see the demonstration.

The commands themselves need uvicorn, which is optional; this module only says so where it is missing.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; ends the process with exit code 2 if it cannot be carried out."""
    try:
        from asyncguard._commands import commands
    except ModuleNotFoundError as error:
        if error.name not in ("click", "uvicorn"):
            raise
        print(
            "asyncguard: the command needs uvicorn, which is not installed: "
            "pip install 'asyncguard[uvicorn]'",
            file=sys.stderr,
        )
        sys.exit(2)
    commands(prog_name="asyncguard")
