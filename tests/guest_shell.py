"""Runs in a guest: starts programs, tells their lines and exit codes. One JSON object a line, both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

lock = threading.Lock()
running: dict[int, subprocess.Popen[str]] = {}


def tell(**what: Any) -> None:
    with lock:
        os.write(1, json.dumps(what).encode() + b"\n")


def follow(number: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        tell(number=number, line=line.rstrip("\n"))
    tell(number=number, exit=process.wait())


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if "run" in asked:
            process = subprocess.Popen(
                asked["run"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **asked["environment"]},
            )
            running[asked["number"]] = process
            threading.Thread(target=follow, args=(asked["number"], process), daemon=True).start()
        elif "kill" in asked:
            running[asked["kill"]].send_signal(asked["signal"])


main()
