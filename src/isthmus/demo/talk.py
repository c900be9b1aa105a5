"""What the two programs of the demo say to whoever conducts it, and how they check what they move."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

__all__ = ["ARRAY_PORT", "FILE_PORT", "HTTP_PORT", "digest", "tell"]

HTTP_PORT = 8000
FILE_PORT = 9000
ARRAY_PORT = 9001


def tell(event: str, **fields: Any) -> None:
    """Print one event, a JSON object on a line of standard output."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def digest() -> Any:
    """The hash that both sides compare."""
    return hashlib.sha256()
