"""Who may talk to whom: the rules, without a broker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.broker.policy import PORT_MAX, Limits, Policy, PolicyError, built_in_rule, parse


@dataclass(frozen=True)
class Who:
    name: str
    group: str = "default"


A, B, C = Who("a"), Who("b"), Who("c", "other")


def decide(policy: Policy, source: Who, destination: Who, port: int = 5000) -> tuple[str, int]:
    decision = policy.decide(source, destination, port)
    return decision.action, decision.rule


def test_without_rules_members_of_one_group_may_talk() -> None:
    for policy in (Policy(), parse(""), parse("[[domain]]\nname = 'a'")):
        assert decide(policy, A, B) == ("accept", 0)
        assert decide(policy, A, A) == ("accept", 0)
        assert decide(policy, A, C) == ("refuse", 0)


def test_one_rule_closes_everything_it_does_not_open() -> None:
    policy = parse('[[rule]]\nfrom = "a"\nto = "b"\naction = "accept"')
    assert decide(policy, A, B) == ("accept", 1)
    assert decide(policy, B, A) == ("refuse", 0)
    assert decide(policy, A, A) == ("refuse", 0)


RULES = """
[[rule]]
from = "a"
to = "b"
ports = [22, "5000-5100"]
action = "refuse"

[[rule]]
from = "group:default"
to = "*"
ports = 6000
action = "drop"

[[rule]]
from = "*"
to = "b"
action = "accept"
strict = true

