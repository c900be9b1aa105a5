"""What cargo knows about this workspace, for the checks that ask."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def load_metadata() -> dict[str, Any]:
    """Return ``cargo metadata`` for the platform this runs on, so that nothing but what is built is fetched.

    Raises
    ------
    SystemExit
        Cargo failed, most likely because Cargo.lock is behind a Cargo.toml. Its own words are on stderr.
    """
    host = _ask("rustc", "--print=host-tuple").strip()
    answer = _ask("cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={host}")
    metadata: dict[str, Any] = json.loads(answer)
    return metadata


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    except FileNotFoundError:
        raise SystemExit(f"{command[0]}: not found; scripts/bootstrap.sh says what to install") from None
    except subprocess.CalledProcessError as error:
        status = error.returncode
        raise SystemExit(f"{' '.join(command)}: exit status {status}; its own words are above") from None
