"""Run the code blocks of README.md and docs/, because an example that does not run is fiction.

    python scripts/check_docs.py [PAGE ...]        every page when none is named

A block runs when its fence says ``python`` or ``sh``::

    ```python              runs; the python blocks of one page share their names
    ```sh                  runs in its own `bash -euo pipefail`
    ```sh containers       runs; the page is skipped, with the reason, where bubblewrap can make no containers
    ```sh needs=nginx      runs; the page is skipped, with the reason, where there is no such program
    ```sh no-run           is only shown

Around each page there is a broker of its own with the domains `web` and `client`. The page's directory shows
its policy file as ``policy.toml``, empty at first, and its doors in ``doors``. The ``sh`` blocks are its
operator's: ``ISTHMUS_DIR`` is set. The ``python`` blocks are a program of the domain `web`: so is
``ISTHMUS_DOOR``.

The blocks of one page run top to bottom, in a process of their own, in an empty directory that is removed
afterwards. They may leave nothing running. The first block that fails ends the page, and a Python traceback
shows the page's own line numbers. A block that would be passed over because of a typing mistake (an unclosed
fence, ``bash`` instead of ``sh``) is a fault too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.demo import sandbox
from isthmus.testing import PrivateBroker

ROOT = Path(__file__).resolve().parent.parent

#: Longest that one page may take.
PAGE_TIMEOUT_S = 100

LANGUAGES = ("python", "sh")
NO_RUN = "no-run"
CONTAINERS = "containers"
NEEDS = "needs="
FLAGS = (NO_RUN, CONTAINERS)

#: Domains that every page finds; the first is that of its ``python`` blocks.
DOMAINS = ("web", "client")
DOOR = "ISTHMUS_DOOR"

#: Names for the same two languages that would make a block look checked when it is not.
MISSPELT = {"bash": "sh", "shell": "sh", "zsh": "sh", "py": "python", "python3": "python", "pycon": "python"}

FENCE = re.compile(r"(?P<indent> *)(?P<mark>`{3,}|~{3,})(?P<info>.*)")


class PageFault(Exception):
    """A page cannot be read, or one of its blocks failed. The message names the page and the line."""


class PageSkipped(Exception):
    """A page needs what this machine does not have. The message names the page and the reason."""


@dataclass(frozen=True)
class Block:
    """One fenced block that is to run."""

    language: str
    code: str
    #: Line of the page on which `code` begins, counted from 1.
    line: int
    #: It makes containers.
    containers: bool = False
    #: Programs that it runs.
    needs: tuple[str, ...] = ()


@contextmanager
def environment(directory: Path) -> Iterator[dict[str, str]]:
    """Give the environment variables that the blocks of one page run with, in `directory`.

    Entered before the first block of a page and left after the last, so the broker lives as long as the page.
    """
    with PrivateBroker(DOMAINS, policy="") as broker:
        (directory / "policy.toml").symlink_to(broker.policy_file)
        (directory / "doors").symlink_to(broker.directory / "doors")
        variables = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
        variables["ISTHMUS_DIR"] = str(broker.directory)
        variables[DOOR] = broker.door(DOMAINS[0])
        yield variables


def pages() -> list[Path]:
    """Return the pages whose blocks run: the README and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of `page` that are to run, top to bottom.

    Raises
    ------
    PageFault
        A fence is not closed, or names a language in a way that would keep its block from running unnoticed.
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    opened_at = 0
    body: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.fullmatch(line)
        if opened is None:
            # A backquote in the info string makes it inline code (CommonMark, 4.5).
            if fence and not (fence["mark"][0] == "`" and "`" in fence["info"]):
                opened, opened_at, body = fence, number, []
        elif fence and fence["mark"].startswith(opened["mark"]) and not fence["info"].strip():
            language, *flags = opened["info"].split() or [""]
            where = f"{_shown(page)}:{opened_at}"
            if language in MISSPELT:
                raise PageFault(f"{where}: write {MISSPELT[language]!r}, not {language!r}; then it runs")
            if language in LANGUAGES:
                needs = tuple(flag.removeprefix(NEEDS) for flag in flags if flag.startswith(NEEDS))
                if unknown := [f for f in flags if f not in FLAGS and not f.startswith(NEEDS)]:
                    known = ", ".join((*FLAGS, f"{NEEDS}PROGRAM"))
                    raise PageFault(f"{where}: {unknown[0]!r} is not a flag; there are {known}")
                if NO_RUN not in flags:
                    code = "\n".join(body) + "\n"
                    found.append(Block(language, code, opened_at + 1, CONTAINERS in flags, needs))
            opened = None
        else:
            # Inside a list the whole block is indented as its fence is.
            body.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise PageFault(f"{_shown(page)}:{opened_at}: this block is never closed")
    return found


def run_page(page: Path) -> int:
    """Run the blocks of `page` and return how many there were.

    Raises
    ------
    PageFault
        The page could not be read, a block failed, or the page took longer than `PAGE_TIMEOUT_S`. The message
        ends with everything the page printed.
    PageSkipped
        Nothing of it ran, because it makes containers or needs programs that this machine does not have.
    """
    page = page.resolve()
    found = blocks(page)
    if not found:
        return 0
    if any(block.containers for block in found) and (reason := sandbox.missing()):
        raise PageSkipped(f"{_shown(page)}: {reason}")
    for program in (program for block in found for program in block.needs):
        if shutil.which(program) is None:
            raise PageSkipped(f"{_shown(page)}: {program} is not installed")
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-docs-") as directory,
        environment(Path(directory)) as variables,
    ):
        command = [sys.executable, __file__, "--inside", str(page)]
        with subprocess.Popen(
            command,
            cwd=directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=PAGE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # The whole session: what a block left running holds the output open, and would outlive us.
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
                raise PageFault(f"{_shown(page)}: not done after {PAGE_TIMEOUT_S} s\n{said}") from None
    if process.returncode != 0:
        raise PageFault(f"{_shown(page)}: a block failed\n{said}")
    return len(found)


def _inside(page: Path) -> None:
    """Run the blocks in this very process; `run_page` made it, its directory and its variables."""
    names: dict[str, Any] = {"__name__": "__main__"}
    operator = {name: value for name, value in os.environ.items() if name != DOOR}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines in front, so that a traceback counts lines as the page does.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        else:
            _shell(page, block, operator)


def _shell(page: Path, block: Block, variables: Mapping[str, str]) -> None:
    sys.stdout.flush()
    shell = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], env=variables)
    if shell.returncode != 0:
        raise SystemExit(f"{_shown(page)}:{block.line}: the sh block ended with {shell.returncode}")


def _shown(page: Path) -> str:
    page = page.resolve()
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


def main(arguments: Sequence[str]) -> int:
    """Run the pages named in `arguments`, or all of them, and report each."""
    if arguments[:1] == ["--inside"]:
        _inside(Path(arguments[1]))
        return 0
    failed = False
    for page in [Path(argument) for argument in arguments] or pages():
        try:
            print(f"docs: {_shown(page)}: {run_page(page)} blocks ran")
        except PageSkipped as skipped:
            print(f"docs: skipped {skipped}")
        except PageFault as fault:
            failed = True
            print(f"docs: {fault}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
