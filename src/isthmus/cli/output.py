"""How commands answer: tables for people, JSON for programs, one line for what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

EXIT_FAILED = 1
EXIT_NO_BROKER = 3


class Problem(Exception):
    """One line: what, where, what to do."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` after the command as well as before it."""
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")(function)


def dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--dir`` after the command as well as before it."""
    return click.option(
        "--dir", "directory", type=click.Path(), help="Runtime directory of the broker [ISTHMUS_DIR]."
    )(function)


def wants_json(ctx: click.Context, as_json: bool) -> bool:
    return as_json or bool((ctx.find_root().obj or {}).get("json"))


def runtime_dir(ctx: click.Context, directory: str | None) -> Path:
    chosen = directory or (ctx.find_root().obj or {}).get("dir")
    if chosen:
        return Path(chosen)
    from isthmus.broker.places import runtime_directory

    return runtime_directory()


def say_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns that begin with ">" are aligned right."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    Console(markup=False, highlight=False).print(made)


def size(count: float) -> str:
    """Bytes as people read them."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def address_and_port(address: str, port: int) -> str:
    """Both as people write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
