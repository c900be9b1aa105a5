"""``isthmus demo``: two isolated neighbours at work.

`sandbox` makes the neighbours, `server` and `client` are the programs inside them, `command` conducts.
"""

from __future__ import annotations

from isthmus.demo.command import main

__all__ = ["main"]
