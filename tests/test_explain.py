"""`isthmus explain` about unmodified programs: what it foretells is what the broker does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_client import Node, Program, Refused
from test_cli import isthmus

from isthmus._native import FEATURE_SOCKETS
from isthmus.testing import PrivateBroker

POLICY = """
domain = [
    {name = "shop", addresses = "10.0.0.8"},
    {name = "cache", addresses = ["10.0.0.7", "fd00::7"]},
    {name = "cloud", addresses = "10.1.0.0/16"},
    {name = "bare"},
    {name = "full", addresses = "10.0.0.10", limits = {connections = 0}},
]
rule = [
    {from = "shop", to = "cache", ports = 22, action = "refuse"},
    {from = "shop", to = "cache", ports = 23, action = "drop"},
    {from = "*", to = "*", action = "accept", strict = true, weight = 3},
]
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run", POLICY) as node:
        yield node


def supervisor(node: Node, domain: str) -> Program:
    """What `isthmus run` is to the broker."""
    return node.attach(domain, features=FEATURE_SOCKETS)


def explained(node: Node, *words: str) -> dict[str, Any]:
    done = isthmus("explain", *words, "--json", where=node.directory)
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


def why_not(opener: Program, listener: Program | None, to: str, port: int, source: str) -> str:
    """Try it; what the broker refuses it with, or nothing."""
    fields = {"to": to, "to_port": port, "kind": "stream", "source": source, "source_port": 1, "ahead": 0}
    request = opener.send("connect-socket", **fields)
    if listener is not None:
        incoming = listener.next("incoming-socket")
        os.close(incoming["fds"][0])
        listener.send("accept", connection=incoming["connection"], small=0, large=0)
    try:
        _, found = opener.answer(request)
    except Refused as refused:
        return refused.refusal
    os.close(found["fds"][0])
    return ""


@pytest.mark.parametrize(
    ("source", "to", "port", "refusal", "because"),
    [
        ("shop", "cache", 80, "", ""),
        ("shop", "cache", 81, "nobody-listens", "nobody listens at cache:81 under isthmus run"),
        ("shop", "cache", 22, "refused-by-rule", "rule 1 refuses"),
        ("shop", "cache", 23, "nobody-listens", "rule 2 drops"),
        ("shop", "cache", 82, "path-unavailable", "whoever listens at cache:82 uses Isthmus itself"),
        ("shop", "cache", 83, "wrong-kind", "cache:83: a seqpacket listener, not stream"),
        ("shop", "full", 80, "limit-reached", "limit reached: connections: domain full may hold 0"),
    ],
)
def test_what_is_foretold_is_what_happens(
    node: Node, source: str, to: str, port: int, refusal: str, because: str
) -> None:
    with (
        supervisor(node, "shop") as shop,
        supervisor(node, "cache") as cache,
        supervisor(node, "full") as full,
        node.attach("cache") as lanes,
    ):
        for taken in (80, 22, 23):
            cache.bind(taken)
        cache.bind(83, kind="seqpacket")
        full.bind(80)
        lanes.bind(82)
        found = explained(node, source, to, "--port", str(port))["run"]
        assert why_not(shop, cache if not refusal else None, to, port, "10.0.0.8") == refusal
        assert found["exchanged"] is not bool(refusal)
        assert found["ports"] == ([port] if refusal in ("", "limit-reached") else [])
        if because:
            assert any(because in note for note in found["notes"])


def test_addresses_that_nobody_has_yet(node: Node) -> None:
    with supervisor(node, "cloud") as cloud, supervisor(node, "bare") as bare:
        cloud.bind(80)
        bare.bind(80)
        unknown = explained(node, "shop", "cloud", "--port", "80")["run"]
        assert (unknown["exchanged"], unknown["addresses"]) == (False, [])
        assert "cloud may have addresses in 10.1.0.0/16" in unknown["notes"][0]
        done = isthmus("explain", "shop", "10.1.0.3:80", where=node.directory)
        assert done.returncode == 1
        assert "10.1.0.3: given to cloud as part of a network, and no program there says" in done.stderr
        cloud.ask("addresses", list="10.1.0.3")
        known = explained(node, "shop", "10.1.0.3:80")
        assert (known["to"], known["port"]) == ("cloud", 80)
        assert known["run"]["addresses"] == ["10.1.0.3"]
        assert known["run"]["exchanged"] is True
        nowhere = explained(node, "shop", "bare", "--port", "80")["run"]
        assert nowhere["exchanged"] is False
        assert "bare has no address that a program could connect to" in nowhere["notes"][0]
        # From where its programs come, the broker does not know: without a network, from nowhere.
        assert explained(node, "bare", "cloud", "--port", "80")["run"]["exchanged"] is None
        assert why_not(bare, cloud, "10.1.0.3", 80, "") == ""
        assert why_not(bare, None, "10.1.0.3", 80, "10.9.9.9") == "wrong-address"


