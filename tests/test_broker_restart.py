"""A broker that comes back: who was who, and which connections it may believe in."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_client import SMALL, Connection, Node, Program, Refused, eventually, inbox
from conftest import becomes
from guests import switch_of

from isthmus.broker.service import ServiceError
from isthmus.broker.state import State, StateError
from isthmus.testing import PrivateBroker


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run", state=tmp_path / "state") as node:
        node.add("a", "b")
        yield node


def pair(node: Node) -> tuple[Connection, Connection]:
    """A connection whose programs are gone with the broker, as far as it can tell."""
    with node.attach("a") as a, node.attach("b") as b:
        b.bind(5000)
        return a.connect("b", 5000, b)


def test_domains_numbers_and_doors_survive(node: Node) -> None:
    numbers = {name: node.number(name) for name in "ab"}
    inode = node.door("a").parent.stat().st_ino
    node.do(lambda: node.broker.remove_domain("b"))
    node.restart()
    assert set(node.broker.domains) == {"a"}
    assert node.number("a") == numbers["a"]
    assert node.door("a").parent.stat().st_ino == inode, "a mounted directory stays the same one"
    node.add("b")
    assert node.number("b") > numbers["b"], "numbers are never used again"
    with node.attach("a") as a:
        assert a.welcome["epoch"] == 2


def test_connections_are_taken_up_again_by_both_sides(node: Node) -> None:
    ours, theirs = pair(node)
    node.restart()
    with node.attach("a") as a, node.attach("b") as b:
        assert ours.resume(a) == "done"
        assert a.status()["connections"][0]["state"] == "half"
        b.bind(5000)
        assert theirs.resume(b) == "done"
        (seen,) = a.status()["connections"]
        assert seen["state"] == "open"
        assert seen["connection"] == f"{ours.number:016x}"
        assert seen["why"] == ours.fields["why"]
        assert node.holds("a")[:3] == node.holds("b")[:3] == (1, 2, SMALL)
        assert ours.resume(a) == "done", "twice is once"
        assert node.holds("a")[0] == 1
        with pytest.raises(Refused, match="is in use"):
            a.bind(ours.fields["from_port"])
        a.send("close", connection=ours.number)
        b.send("close", connection=theirs.number)
        a.status()
        b.status()
        assert node.holds("a") == (0, 0, 0, 0, 0)
        assert node.broker.introductions.resumed == 2


def test_a_side_that_lost_its_attachment_joins_again(node: Node) -> None:
    with node.attach("a") as a, node.attach("b") as b:
        b.bind(5000)
        ours, _ = a.connect("b", 5000, b)
        a.close_socket()
        eventually(lambda: node.holds("a")[0] == 0)
        with node.attach("a") as again:
            assert ours.resume(again) == "done"
            assert b.status()["connections"][0]["state"] == "open"
            with node.attach("a") as thief, pytest.raises(Refused) as caught:
                ours.resume(thief)
            assert caught.value.refusal == "not-yours"


@pytest.mark.parametrize(
    "lie",
    [
        {"ticket": bytes(32)},
        {"connection": 1},
        {"peer_port": 5001},
        {"port": 1},
        {"kind": "datagram"},
        {"opener": 0},
        {"peer": 1},
    ],
    ids=str,
)
def test_a_ticket_is_good_for_what_was_granted_and_nothing_else(node: Node, lie: dict[str, Any]) -> None:
    ours, _ = pair(node)
    node.restart()
    with node.attach("a") as a:
        with pytest.raises(Refused) as caught:
            ours.resume(a, **lie)
        assert caught.value.refusal == "not-yours"
        assert node.holds("a")[0] == 0
        assert ours.resume(a) == "done"


def test_a_ticket_of_another_domain_or_of_the_other_side_is_refused(node: Node) -> None:
    ours, theirs = pair(node)
    node.restart()
    with node.attach("b") as b:
        for lie in (
            {},
            {"peer": ours.fields["to"], "opener": 1},
            {"ticket": theirs.fields["ticket"], "opener": 1},
        ):
            with pytest.raises(Refused) as caught:
                ours.resume(b, **lie)
            assert caught.value.refusal == "not-yours"


def test_in_a_domain_that_talks_to_itself_one_side_cannot_pass_for_the_other(node: Node) -> None:
    with node.attach("a") as opener, node.attach("a") as listener:
        listener.bind(5000)
        ours, theirs = opener.connect("a", 5000, listener)
    node.restart()
    with node.attach("a") as a:
        with pytest.raises(Refused) as caught:
            theirs.resume(a, opener=1, port=ours.fields["from_port"], peer_port=5000)
        assert caught.value.refusal == "not-yours"
        assert theirs.resume(a) == ours.resume(a) == "done"


def test_a_ticket_made_with_another_key_is_refused(node: Node, tmp_path: Path) -> None:
    ours, _ = pair(node)
    node.stop()
    (tmp_path / "state" / "key").unlink()
    node.start()
    with node.attach("a") as a, pytest.raises(Refused) as caught:
        ours.resume(a)
    assert caught.value.refusal == "not-yours"


def test_todays_policy_decides_about_yesterdays_connections(tmp_path: Path) -> None:
    domains = '[[domain]]\nname = "a"\n[[domain]]\nname = "b"\n'
    with Node(tmp_path / "run", domains) as node:
        ours, theirs = pair(node)
        node.stop()
        assert node.policy_path is not None
        for rule, words in (
            ('from = "a"\nto = "b"\naction = "refuse"', "rule 1 refuses"),
            ('from = "a"\nto = "b"\naction = "accept"\nstrict = true', "strict now"),
        ):
            node.policy_path.write_text(f"{domains}[[rule]]\n{rule}\n")
            node.start()
            for name, side in (("a", ours), ("b", theirs)):
                with node.attach(name) as program, pytest.raises(Refused, match=words) as caught:
                    side.resume(program)
                assert (caught.value.refusal, caught.value.rule) == ("refused-by-rule", 1)
            node.stop()
        node.policy_path.write_text('[[domain]]\nname = "a"\n')
        node.start()
        with node.attach("a") as a, pytest.raises(Refused) as caught:
            ours.resume(a)
        assert caught.value.refusal == "domain-removed"


def test_a_strict_connection_is_resumed_with_its_page_alone(tmp_path: Path) -> None:
    text = '[[domain]]\nname = "a"\n[[domain]]\nname = "b"\n'
    text += '[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\nstrict = true\n'
    with Node(tmp_path / "run", text) as node:
        with node.attach("a") as a, node.attach("b") as b:
            b.bind(5000)
            ours, theirs = a.connect("b", 5000, b, carrier="put")
        node.restart()
        with node.attach("a") as a, node.attach("b") as b:
            assert ours.resume(a) == "done"
            with pytest.raises(Refused) as caught:
                b.ask("resume", inbox(), **resume_fields(theirs))
            assert caught.value.refusal == "bad-request"
            assert theirs.resume(b) == "done"


def resume_fields(side: Connection) -> dict[str, Any]:
    f = side.fields
    return {
        "connection": side.number,
        "peer": f["from"],
        "peer_port": f["from_port"],
        "port": f["port"],
        "kind": "stream",
        "carrier": f["carrier"],
        "small": SMALL,
        "large": 0,
        "opener": 0,
        "ticket": f["ticket"],
    }


def test_limits_hold_for_resumed_connections_too(tmp_path: Path) -> None:
    text = '[[domain]]\nname = "a"\nlimits = { connections = %d }\n[[domain]]\nname = "b"\n'
    with Node(tmp_path / "run", text % 9) as node:
        sides = [pair(node)[0] for _ in range(3)]
        node.stop()
        assert node.policy_path is not None
        node.policy_path.write_text(text % 2)
        node.start()
        with node.attach("a") as a:
            assert sides[0].resume(a) == sides[1].resume(a) == "done"
            with pytest.raises(Refused, match="connections: domain a may hold 2"):
                sides[2].resume(a)


def test_a_second_broker_on_one_directory_is_refused(node: Node) -> None:
    with pytest.raises(ServiceError, match=r"another broker \(process [0-9]+\) serves this directory"):
        Node(node.directory)
    with node.attach("a") as a:
        a.bind(1)


def test_what_lies_in_the_way_of_a_door_is_replaced_or_reported(node: Node) -> None:
    node.stop()
    assert not node.door("a").exists()
    # The directory belongs to the domain's user, who may put anything there.
    victim = node.directory / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    node.door("a").symlink_to(victim)
    node.door("b").mkdir()
    node.start()
    with node.attach("a") as a:
        a.bind(1)
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777 == 0o600
    assert node.door("a").is_socket()
    assert '"event": "door", "domain": "b"' in node.log.getvalue()


def test_a_door_directory_that_is_a_link_is_not_followed(node: Node, tmp_path: Path) -> None:
    node.stop()
    node.door("a").parent.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    node.door("a").parent.symlink_to(elsewhere)
    node.start()
    assert list(elsewhere.iterdir()) == []
    with node.attach("b") as b:
        b.bind(1)


def test_doors_of_domains_that_are_no_more_are_taken_down(node: Node, tmp_path: Path) -> None:
    node.stop()
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    del state["added"]["b"]
    (tmp_path / "state" / "state.json").write_text(json.dumps(state))
    node.start()
    assert not node.door("b").parent.exists()
    assert node.door("a").is_socket()


def test_modes_of_what_the_broker_makes(node: Node, tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return path.stat().st_mode & 0o777

    assert mode(node.door("a")) == 0o666
    assert mode(node.door("a").parent) == 0o700
    assert mode(node.directory / "doors") == 0o711
    assert mode(node.directory / "operator") == 0o600
    assert mode(node.directory / "metrics") == 0o660
    assert mode(tmp_path / "state" / "key") == 0o600
    assert mode(tmp_path / "state" / "state.json") == 0o600
    node.stop()
    assert not (node.directory / "operator").exists()
    assert not (node.directory / "metrics").exists()


def test_a_damaged_state_is_refused_and_left_alone(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.number_of("a")
    state.save()
    good = (tmp_path / "state.json").read_text()
    for damage in ("", "{}", "[]", good.replace('"format": 1', '"format": 9'), good.replace('"a"', '"../a"')):
        (tmp_path / "state.json").write_text(damage)
        with pytest.raises(StateError, match=r"state\.json"):
            State(tmp_path)
        assert (tmp_path / "state.json").read_text() == damage
    (tmp_path / "state.json").write_text(good)
    assert State(tmp_path).numbers == {"a": 3}
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(StateError, match="key"):
        State(tmp_path)


def test_an_attached_program_learns_that_the_broker_stops(node: Node) -> None:
    with node.attach("a") as a:
        node.stop()
        assert a.ended()
    node.start()


def test_paths_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    with Node(tmp_path / ("long" * 20) / ("longer" * 10)) as node:
        node.add("a" * 63)
        with Program(node.door("a" * 63)) as program:
            assert program.welcome["domain_name"] == "a" * 63


def test_a_broker_of_many_guests_tells_the_switch_of_all_and_hears_of_all() -> None:
    """More than there is room for in the sockets between the two at once."""
    with PrivateBroker(()) as broker:
        names = {f"guest-{n}" for n in range(400)}
        for name in names:
            broker.ask("domain-add", name=name, group=None, uid=None, kind="vm")

        def known() -> bool:
            devices = {d["name"]: d["device"] for d in broker.ask("domain-list")["domains"]}
            return devices == dict.fromkeys(names, "waiting")

        becomes(known, "not every guest has a device")
        broker.kill()
        # It does not read while the next broker begins to tell it.
        switch = switch_of(broker.directory)
        os.kill(switch, signal.SIGSTOP)
        try:
            broker.start()
            log = broker.log.read_text()
        finally:
            os.kill(switch, signal.SIGCONT)
        assert "cannot be told" not in log
        becomes(known, "not every guest has a device after the broker came back")
