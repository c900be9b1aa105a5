"""`isthmus vm`"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from isthmus.vm.lines import FORMATS, attachment_lines

from .client import ask
from .output import Problem, dir_option, json_option, runtime_dir, say_json, table, wants_json


@click.group()
def vm() -> None:
    """Small guests of this machine, and how to attach guests of your own."""


@vm.command(context_settings={"ignore_unknown_options": True})
@click.option("--name", required=True, help="Its domain, which is added for the time if there is none.")
@click.option("--group", help="Group of a domain that is added.")
@click.option("--monitor", type=click.Choice(["qemu", "uml"]), help="What runs it [qemu with KVM, else uml].")
@click.option("--memory", type=click.IntRange(64), metavar="MIB", help="Its memory [128, qemu 384].")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@dir_option
@click.pass_context
def run(
    ctx: click.Context,
    name: str,
    group: str | None,
    monitor: str | None,
    memory: int | None,
    command: tuple[str, ...],
    directory: str | None,
) -> None:
    """Start a small guest, run COMMAND in it as root, and return its exit code.

    The guest sees this machine's files, read-only; what it writes is gone with it.
    """
    from isthmus.vm import Guest, GuestError, Missing

    runtime = runtime_dir(ctx, directory)
    known = {d["name"]: d for d in ask(runtime, "domain-list")["domains"]}
    added = name not in known
    domain = known.get(name) or ask(runtime, "domain-add", name=name, group=group, uid=None, kind="vm")
    if domain["kind"] != "vm":
        raise Problem(f"domain {name}: a {domain['kind']}, not a vm; choose another name")
    place = runtime / "vm" / name
    try:
        if _alive(place) is not None:
            raise Problem(f"guest {name}: is running; isthmus vm stop {name}")
        if domain["device"] in ("attached", "running"):
            raise Problem(f"guest {name}: another monitor has its device")
        _await_switch(runtime, name)
        shutil.rmtree(place, ignore_errors=True)
        # The terminal's interrupt is for the job; ours ends the guest.
        with Guest(
            name,
            domain["socket"],
            command,
            place,
            monitor=monitor,
            memory_mib=memory,
            stdin=_input(),
            stdout=sys.stdout.fileno(),
            environment=_environment(),
        ) as guest:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda *_: sys.exit(143))
            guest.wait_ready()
            code = guest.wait()
    except (GuestError, Missing) as error:
        raise Problem(str(error)) from None
    finally:
        if added:
            with contextlib.suppress(Problem):
                ask(runtime, "domain-remove", name=name)
    ctx.exit(code)


def _await_switch(runtime: Path, name: str) -> None:
    """Monitors try once: the switch must listen before one starts."""
    until = time.monotonic() + 10
    while ask(runtime, "status", domain=name)["domain"]["device"] == "no switch":
        if time.monotonic() > until:
            raise Problem("the switch does not start; see the broker's log")
        time.sleep(0.02)


def _input() -> int | None:
    """Our input if a guest can have it: anything but /dev/null and its like."""
    try:
        fd = sys.stdin.fileno()
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError):
        return None
    import stat

    return None if stat.S_ISCHR(mode) and not os.isatty(fd) else fd


def _environment() -> dict[str, str]:
    """What a command expects to find: how to find programs and how to talk to the terminal."""
    wanted = ("PATH", "LANG", "LC_ALL", "TERM", "VIRTUAL_ENV")
    return {key: os.environ[key] for key in wanted if key in os.environ}


def _alive(place: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((place / "guest.json").read_text())
        os.kill(record["pid"], 0)
        if "unshare" not in Path(f"/proc/{record['pid']}/cmdline").read_text():
            return None
    except (OSError, ValueError, KeyError):
        return None
    return record


@vm.command("list")
@json_option
@dir_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """List the guests that `isthmus vm run` started."""
    places = sorted((runtime_dir(ctx, directory) / "vm").glob("*"))
    guests = [found for found in map(_alive, places) if found is not None]
    if wants_json(ctx, as_json):
        say_json(guests)
        return
    rows = (
        (g["name"], g["monitor"], g["pid"], time.strftime("%H:%M:%S", time.localtime(g["since"])))
        for g in guests
    )
    table(None, ("name", "monitor", ">pid", "since"), rows)


@vm.command()
@click.argument("name")
@json_option
@dir_option
@click.pass_context
def stop(ctx: click.Context, name: str, as_json: bool, directory: str | None) -> None:
    """End a guest at once, as by pulling its plug."""
    found = _alive(runtime_dir(ctx, directory) / "vm" / name)
    if found is None:
        raise Problem(f"guest {name}: is not running; see `isthmus vm list`")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(found["pid"], signal.SIGKILL)
    if wants_json(ctx, as_json):
        say_json({"name": name})
    else:
        click.echo(f"guest {name} is stopped")


@vm.command()
@click.argument("name")
@click.option("--for", "monitor", type=click.Choice(FORMATS), default="qemu", show_default=True)
@json_option
@dir_option
@click.pass_context
def lines(ctx: click.Context, name: str, monitor: str, as_json: bool, directory: str | None) -> None:
    """Print what attaches a guest of your own to its domain."""
    answer = ask(runtime_dir(ctx, directory), "domain-list")
    domain = next((d for d in answer["domains"] if d["name"] == name), None)
    if domain is None or domain["kind"] != "vm":
        raise Problem(f"domain {name}: there is no vm of this name; isthmus domain add {name} --kind vm")
    text = attachment_lines(domain["socket"], monitor)
    if wants_json(ctx, as_json):
        say_json({"name": name, "for": monitor, "socket": domain["socket"], "lines": text.splitlines()})
    else:
        click.echo(text.rstrip())
