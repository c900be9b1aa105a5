"""Write docs/reference/programs.md: the programs that tests run under `isthmus run` and over adapters.

    python scripts/compatibility.py            writes the page
    python scripts/compatibility.py --check    says whether the page names what the tests name

A test says what it proves by a mark: ``@pytest.mark.program(name, version, tier, what)``, where `version` is
the command that prints the program's, or the name of a Python package. Versions are those of the machine on
which the page was written.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "programs.md"

HEAD = """# Programs and libraries that are tested

Written by `scripts/compatibility.py` from the tests; each row is a test that runs the real thing. The
versions are those of the machine on which this page was written. How to run them:
[unmodified programs](../howto/run.md), [libraries](../howto/libraries.md).

| What | Version | By | What is tested |
| --- | --- | --- | --- |
"""

Row = tuple[str, str, str, str]


class _Collector:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("program"):
                if mark.args not in self.rows:
                    self.rows.append(mark.args)


def rows() -> list[Row]:
    """What the tests name, by name: (name, version, tier, what)."""
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-m", "", str(ROOT / "tests")], plugins=[collector])
    return sorted(collector.rows, key=lambda row: row[0].lower())


def version(words: str) -> str:
    """The version that a command prints, or that a Python package has."""
    if " " not in words:
        try:
            return version_of(words)
        except PackageNotFoundError:
            return "not here"
    try:
        done = subprocess.run(shlex.split(words), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not here"
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "?"


def main() -> int:
    found = rows()
    if "--check" in sys.argv[1:]:
        page = PAGE.read_text()
        missing = sorted({name for name, *_ in found if f"| {name} |" not in page})
        if missing:
            print(f"programs: {', '.join(missing)}: not in {PAGE.name}; run scripts/compatibility.py")
        return 1 if missing else 0
    lines = [f"| {name} | {version(words)} | {tier} | {what} |\n" for name, words, tier, what in found]
    PAGE.write_text(HEAD + "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