def test_where_programs_take_kernel_sockets_that_is_the_path(node: Node) -> None:
    with supervisor(node, "cache") as cache, node.attach("shop") as shop:
        cache.bind(80)
        done = isthmus("explain", "shop", "[fd00::7]:80", where=node.directory)
        assert done.returncode == 0
        assert done.stdout.splitlines()[0] == "shop -> cache:80: path socket"
        assert f"process {os.getpid()} listens there (stream, kernel sockets alone)" in done.stdout
        assert "weight of rule 3 not enforced here: on a socket nobody" in done.stdout
        assert "under isthmus run: path socket at 80\n  cache has 10.0.0.7, fd00::7\n" in done.stdout
        assert shop.try_connect("cache", 80).refusal == "path-unavailable"
        whole = explained(node, "shop", "cache")["run"]
        assert (whole["exchanged"], whole["ports"]) == (True, [80])
    assert "under isthmus run: TCP\n" in isthmus("explain", "shop", "cache", where=node.directory).stdout


def test_what_took_the_network_between_the_two(node: Node) -> None:
    def tell(program: Program, to: str, port: int, why: str, refused: int = 0) -> None:
        program.send("fallback", to=to, to_port=port, count=2, refused=refused, why=why)

    with supervisor(node, "shop") as shop, supervisor(node, "cache") as cache:
        tell(shop, "10.0.0.7", 80, "nobody listens there")
        tell(shop, "fd00::7", 81, "no rule accepts it", refused=1)
        tell(shop, "10.0.0.9", 80, "of somebody else")
        tell(cache, "0.0.0.0", 80, "listen: port 80 is taken")
        tell(cache, "10.0.0.8", 41000, "accept: it came over TCP", refused=1)
        tell(cache, "10.0.0.8", 90, "the other way")
        for program in (shop, cache):
            program.status()
        found = explained(node, "shop", "cache")["run"]["fallbacks"]
        assert {(entry["domain"], entry["why"]) for entry in found} == {
            ("shop", "nobody listens there"),
            ("shop", "no rule accepts it"),
            ("cache", "listen: port 80 is taken"),
            ("cache", "accept: it came over TCP"),
        }
        done = isthmus("explain", "shop", "cache:81", where=node.directory)
        assert "  shop, [fd00::7]:81: refused 2 times, " in done.stdout
        assert "nobody listens there" not in done.stdout


def test_a_destination_names_its_port_in_one_way(node: Node) -> None:
    done = isthmus("explain", "shop", "cache:80", "--port", "81", where=node.directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert "TO names port 80" in done.stderr
    assert explained(node, "10.0.0.8", "cache:80", "--port", "80")["from"] == "shop"
    # An address of IPv6 without brackets is all address.
    assert explained(node, "shop", "fd00::7")["port"] is None
    done = isthmus("explain", "shop", "10.0.0.77:80", where=node.directory)
    assert "10.0.0.77: no domain has this address; isthmus domain add NAME --address" in done.stderr


def test_a_guest_where_no_agent_says_that_somebody_listens() -> None:
    policy = 'domain = [{name = "guest", kind = "vm", addresses = "10.0.0.9"}, {name = "shop"}]'
    with PrivateBroker((), policy=policy) as broker:
        found = broker.ask("explain", **{"from": "shop", "to": "10.0.0.9", "port": 80})
        assert found["ranges"][0]["path"] == "switch"
        assert found["run"]["exchanged"] is False
        assert "nobody listens at guest:80 under isthmus run" in found["run"]["notes"]