[[rule]]
same_group = true
action = "accept"
"""


def test_the_first_rule_that_matches_decides() -> None:
    policy = parse(RULES)
    assert decide(policy, A, B, 22) == ("refuse", 1)
    assert decide(policy, A, B, 5100) == ("refuse", 1)
    assert decide(policy, A, B, 5101) == ("accept", 3)
    assert decide(policy, A, B, 6000) == ("drop", 2)
    assert decide(policy, C, B, 6000) == ("accept", 3)
    assert decide(policy, B, A, 1) == ("accept", 4)
    assert decide(policy, C, A, 1) == ("refuse", 0)
    assert policy.look(C, B, 1).strict
    assert not policy.look(B, A, 1).strict


def test_every_rule_counts_what_it_decided() -> None:
    policy = parse(RULES)
    for port in (22, 22, 6000, 7, 8, 9):
        policy.decide(A, B, port)
    policy.decide(C, A, 1)
    policy.look(A, B, 22)
    assert [rule.hits for rule in policy.rules] == [2, 1, 3, 0]
    assert policy.rejects == 4


def test_a_listener_for_anybody_needs_a_rule_that_could_let_somebody_in() -> None:
    policy = parse(
        """
        [[rule]]
        from = "*"
        to = "b"
        ports = 1
        action = "refuse"
        [[rule]]
        from = "a"
        to = "b"
        ports = "1-2"
        action = "accept"
        """
    )
    assert not policy.reachable(B, 1)
    assert policy.reachable(B, 2)
    assert not policy.reachable(B, 3)
    assert not policy.reachable(A, 2)
    assert Policy().reachable(A, 7)


def test_segments_cover_all_ports_and_agree_with_decisions() -> None:
    policy = parse(RULES)
    for source, destination in ((A, B), (B, A), (C, B), (A, A)):
        segments = policy.segments(source, destination)
        assert segments[0][0] == 1
        assert segments[-1][1] == PORT_MAX
        assert [low for low, _, _ in segments[1:]] == [high + 1 for _, high, _ in segments[:-1]]
        for low, high, decision in segments:
            assert policy.look(source, destination, low).matched is decision.matched
            assert policy.look(source, destination, high).matched is decision.matched


def test_what_is_remembered_is_bounded_and_forgotten() -> None:
    policy = parse("[[rule]]\nfrom='group:default'\nto='*'\naction='accept'")
    for port in range(1, 10_000):
        policy.look(A, B, port)
    assert len(policy._remembered) <= 4096
    moved = Who("a", "elsewhere")
    assert policy.look(A, B, 1).accepted
    policy.forget()
    assert not policy.look(moved, B, 1).accepted


def test_domains_and_limits() -> None:
    policy = parse(
        """
        [limits]
        connections = 10
        memory = "2GiB"
        [[domain]]
        name = "web"
        group = "front"
        uid = 1000
        limits = { memory = 4096, ports = 3 }
        [[domain]]
        name = "db"
        """
    )
    assert policy.limits == Limits(connections=10, memory=2 << 30)
    assert policy.domains["web"].limits == Limits(connections=10, memory=4096, ports=3)
    assert policy.domains["web"].group == "front"
    assert policy.domains["web"].uid == 1000
    assert policy.domains["db"].limits == policy.limits
    assert policy.domains["db"].group == "default"


WRONG = {
    "rule = 3": "rule: write [[rule]] above each one",
    "[[rule]]\nfrom='a'\nto='b'": "rule 1: a rule needs 'action'",
    "[[rule]]\nfrom='a'\naction='accept'": "rule 1: a rule needs 'to'",
    "\n[[rule]]\nfrom='a'\nto='b'\naction='allow'": "p:5: rule 1: action: 'allow' is not one of",
    "[[rule]]\nsame_group=true\naction='accept'\n[[rule]]\nfrom=1": "rule 2: a rule needs 'to'",
    "[[rule]]\nfrom=1\nto='*'\naction='drop'": "p:2: rule 1: from: 1 is not the name",
    "[[rule]]\nfrom='A'\nto='*'\naction='drop'": 'p:2: rule 1: from: name "A"',
    "[[rule]]\nfrom='group:'\nto='*'\naction='drop'": 'p:2: rule 1: from: name "": the name is empty',
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nports=[]": "p:5: rule 1: ports: is empty",
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nports=0": "p:5: rule 1: ports: 0 is not a port",
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nports=true": "ports: True is not a port",
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nports='9-3'": "ports: '9-3' is not a port",
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nports=4294967296": "is not a port",
    "[[rule]]\nfrom='*'\nto='*'\naction='drop'\nstrict=true": "strict: means nothing beside action 'drop'",
    "[[rule]]\nfrom='*'\nto='*'\naction='accept'\nstrict='yes'": "strict: 'yes' is not true or false",
    "[[rule]]\nfrom='*'\nto='*'\naction='accept'\nclass=9": "class: 9 is not a number from 0 to 7",
    "[[rule]]\nfrom='*'\nto='*'\naction='accept'\nrate='fast'": "rate: 'fast' is not a rate such as",
    "[[rule]]\nfrom='*'\nto='*'\naction='accept'\nrate='0bit'": "rate: is at least 1bit",
    "[[rule]]\nfrom='*'\nto='*'\naction='accept'\nprot=1": "p:5: rule 1: prot: is not known here",
    "[[domain]]\ngroup='a'": "domain 1: a domain needs a name",
    "[[domain]]\nname='a'\n[[domain]]\nname='a'": "p:4: domain 2: name: 'a' is declared twice",
    "[[domain]]\nname='a'\nuid=-1": "uid: -1 is not a number",
    "[[domain]]\nname='a'\nlimits=3": "limits: must be a table",
    "[limits]\nmemory='8 gigs'": "p:2: limits: memory: '8 gigs' is not a size",
    "[limits]\nring='5GiB'": "ring: is at most 4294967295",
    "[limits]\nconnections=-1": "connections: -1 is not a number",
    "[limits]\ncontrol_messages_burst=0": "is at least 1",
    "limit = 3": "p:1: limit: is not known here; there are domain, limits, rule",
    "x = ": "not TOML",
    "[" * 5000: "not TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_its_place(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text, "p")
    message = str(caught.value)
    assert message.startswith("p")
    assert WRONG[text] in message or (text.startswith("[[[[") and "nested too deeply" in message)
    assert "\n" not in message.rstrip() or "TOML" in message


def test_settings_that_nothing_enforces_are_said_aloud() -> None:
    policy = parse(
        """
        [[rule]]
        from = "a"
        to = "nobody"
        action = "accept"
        class = 3
        weight = 10
        rate = "2.5Gbit"
        """
    )
    assert policy.rules[0].rate == 2_500_000_000
    notes = policy.notes({"a"})
    assert any("class, weight, rate not enforced" in note for note in notes)
    assert any("there is no domain 'nobody' yet" in note for note in notes)
    assert built_in_rule().unenforced == ()


words = st.sampled_from(
    [
        "a",
        "b",
        "*",
        "group:a",
        "group:",
        "accept",
        "drop",
        "refuse",
        "5-6",
        "6-5",
        "1",
        "8GiB",
        "10Gbit",
        "",
        "ä",
    ]
)
values = st.recursive(
    words | st.integers() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
keys = st.sampled_from(
    [
        "name", "group", "uid", "limits", "from", "to", "ports", "action", "strict", "same_group", "class",
        "weight", "rate", "connections", "memory", "ring", "x",
    ]
)  # fmt: skip


def toml(value: object) -> str:
    """Enough of a TOML writer to reach every check with every type."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    if isinstance(value, str):
        return (
            '"' + "".join(f"\\U{ord(c):08x}" if not 0xD800 <= ord(c) < 0xE000 else "?" for c in value) + '"'
        )
    if isinstance(value, list):
        return "[" + ",".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return str(value)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["[[rule]]", "[[domain]]", "[limits]"]), st.dictionaries(keys, values, max_size=6)
        ),
        max_size=4,
    )
)
def test_a_policy_is_read_whole_or_refused_by_name(tables: list[tuple[str, dict[str, object]]]) -> None:
    text = "\n".join(
        head + "\n" + "\n".join(f"{k} = {toml(v)}" for k, v in table.items()) for head, table in tables
    )
    try:
        policy = parse(text)
    except PolicyError as error:
        said = str(error)
    else:
        said = "policy"
        assert policy.look(A, B, 1).action in ("accept", "refuse", "drop")
        policy.notes()
        policy.segments(A, C)
    assert said.startswith("policy")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin-1")))
@example("[[rule]]\n" * 3)
@example("a." * 3000 + "b = 1")
@example("n = " + "9" * 5000)
@example("a = " + "{a = " * 3000)
def test_garbage_is_refused_and_never_surprises(text: str) -> None:
    try:
        parse(text)
        said = "policy"
    except PolicyError as error:
        said = str(error)
    assert said.startswith("policy")


def test_the_page_about_policies_lists_every_limit_and_its_example_is_a_policy() -> None:
    page = (Path(__file__).parents[1] / "docs/reference/policy.md").read_text()
    for name in Limits.__dataclass_fields__:
        assert f"`{name}`" in page, name
    blocks = [block.partition("\n")[2] for block in page.split("```toml")[1:]]
    assert blocks
    for block in blocks:
        parse(block.partition("```")[0])


def test_a_domain_is_a_container_unless_the_file_says_vm() -> None:
    policy = parse('[[domain]]\nname = "a"\n[[domain]]\nname = "b"\nkind = "vm"\n', "p.toml")
    assert [policy.domains[name].kind for name in "ab"] == ["container", "vm"]
    with pytest.raises(PolicyError, match=r"p\.toml:3: .*kind.*'pod' is not one of container, vm"):
        parse('[[domain]]\nname = "a"\nkind = "pod"\n', "p.toml")
