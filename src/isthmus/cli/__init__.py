"""The command line, `isthmus`. The commands are in `app`; they need the extra ``isthmus[cli]``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `isthmus` script."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich", "tomli"):
            raise
        print(f"isthmus: {error.name} is not installed; pip install 'isthmus[cli]'", file=sys.stderr)
        sys.exit(1)
    run()
