"""Where the broker of this user lives, and where its policy lies."""

from __future__ import annotations

import os
from pathlib import Path


def runtime_directory() -> Path:
    """ISTHMUS_DIR, else /run/isthmus for root, else the user's runtime directory, else the user's cache."""
    if chosen := os.environ.get("ISTHMUS_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/isthmus")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "isthmus"
    return Path.home() / ".cache" / "isthmus" / "run"


def state_directory() -> Path | None:
    """Where a service manager wants state kept, if there is one; else it lies in the runtime directory."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else None


def policy_file() -> Path | None:
    """The policy that is used when none is named, if there is one."""
    if os.geteuid() == 0:
        path = Path("/etc/isthmus/policy.toml")
    else:
        config = os.environ.get("XDG_CONFIG_HOME")
        path = (Path(config) if config else Path.home() / ".config") / "isthmus" / "policy.toml"
    return path if path.exists() else None
