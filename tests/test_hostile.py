"""A hostile tenant spoils its own traffic and nothing else: nobody loses a byte, hangs or dies.

Beside every attack, two other domains exchange verified streams through the same broker, the partner of the
attacker serves a friend, and the broker answers its operator.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus import _native as n
from isthmus.testing import PrivateBroker

sys.path.insert(0, str(Path(__file__).parent / "hostile"))
from programs import LIMIT_S, Program, descriptors

POLICY = """
[[rule]]
from = "hostile"
to = "strict-partner"
action = "accept"
strict = true

[[rule]]
from = "*"
to = "*"
action = "accept"
"""
DOMAINS = ("good", "listener", "hostile", "partner", "strict-partner")
#: What an honest partner may find: a clear error, the end, or bytes (rubbish, perhaps) until it has enough.
FINDS = {"end", "enough", "PeerReset", "PeerFault", "PeerClosed", "TimedOut"}
SENDS = {"300000", "PeerReset", "PeerClosed", "TimedOut"}
#: Attack: what every partner finds, if that is certain.
CERTAIN = {
    "lies_about_lengths": {"PeerFault"},
    "half_a_record": {"PeerReset"},
    "closes_bells": {"PeerReset"},
    "endless_nothing": {"PeerFault"},
}
STRICT = {"scribble_put", "half_a_record"}
ONE_CONNECTION = {"endless_nothing", "endless_bell", "never_reads"}


def eventually(what: Callable[[], Any], why: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.01)


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(DOMAINS, POLICY) as broker:
        yield broker


def bugs(broker: PrivateBroker) -> list[str]:
    return [line for line in broker.log.read_text().splitlines() if '"bug"' in line or "Traceback" in line]


def open_connections(broker: PrivateBroker, domain: str) -> int:
    domains = broker.ask("domain-list")["domains"]
    return int(next(d["connections"] for d in domains if d["name"] == domain))


class Company:
    """The honest programs beside an attack."""

    def __init__(self, broker: PrivateBroker, pair: Program) -> None:
        self.broker = broker
        self.pair = pair
        self._friend = n.Node(broker.door("good"), "friend")

    def goes_on(self, rounds: int = 3, partner: str | None = None) -> None:
        """Everybody does some more honest work."""
        for _ in range(rounds):
            self.pair.wait_for("round")
        if partner is not None:
            connection = self._friend.connect(partner, 8, "stream", timeout=LIMIT_S)
            said = os.urandom(30_000)
            assert connection.send(said, LIMIT_S) == len(said)
            heard = bytearray(len(said))
            assert connection.recv_exactly_into(heard, LIMIT_S) == len(said)
            assert heard == said
            connection.close()
        assert self.broker.ask("ping")["pid"] == self.broker.pid

    def close(self) -> None:
        self.pair.stop()
        self._friend.stop()


@pytest.fixture(scope="module")
def company(broker: PrivateBroker) -> Iterator[Company]:
    with Program("honest.py", "pair", broker.door("good"), broker.door("listener")) as pair:
        company = Company(broker, pair)
        company.goes_on(1)
        yield company
        company.close()
    assert bugs(broker) == []


@pytest.fixture
def partner(broker: PrivateBroker, request: pytest.FixtureRequest) -> Iterator[Program]:
    """An honest program that a stranger may connect to."""
    name = request.node.callspec.params["name"]
    with Program("honest.py", "partner", broker.door(partner_of(name))) as partner:
        partner.wait_for("ready")
        yield partner
        partner.stop()


def partner_of(name: str) -> str:
    return "strict-partner" if name in STRICT else "partner"


def attack(broker: PrivateBroker, name: str) -> Program:
    return Program("tenant.py", name, broker.door("hostile"), partner_of(name))


def ends(broker: PrivateBroker, hostile: Program) -> None:
    """Kill the attacker; what it held is gone."""
    hostile.kill()
    eventually(lambda: open_connections(broker, "hostile") == 0, "connections of a dead tenant remain")


@pytest.mark.parametrize("name", ["garbage", "too_many_descriptors", "flood", "deaf", "hoard"])
def test_who_attacks_the_broker_hurts_nobody_else(
    broker: PrivateBroker, company: Company, partner: Program, name: str
) -> None:
    with attack(broker, name) as hostile:
        hostile.wait_for("ready")
        company.goes_on(partner=partner_of(name))
        ends(broker, hostile)
    company.goes_on(1, partner_of(name))
    assert bugs(broker) == []


@pytest.mark.parametrize("name", ["never_answers", "answers_wrongly"])
def test_who_connects_to_a_hostile_listener_gets_a_clear_refusal(
    broker: PrivateBroker, company: Company, name: str
) -> None:
    with attack(broker, name) as hostile:
        hostile.wait_for("ready")
        node = n.Node(broker.door("good"), "honest")
        for _ in range(1 if name == "never_answers" else 6):
            with pytest.raises(OSError, match=r"hostile|listener") as refused:
                node.connect("hostile", 7, "stream", timeout=LIMIT_S)
            assert type(refused.value).__module__ == "isthmus.errors"
        company.goes_on(1)
        node.stop()
        ends(broker, hostile)


@pytest.mark.parametrize(
    "name",
    ["scribble", "scribble_put", "lies_about_lengths", "rewinds", "endless_nothing", "half_a_record",
     "endless_bell", "never_reads", "closes_bells"],
)  # fmt: skip
def test_a_partner_of_a_hostile_end_gets_an_error_or_rubbish_and_serves_others(
    broker: PrivateBroker, company: Company, partner: Program, name: str
) -> None:
    with attack(broker, name) as hostile:
        hostile.wait_for("ready")
        company.goes_on(partner=partner_of(name))
        found = [partner.wait_for("stranger") for _ in range(1 if name in ONE_CONNECTION else 4)]
        ends(broker, hostile)
    assert {event["received"] for event in found} <= CERTAIN.get(name, FINDS), found
    assert {event["sent"] for event in found} <= SENDS, found
    company.goes_on(1, partner_of(name))
    assert bugs(broker) == []


def test_whatever_is_tried_with_the_descriptors_fails(broker: PrivateBroker, company: Company) -> None:
    """Through the descriptors that a tenant is given, and through each of them opened again."""
    with (
        Program("honest.py", "partner", broker.door("partner")) as partner,
        Program("honest.py", "partner", broker.door("strict-partner")) as strict,
    ):
        partner.wait_for("ready")
        strict.wait_for("ready")
        with attack(broker, "descriptors") as hostile:
            report: dict[str, dict[str, str]] = hostile.wait_for("done")["report"]
            company.goes_on(1, "partner")
            company.goes_on(1, "strict-partner")
            ends(broker, hostile)
        partner.stop()
        strict.stop()
    refusals = {"EPERM", "EBADF", "EACCES", "EINVAL", "EOPNOTSUPP"}
    for how, attempts in report.items():
        if "open" in attempts:
            continue
        done = {what for what, became in attempts.items() if became == "done"}
        if how.startswith("sealed"):
            assert done <= {"read"}, (how, attempts)
        else:
            # The inbox of a put lane is there to be written; the same user may open it again.
            assert not done & {"truncate", "shrink", "grow", "seal"}, (how, attempts)
            if how == "put given":
                assert done == {"write", "pwrite", "punch"}, attempts
        assert set(attempts.values()) <= refusals | {"done"}, (how, attempts)
    company.goes_on(1)


def test_another_user_cannot_open_an_inbox_again(broker: PrivateBroker) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    node = n.Node(broker.door("strict-partner"), "owner")
    listener = node.listen(11, "stream")
    hostile = n.Node(broker.door("hostile"), "sender")
    connection = hostile.connect("strict-partner", 11, "stream", timeout=LIMIT_S)
    accepted = listener.accept(LIMIT_S)
    assert connection.path == "put"
    inboxes = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # Another test's connection, which ends just now.
            fd = os.dup(int(name))
            if "isthmus-inbox" in os.readlink(f"/proc/self/fd/{fd}"):
                inboxes.append(fd)
            else:
                os.close(fd)
    assert inboxes
    script = (
        "import os, sys\n"
        "for fd in map(int, sys.argv[1:]):\n"
        "    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):\n"
        "        try: os.open(f'/proc/self/fd/{fd}', flags)\n"
        "        except PermissionError: continue\n"
        "        sys.exit('opened again')\n"
    )
    command = ["/usr/bin/env", "python3", "-S", "-c", script, *map(str, inboxes)]
    nobody: dict[str, Any] = {"user": 65_534, "group": 65_534, "extra_groups": [], "cwd": "/"}
    nobody["env"] = {"PATH": "/usr/bin:/bin"}
    stranger = subprocess.run(
        command, pass_fds=inboxes, capture_output=True, text=True, check=False, **nobody
    )
    for fd in inboxes:
        os.close(fd)
    assert stranger.returncode == 0, stranger.stderr
    for end in (connection, accepted):
        end.close()
    listener.close()
    node.stop()
    hostile.stop()


def test_no_descriptor_of_the_broker_is_left(broker: PrivateBroker, company: Company) -> None:
    """The pair may be between two of its connections; anything else would be one for each packet."""

    def held() -> int:
        return descriptors(broker.pid)

    company.goes_on(1)
    before = held()
    for name in ("garbage", "too_many_descriptors", "deaf"):
        with attack(broker, name) as hostile:
            hostile.wait_for("ready")
            ends(broker, hostile)
    eventually(lambda: held() <= before + 4, f"{held()} descriptors where {before} were")


def sandboxed(door: str) -> list[str]:
    """A sandbox with namespaces of its own and nothing of the node but one domain's door."""
    around = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",
        "/tmp",
    ]
    directory = str(Path(door).parent)
    trees = {"/usr", sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])}
    for tree in sorted(trees, key=len):
        around += ["--ro-bind", tree, tree]
    for link in ("/bin", "/lib", "/lib64", "/etc"):
        if os.path.exists(link):
            around += ["--ro-bind", os.path.realpath(link), link]
    return [*around, "--bind", directory, directory]


@pytest.mark.system
@pytest.mark.parametrize("name", ["scribble", "endless_bell", "hoard"])
def test_the_same_between_sandboxes(name: str) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    tried = subprocess.run(
        [*sandboxed("/tmp/x/door")[:-3], "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"bwrap cannot run here: {tried.stderr.strip()}")
    with PrivateBroker(DOMAINS, POLICY) as broker:
        door = broker.door
        with (
            Program("honest.py", "pair", door("good"), door("listener")) as pair,
            Program("honest.py", "partner", door("partner"), around=sandboxed(door("partner"))) as partner,
        ):
            partner.wait_for("ready")
            company = Company(broker, pair)
            company.goes_on(1, "partner")
            around = sandboxed(door("hostile"))
            with Program("tenant.py", name, door("hostile"), "partner", around=around) as hostile:
                hostile.wait_for("ready")
                company.goes_on(partner="partner")
                ends(broker, hostile)
            company.goes_on(1, "partner")
            company.close()
            partner.kill()
        assert bugs(broker) == []
