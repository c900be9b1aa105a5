"""The demo's guests: two virtual machines with stock kernels, and sockets between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.cli.output import EXIT_FAILED, Problem
from isthmus.testing import PrivateBroker
from isthmus.vm import Guest, GuestError, Missing, choose_monitor

__all__ = ["show"]

DOMAINS = ("east", "west")
PORT, PLAIN_PORT = 9000, 9001
#: What both guests do first: an agent, whose door programs find where containers find theirs.
_PREPARE = """
{python} -m isthmus agent --ready >/run/agent &
until grep -q ready /run/agent; do sleep 0.05; done
exec {python} -u -c '{program}'
"""
_EAST = """
import isthmus, json, platform, socket
with isthmus.create_server(("", {port})) as fast, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as plain:
    plain.bind((socket.VMADDR_CID_ANY, {plain_port}))
    plain.listen(1)
    print(json.dumps(dict(event="ready", kernel=platform.release())))
    for listener in (fast, plain):
        sock, _ = listener.accept()
        with sock:
            while data := sock.recv(1 << 16):
                sock.sendall(data)
"""
_WEST = """
import hashlib, isthmus, json, os, platform, socket, threading, time
data = os.urandom(1 << 20) * 16
def through(sock):
    began, got = time.monotonic(), hashlib.sha256()
    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=send)
    thread.start()
    while piece := sock.recv(1 << 20):
        got.update(piece)
    thread.join()
    same = got.hexdigest() == hashlib.sha256(data).hexdigest()
    return dict(bytes=len(data), same=same, seconds=time.monotonic() - began)
print(json.dumps(dict(event="ready", kernel=platform.release())))
with isthmus.create_connection(("east", {port}), 30) as sock:
    path, why = sock.path, sock.why
    print(json.dumps(dict(event="path", what="isthmus, by name", path=path, why=why, **through(sock))))
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
    sock.connect(({east}, {plain_port}))
    print(json.dumps(dict(event="path", what="AF_VSOCK, by number", path="switch",
        why="packets through the switch, nothing of ours in the guest", **through(sock))))
"""


def show(console: Console, *, bench: bool) -> dict[str, Any] | None:
    """Boot two guests, show what they say to each other, and end them.

    Returns
    -------
    dict or None
        What was seen; None where this machine cannot start guests, which is said.

    Raises
    ------
    Problem
        A guest failed, or got other bytes than were sent.
    """
    try:
        monitor = choose_monitor()
    except Missing as missing:
        console.print(f"[yellow]no guests[/]: {missing}")
        return None
    try:
        found = _talk(console, monitor)
    except GuestError as error:
        raise Problem(f"demo: {error}", EXIT_FAILED) from None
    table = Table("connection", "path", "why", "there and back", title="Between two virtual machines")
    for path in found["paths"]:
        if not path["same"]:
            raise Problem(f"demo: {path['what']}: other bytes came back than were sent", EXIT_FAILED)
        rate = (
            f"{path['bytes'] >> 20} MiB, same SHA-256, {2 * path['bytes'] / path['seconds'] / 1e6:,.0f} MB/s"
        )
        table.add_row(path["what"], path["path"], path["why"], rate)
    console.print(table)
    if bench and os.geteuid() == 0:
        found["bench"] = _bench(console, monitor)
    return found


def _talk(console: Console, monitor: str) -> dict[str, Any]:
    began = time.monotonic()
    with ExitStack() as stack:
        broker = stack.enter_context(PrivateBroker(()))
        domains = {
            name: broker.ask("domain-add", name=name, group=None, uid=None, kind="vm") for name in DOMAINS
        }
        while any(d["device"] == "no switch" for d in broker.ask("domain-list")["domains"]):
            time.sleep(0.01)
        words = {"port": PORT, "plain_port": PLAIN_PORT, "east": domains["east"]["number"]}
        events = {}
        for name, program in (("east", _EAST), ("west", _WEST)):
            script = _PREPARE.format(python=sys.executable, program=program.format(**words))
            guest = Guest(
                name,
                domains[name]["socket"],
                ["sh", "-c", script],
                broker.directory / "vm" / name,
                monitor=monitor,
                environment={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            stack.callback(guest.stop)
            events[name] = _events(guest)
            if name == "east":
                ready = _next(events[name], name)
        kernels = {"east": ready["kernel"], "west": _next(events["west"], "west")["kernel"]}
        console.print(
            f"[bold]guests[/] {' and '.join(DOMAINS)}: {monitor}, stock kernel {kernels['west']}, "
            f"up in {time.monotonic() - began:.1f} s"
        )
        paths = [_next(events["west"], "west") for _ in range(2)]
    return {"monitor": monitor, "kernels": kernels, "paths": paths}


def _events(guest: Guest) -> Iterator[dict[str, Any]]:
    assert guest.output is not None
    with os.fdopen(os.dup(guest.output)) as lines:
        for line in lines:
            yield json.loads(line) if line.startswith("{") else {"event": "said", "text": line.strip()}


def _next(events: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    said = []
    for event in events:
        if event["event"] != "said":
            return event
        said.append(event["text"])
    raise Problem(f"demo: the guest {name} ended early: {' '.join(said)[-500:]}", EXIT_FAILED)


def _bench(console: Console, monitor: str) -> list[Any]:
    console.print("[bold]benchmark[/] beside TCP over the guests' network cards and a bridge")
    words = [sys.executable, "-m", "isthmus", "bench", "pingpong", "--between", "vm", "--monitor", monitor]
    words += ["--sizes", "64", "--clients", "native", "--waits", "spin", "--repeat", "3", "--json"]
    words += ["--transports", "isthmus,vsock,tcp-bridge"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, text=True)
    if done.returncode != 0:
        raise Problem(f"the benchmark between guests ended with status {done.returncode}", EXIT_FAILED)
    records: list[dict[str, Any]] = json.loads(done.stdout)
    baseline = next((r["p50_us"] for r in records if r["transport"] == "tcp-bridge"), None)
    table = Table(
        "transport", "64 B, one way", "of TCP", title=records[0]["machine"]["guests"] if records else ""
    )
    for record in records:
        share = f"{record['p50_us'] / baseline:.0%}" if baseline else ""
        table.add_row(record["transport"], f"{record['p50_us']:.1f} µs", share)
    console.print(table)
    return records
