"""The broker, spoken to by real programs through real doors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_client import SMALL, Connection, Node, Program, Refused, eventually, inbox, sealed_ring


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run") as node:
        node.add("a", "b")
        yield node


@pytest.fixture
def a(node: Node) -> Iterator[Program]:
    with node.attach("a") as program:
        yield program


@pytest.fixture
def b(node: Node) -> Iterator[Program]:
    with node.attach("b") as program:
        yield program


def settled(*programs: Program) -> None:
    """Everything that these programs sent has been handled."""
    for program in programs:
        program.ask("status", offset=0)


def policy_of(*rules: str, more: str = "") -> str:
    return more + "".join(f"\n[[rule]]\n{rule}\n" for rule in rules)


DOMAINS = "".join(f'[[domain]]\nname = "{name}"\n' for name in "abc")


# Identity.


def test_the_door_says_who_a_program_is(node: Node, a: Program, b: Program) -> None:
    assert a.welcome["domain_name"] == "a"
    assert b.welcome["domain_name"] == "b"
    assert a.welcome["domain"] == node.number("a")
    assert a.welcome["epoch"] == 1
    assert a.welcome["ring_max"] == 256 << 20


def test_the_listener_is_told_who_connects_by_the_broker(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    _, theirs = a.connect("b", 5000, b)
    assert theirs.fields["from"] == node.number("a")
    assert theirs.fields["from_name"] == "a"
    assert theirs.fields["port"] == 5000


def test_domains_are_found_by_name_and_by_number(node: Node, a: Program) -> None:
    number = node.number("b")
    assert a.ask("resolve", name="b")[1] == {"domain": number, "name": "b", "fds": []}
    assert a.ask("resolve", name=str(number))[1]["name"] == "b"
    for unknown in ("c", "99", "", "b ", "٣", "9" * 3000, "\n"):
        with pytest.raises(Refused) as caught:
            a.ask("resolve", name=unknown)
        assert caught.value.refusal == "unknown-domain"


def test_each_domain_has_a_network_card_of_its_own(node: Node, a: Program, b: Program) -> None:
    own = a.ask("find-nic", nic=0, name="")[1]
    assert (own["domain"], own["name"]) == (node.number("a"), "a")
    # A unicast address that somebody administers here.
    assert own["nic"] >> 40 == 0x02
    other = b.ask("find-nic", nic=0, name="")[1]
    assert other["nic"] not in (0, own["nic"])
    assert a.ask("find-nic", nic=other["nic"], name="")[1] == other
    assert a.ask("find-nic", nic=0, name="b")[1] == other
    for question in ({"nic": own["nic"] ^ 1, "name": ""}, {"nic": 0, "name": "nobody"}):
        with pytest.raises(Refused) as caught:
            a.ask("find-nic", **question)
        assert caught.value.refusal == "unknown-domain"


# Connections.


def test_two_programs_of_one_group_connect_and_close(node: Node, a: Program, b: Program) -> None:
    assert b.bind(5000) == 5000
    ours, theirs = a.connect("b", 5000, b)
    assert ours.fields["carrier"] == theirs.fields["carrier"] == "sealed"
    assert ours.fields["secret"] == theirs.fields["secret"]
    assert ours.fields["secret"] & 1
    assert ours.fields["why"] == "same kernel; the built-in rule accepts members of one group; not strict"
    assert node.holds("a") == (1, 2, SMALL, 0, 0)
    assert node.holds("b") == (1, 2, SMALL, 0, 1)
    ours.close()
    settled(a)
    assert node.holds("a") == (0, 0, 0, 0, 0)
    assert node.holds("b")[0] == 1
    assert b.quiet()
    theirs.close()
    settled(b)
    assert node.holds("b") == (0, 0, 0, 0, 1)
    assert not node.broker.introductions.connections


def test_each_end_gets_the_others_ring_and_a_bell(a: Program, b: Program) -> None:
    b.bind(5000)
    ring = sealed_ring()
    inode = os.fstat(ring[0]).st_ino
    ours, theirs = a.connect("b", 5000, b, fds=ring)
    assert os.fstat(theirs.fds[0]).st_ino == inode
    assert os.fstat(ours.fds[0]).st_ino != inode
    os.write(ours.fds[1], b"x")
    assert os.read(theirs.fds[1], 1) == b"x"
    theirs.forget()
    # The other end of the bell is known to nobody but its program.
    eventually(lambda: os.read(ours.fds[1], 1) == b"")


def test_a_domain_talks_to_itself_and_a_program_to_itself(node: Node, a: Program) -> None:
    a.bind(1)
    with node.attach("a") as other:
        ours, theirs = other.connect("a", 1, a)
        ours.close()
        theirs.close()
    ours, theirs = a.connect("a", 1, a)
    assert node.holds("a")[0] == 2
    ours.close()
    settled(a)
    assert node.holds("a")[0] == 1
    theirs.close()
    settled(a)
    assert node.holds("a")[0] == 0


def test_nobody_listens_is_said_at_once(a: Program, b: Program) -> None:
    assert a.try_connect("b", 5000).refusal == "nobody-listens"
    b.bind(5000)
    b.ask("unbind", port=5000, partner=2**32 - 1)
    assert a.try_connect("b", 5000).refusal == "nobody-listens"


def test_connecting_to_another_kind_of_socket_is_refused(a: Program, b: Program) -> None:
    b.bind(5000, kind="seqpacket")
    refused = a.try_connect("b", 5000, kind="stream")
    assert refused.refusal == "wrong-kind"
    assert "seqpacket" in refused.text
    a.connect("b", 5000, b, kind="seqpacket")


def test_a_listener_may_refuse(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    for said, heard in (("backlog-full", "backlog-full"), ("refused-by-rule", "nobody-listens")):
        request = a.start_connect("b", 5000)
        b.send("refuse", connection=b.next("incoming")["connection"], refusal=said)
        assert a.refused(request).refusal == heard
    assert node.holds("a") == (0, 0, 0, 0, 0)


def test_a_listener_that_does_not_answer_is_given_up(
    node: Node, a: Program, b: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.broker.introductions.ANSWER_S", 0.05)
    b.bind(5000)
    request = a.start_connect("b", 5000)
    incoming = b.next("incoming")
    assert a.refused(request).refusal == "timed-out"
    assert node.holds("a")[3] == node.holds("b")[3] == 0
    b.accept(incoming)
    assert b.next("cut")["refusal"] == "peer-gone"


def test_an_opener_that_dies_before_the_answer(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    a.start_connect("b", 5000)
    incoming = b.next("incoming")
    a.close_socket()
    eventually(lambda: node.holds("b")[3] == 0)
    b.accept(incoming)
    assert b.next("cut")["connection"] == incoming["connection"]
    assert not node.broker.introductions.connections


def test_a_listener_that_dies_or_unbinds_before_the_answer(node: Node, a: Program) -> None:
    for how in ("die", "unbind"):
        with node.attach("b") as b:
            b.bind(5000)
            request = a.start_connect("b", 5000)
            b.next("incoming")
            if how == "die":
                b.close_socket()
            else:
                b.ask("unbind", port=5000, partner=2**32 - 1)
            assert a.refused(request).refusal == "nobody-listens"
            assert node.holds("a") == (0, 0, 0, 0, 0)


def test_death_of_a_program_frees_all_it_held(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    b.bind(0)
    pairs = [a.connect("b", 5000, b) for _ in range(5)]
    b.close_socket()
    eventually(lambda: node.holds("b") == (0, 0, 0, 0, 0))
    assert node.holds("a")[0] == 5
    assert {c["state"] for c in a.status()["connections"]} == {"half"}
    assert a.quiet()
    for ours, _ in pairs:
        ours.close()
    settled(a)
    assert node.holds("a") == (0, 0, 0, 0, 0)


def test_nobody_closes_or_answers_for_another(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    ours, _ = a.connect("b", 5000, b)
    with node.attach("b") as thief:
        thief.send("close", connection=ours.number)
        thief.send("refuse", connection=ours.number, refusal="backlog-full")
        settled(thief)
        assert node.holds("a")[0] == node.holds("b")[0] == 1
        request = a.start_connect("b", 5000)
        incoming = b.next("incoming")
        thief.accept({**incoming, "fds": []})
        assert thief.next("cut")["refusal"] == "peer-gone"
        b.accept(incoming)
        assert a.answer(request)[0] == "connected"


# Lanes.


def test_a_lane_that_is_not_what_it_must_be_reaches_nobody(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 2 * SMALL)
    wrong: list[list[int]] = [
        [],
        [*sealed_ring(), *sealed_ring()],
        [unsealed],
        [os.open("/dev/null", os.O_RDONLY)],
        list(os.pipe())[:1],
        sealed_ring(SMALL * 2),
    ]
    for fds in wrong:
        refused = a.try_connect("b", 5000, fds=fds)
        assert refused.refusal == "bad-request", refused.text
        assert refused.text.startswith("connect: ")
    refused = a.try_connect("b", 5000, fds=[os.open("/dev/null", os.O_RDONLY)])
    assert refused.text == "connect: a lane's descriptors are memfds", "before anything else is asked of them"
    assert b.quiet()
    assert node.holds("a") == (0, 0, 0, 0, 0)


def test_a_listener_that_answers_with_a_bad_lane_is_cut(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    request = a.start_connect("b", 5000)
    b.accept(fds=[os.open("/dev/null", os.O_RDONLY)])
    assert a.refused(request).refusal == "peer-gone"
    assert b.next("cut")["refusal"] == "bad-request"
    assert node.holds("a") == (0, 0, 0, 0, 0)
    assert node.holds("b") == (0, 0, 0, 0, 1)


# Ports.


def test_a_port_belongs_to_one_program(node: Node, a: Program) -> None:
    a.bind(5000)
    a.bind(5000, partner=node.number("b"))
    with pytest.raises(Refused) as caught:
        a.bind(5000)
    assert caught.value.refusal == "port-in-use"
    with node.attach("a") as other:
        for partner in (2**32 - 1, node.number("b"), node.number("a")):
            with pytest.raises(Refused) as caught:
                other.bind(5000, partner=partner)
            assert caught.value.refusal == "port-in-use"
        a.close_socket()
        assert other.bind(5000) == 5000  # even before the broker has read that `a` is gone
    with node.attach("b") as elsewhere:
        elsewhere.bind(5000)


def test_the_broker_chooses_ports_that_nothing_uses(node: Node, a: Program, b: Program) -> None:
    chosen = [a.bind(0) for _ in range(20)]
    assert len(set(chosen)) == 20
    assert min(chosen) >= 0x8000_0000
    b.bind(1)
    pairs = [a.connect("b", 1, b)[0] for _ in range(20)]
    sources = [ours.fields["from_port"] for ours in pairs]
    assert not {*sources} & {*chosen}
    assert len(set(sources)) == 20
    with pytest.raises(Refused) as caught:
        a.bind(sources[0])
    assert caught.value.refusal == "port-in-use"
    pairs[0].close()
    assert a.bind(sources[0]) == sources[0]


def test_a_source_port_is_one_that_the_program_leased(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    a.bind(77)
    _, theirs = a.connect("b", 5000, b, from_port=77)
    assert theirs.fields["from_port"] == 77
    assert a.try_connect("b", 5000, from_port=78).refusal == "not-yours"
    with node.attach("a") as other:
        assert other.try_connect("b", 5000, from_port=77).refusal == "not-yours"


def test_a_listener_for_a_partner_shadows_one_for_anybody(node: Node, a: Program, b: Program) -> None:
    node.add("c")
    b.bind(5000)
    b.bind(5000, partner=node.number("a"))
    with node.attach("c") as c:
        _, theirs = a.connect("b", 5000, b)
        assert theirs.fields["partner"] == node.number("a")
        _, theirs = c.connect("b", 5000, b)
        assert theirs.fields["partner"] == 2**32 - 1
        b.ask("unbind", port=5000, partner=2**32 - 1)
        assert c.try_connect("b", 5000).refusal == "nobody-listens"
        a.connect("b", 5000, b)


def test_unbinding_what_is_not_bound(node: Node, a: Program, b: Program) -> None:
    b.bind(5000)
    for program, port in ((a, 5000), (b, 5001)):
        with pytest.raises(Refused) as caught:
            program.ask("unbind", port=port, partner=2**32 - 1)
        assert caught.value.refusal == "not-yours"
    with pytest.raises(Refused) as caught:
        b.bind(1, partner=999)
    assert caught.value.refusal == "unknown-domain"
    with pytest.raises(Refused) as caught:
        b.bind(2**32 - 1)
    assert caught.value.refusal == "bad-request"


# Rules.


def test_refuse_says_so_and_drop_looks_as_if_nobody_listened(tmp_path: Path) -> None:
    text = DOMAINS + policy_of(
        'from = "a"\nto = "b"\nports = 1\naction = "refuse"',
        'from = "a"\nto = "b"\nports = 2\naction = "drop"',
        'from = "a"\nto = "b"\nports = "1-9"\naction = "accept"',
        'from = "c"\nto = "b"\naction = "accept"',
    )
    with Node(tmp_path / "run", text) as node, node.attach("a") as a, node.attach("b") as b:
        for port in (1, 2):
            b.bind(port)
        refused = a.try_connect("b", 1)
        assert (refused.refusal, refused.rule) == ("refused-by-rule", 1)
        dropped, absent = a.try_connect("b", 2), a.try_connect("b", 3)
        assert dropped.refusal == absent.refusal == "nobody-listens"
        assert dropped.rule == absent.rule == 0
        assert dropped.text.replace("b:2", "b:3") == absent.text
        default = a.try_connect("c", 1)
        assert (default.refusal, default.rule) == ("refused-by-rule", 0)
        rules = node.broker.policy.rules
        assert [rule.hits for rule in rules] == [1, 1, 1, 0]


def test_a_listener_for_anybody_needs_a_rule(tmp_path: Path) -> None:
    text = DOMAINS + policy_of('from = "a"\nto = "b"\nports = 5\naction = "accept"')
    with Node(tmp_path / "run", text) as node, node.attach("b") as b, node.attach("a") as a:
        with pytest.raises(Refused) as caught:
            b.bind(6)
        assert caught.value.refusal == "wildcard-needs-rule"
        assert b.bind(6, partner=node.number("a")) == 6
        assert a.try_connect("b", 6).refusal == "refused-by-rule"
        assert b.bind(5) == 5


def test_strict_means_that_the_kernel_copies(tmp_path: Path) -> None:
    text = DOMAINS + policy_of('from = "a"\nto = "b"\naction = "accept"\nstrict = true')
    with Node(tmp_path / "run", text) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        other = a.try_connect("b", 5)
        assert (other.refusal, other.text, other.rule) == ("use-carrier", "put", 1)
        required = a.try_connect("b", 5, require=1)
        assert (required.refusal, required.rule) == ("path-unavailable", 1)
        lane = inbox()
        inode, page = (os.fstat(fd).st_ino for fd in lane)
        ours, theirs = a.connect("b", 5, b, carrier="put", fds=lane)
        assert ours.fields["why"] == "same kernel; rule 1 accepts; strict, so the kernel copies"
        # The counters page is between a program and the broker.
        assert len(theirs.fds) == len(ours.fds) == 2
        assert os.fstat(theirs.fds[0]).st_ino == inode
        assert page not in [os.fstat(fd).st_ino for fd in theirs.fds]


def test_a_connection_may_not_be_put_where_policy_says_sealed(a: Program, b: Program) -> None:
    b.bind(5)
    assert a.try_connect("b", 5, carrier="put").text == "sealed"
    assert a.try_connect("b", 5, carrier="put", require=1).refusal == "path-unavailable"


def test_a_new_policy_cuts_what_it_no_longer_allows_and_nothing_else(tmp_path: Path) -> None:
    open_, strict = (
        'from = "{0}"\nto = "b"\naction = "accept"',
        'from = "{0}"\nto = "b"\naction = "accept"\nstrict = true',
    )
    text = DOMAINS + policy_of(open_.format("*"))
    with (
        Node(tmp_path / "run", text) as node,
        node.attach("a") as a,
        node.attach("b") as b,
        node.attach("c") as c,
    ):
        b.bind(5)
        first, its_other = a.connect("b", 5, b)
        second, _ = c.connect("b", 5, b)
        assert node.change_policy(DOMAINS + policy_of(open_.format("a"), open_.format("c"))) == 0
        assert a.quiet()
        assert node.change_policy(DOMAINS + policy_of(open_.format("c"), strict.format("a"))) == 1
        for end, connection in ((a, first), (b, its_other)):
            cut = end.next("cut")
            assert cut["connection"] == connection.number
            assert cut["refusal"] == "refused-by-rule"
            assert "rule 2" in cut["text"]
            assert "strict" in cut["text"]
        assert node.holds("a")[0] == 0
        assert node.holds("b")[0] == node.holds("c")[0] == 1
        refuse = 'from = "c"\nto = "b"\naction = "refuse"'
        request = a.start_connect("b", 5, carrier="put")
        pending = b.next("incoming")
        assert node.change_policy(DOMAINS + policy_of(refuse)) == 1
        cut = c.next("cut")
        assert cut["connection"] == second.number
        assert "rule 1 refuses" in cut["text"]
        assert a.refused(request).refusal == "refused-by-rule"
        b.accept(pending, fds=inbox())
        assert {b.next("cut")["connection"], b.next("cut")["connection"]} == {
            second.number,
            pending["connection"],
        }


def test_a_dropped_connection_is_cut_without_naming_the_rule(tmp_path: Path) -> None:
    text = DOMAINS + policy_of('from = "a"\nto = "b"\naction = "accept"')
    with Node(tmp_path / "run", text) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        a.connect("b", 5, b)
        node.change_policy(DOMAINS + policy_of('from = "a"\nto = "b"\naction = "drop"'))
        cut = a.next("cut")
        assert cut["refusal"] == "peer-gone"
        assert "rule" not in cut["text"]


def test_a_broken_policy_is_refused_whole(tmp_path: Path) -> None:
    text = DOMAINS + policy_of('from = "a"\nto = "b"\naction = "accept"')
    with Node(tmp_path / "run", text) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        a.connect("b", 5, b)
        with pytest.raises(ValueError, match=r"run\.toml:10: rule 2: action: 'fly' is not one of"):
            node.change_policy(
                '[[rule]]\nfrom="*"\nto="*"\naction="refuse"\n\n\n[[rule]]\nfrom="a"\nto="b"\naction="fly"'
            )
        assert node.service.policy_error is not None
        assert a.quiet()
        a.connect("b", 5, b)


def test_a_policy_file_is_watched(tmp_path: Path) -> None:
    with Node(tmp_path / "run", DOMAINS) as node:
        assert node.policy_path is not None
        node.policy_path.write_text('[[domain]]\nname = "d"')
        node.do(node.service.look_at_policy)
        assert set(node.broker.domains) == {"d"}
        node.policy_path.write_text("broken")
        node.do(node.service.look_at_policy)
        node.do(node.service.look_at_policy)
        assert set(node.broker.domains) == {"d"}
        assert node.service.reloads == {"ok": 1, "failed": 1}
        node.policy_path.unlink()
        node.do(node.service.look_at_policy)
        assert set(node.broker.domains) == {"d"}


def test_a_domain_that_changes_its_group_is_judged_anew(tmp_path: Path) -> None:
    with Node(tmp_path / "run", DOMAINS) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        a.connect("b", 5, b)
        assert node.change_policy('[[domain]]\nname = "a"\n[[domain]]\nname = "b"\ngroup = "other"') == 1
        assert a.next("cut")["refusal"] == "refused-by-rule"
        assert a.try_connect("b", 5).refusal == "refused-by-rule"
        assert not node.door("c").exists()


def test_a_domain_that_changes_its_user_is_another_domain(tmp_path: Path) -> None:
    with Node(tmp_path / "run", DOMAINS) as node, node.attach("a") as a:
        before = node.number("a")
        node.change_policy(DOMAINS.replace('name = "a"\n', f'name = "a"\nuid = {os.geteuid()}\n'))
        assert a.ended()
        assert node.number("a") > before
        with node.attach("a"):
            pass


def test_removing_a_domain_cuts_its_connections_and_sends_its_programs_away(
    node: Node, a: Program, b: Program
) -> None:
    b.bind(5)
    ours, _ = a.connect("b", 5, b)
    node.do(lambda: node.broker.remove_domain("b"))
    cut = a.next("cut")
    assert (cut["connection"], cut["refusal"]) == (ours.number, "domain-removed")
    assert b.next("cut")["refusal"] == "domain-removed"
    assert b.ended()
    assert not node.door("b").parent.exists()
    assert a.try_connect("b", 5).refusal == "unknown-domain"
    before = node.number("a")
    node.add("b")
    assert node.number("b") > max(before, 2)


# Limits.


def limited(tmp_path: Path, **limits: int) -> Node:
    inner = ", ".join(f"{name} = {value}" for name, value in limits.items())
    text = DOMAINS.replace('name = "a"\n', f'name = "a"\nlimits = {{ {inner} }}\n')
    return Node(tmp_path / "run", text)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("connections", 2),
        ("connections_per_peer", 2),
        ("lanes", 4),
        ("memory", 2 * SMALL),
        ("memory", 3 * SMALL - 1),
    ],
)
def test_a_limit_holds_for_the_one_who_connects(tmp_path: Path, limit: str, value: int) -> None:
    with limited(tmp_path, **{limit: value}) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        first, _ = a.connect("b", 5, b)
        a.connect("b", 5, b)
        for _ in range(2):
            refused = a.try_connect("b", 5)
            assert refused.refusal == "limit-reached"
            assert refused.text == f"{limit}: domain a may hold {value}"
        first.close()
        a.connect("b", 5, b)


def test_a_limit_holds_for_the_one_who_listens(tmp_path: Path) -> None:
    with limited(tmp_path, connections=1) as node, node.attach("a") as a, node.attach("b") as b:
        a.bind(5)
        _, theirs = b.connect("a", 5, a)
        assert b.try_connect("a", 5).text == "connections: domain a may hold 1"
        theirs.close()
        settled(a)
        b.connect("a", 5, a)


def test_a_listener_pays_for_its_own_ring_only(tmp_path: Path) -> None:
    with limited(tmp_path, memory=SMALL - 1) as node, node.attach("a") as a, node.attach("b") as b:
        a.bind(5)
        request = b.start_connect("a", 5, large=1 << 20)
        a.accept()
        refused = b.refused(request)
        assert refused.text == f"memory: domain a may hold {SMALL - 1}"
        assert a.next("cut")["refusal"] == "limit-reached"
        assert node.holds("a") == (0, 0, 0, 0, 1)
        assert node.holds("b") == (0, 0, 0, 0, 0)


def test_pending_connections_are_bounded(tmp_path: Path) -> None:
    with limited(tmp_path, pending=3) as node, node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        requests = [a.start_connect("b", 5) for _ in range(3)]
        assert a.try_connect("b", 5).text == "pending: domain a may hold 3"
        for request in requests:
            b.accept()
            assert a.answer(request)[0] == "connected"
        a.connect("b", 5, b)


def test_ports_rings_and_programs_are_bounded(tmp_path: Path) -> None:
    with limited(tmp_path, ports=2, ring=1 << 20, attachments=2) as node:
        with node.attach("a") as a, node.attach("a"), node.attach("b") as b:
            assert a.welcome["ring_max"] == 1 << 20
            a.bind(1)
            a.bind(2)
            with pytest.raises(Refused, match="ports: domain a may hold 2"):
                a.bind(3)
            b.bind(5)
            assert "ring: " in a.try_connect("b", 5, large=2 << 20).text
            with (
                node.attach("a", hello=False) as third,
                pytest.raises(Refused, match="attachments: domain a may hold 2"),
            ):
                third.answer(0)
        eventually(lambda: not node.broker.domains["a"].attachments)
        with node.attach("a"):
            pass


# Status.


def test_a_tenant_sees_its_own_domain_and_nothing_else(node: Node, a: Program, b: Program) -> None:
    node.add("secret", group="other")
    with node.attach("secret") as hidden:
        hidden.bind(99)
        b.bind(5000)
        pairs: list[Connection] = [a.connect("b", 5000, b)[0] for _ in range(40)]
        report = a.status()
        assert report["domain"] == "a"
        assert report["ports"] == []
        assert len(report["connections"]) == 40
        first = report["connections"][0]
        assert first["peer"] == "b"
        assert first["path"] == "sealed"
        assert first["why"].startswith("same kernel; ")
        assert "secret" not in str(report)
        assert {c["connection"] for c in report["connections"]} == {f"{p.number:016x}" for p in pairs}
        assert report["traffic"]["sealed"]["connections"] == 40
        assert b.status()["ports"] == [{"port": 5000, "kind": "stream", "partner": None, "pid": os.getpid()}]


def test_counts_of_a_lane_reach_the_accounts(node: Node, a: Program, b: Program) -> None:
    class Known:
        def read(self) -> tuple[int, int, int, int]:
            return (100, 2, 30, 1)

    b.bind(5000)
    ours, _ = a.connect("b", 5000, b)
    (connection,) = node.broker.introductions.connections.values()
    connection.opener.counters = Known()  # type: ignore[assignment]
    live = a.status()
    assert live["connections"][0]["sent_bytes"] == 100
    assert live["traffic"]["sealed"]["received_bytes"] == 30
    ours.close()
    ended = a.status()
    assert ended["connections"] == []
    assert ended["traffic"]["sealed"] == {
        "connections": 1,
        "sent_bytes": 100,
        "sent_messages": 2,
        "received_bytes": 30,
        "received_messages": 1,
    }


def test_one_neighbour_cannot_fill_all_places_of_a_slow_listener(tmp_path: Path) -> None:
    policy = (
        "[limits]\npending = 8\npending_per_peer = 3\n[[rule]]\nfrom = '*'\nto = '*'\naction = 'accept'\n"
    )
    with Node(tmp_path / "run", policy) as node:
        node.add("slow", "greedy", "modest")
        with node.attach("slow") as slow, node.attach("greedy") as greedy, node.attach("modest") as modest:
            port = slow.bind(backlog=64)
            for _ in range(3):
                greedy.start_connect("slow", port)
            refused = greedy.try_connect("slow", port)
            assert refused.refusal == "limit-reached"
            assert "pending_per_peer" in refused.text
            modest.start_connect("slow", port)
            for _ in range(4):
                slow.next("incoming")
