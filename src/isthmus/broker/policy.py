"""Who may talk to whom: ordered rules, first match, closed unless a rule opens.

Pure: text in, decisions out; no file, no socket, no clock. The page for people who write policies is
docs/reference/policy.md. The idea is V4V's rule table with its defects left out: the source is the door a
program came through and never what a packet says, a rule decides about the whole connection and not about one
direction of it, what no rule opens is closed, and every rule counts what it decided.

A policy is read whole or not at all: everything wrong with it is a `PolicyError` that names the line and the
field.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from isthmus._native import check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Action = Literal["accept", "refuse", "drop"]
#: What a domain is: programs of this kernel, or a virtual machine.
Kind = Literal["container", "vm"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ACTIONS: tuple[Action, ...] = ("accept", "refuse", "drop")
KINDS: tuple[Kind, ...] = ("container", "vm")
PORT_MAX = 2**32 - 1
#: A policy that is longer is a mistake; the limit keeps reading it quick.
TEXT_MAX_BYTES = 1024 * 1024
#: Decisions remembered between changes of the policy, so that a long rule list costs a connect nothing.
REMEMBERED_MAX = 4096
GROUP_DEFAULT = "default"
CLASS_MAX = 7
WEIGHT_MAX = 1000
#: Of a rule that names none.
WEIGHT_DEFAULT = 100

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_RATES = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}


class PolicyError(ValueError):
    """The policy cannot be used; nothing of it was taken over."""


class Party(Protocol):
    """What a rule can see of a domain."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one domain may hold at a time."""

    connections: int = 4096
    #: Of those, with any one other domain, so that one neighbour cannot take all the places.
    connections_per_peer: int = 2048
    lanes: int = 8192
    ports: int = 1024
    #: Bytes; what the rings that the domain brings may grow to.
    memory: int = 8 << 30
    #: Bytes; the largest single ring.
    ring: int = 256 << 20
    attachments: int = 256
    control_messages_per_second: int = 20_000
    control_messages_burst: int = 2_000
    pending: int = 512
    pending_per_peer: int = 256


#: Fields that may be written with a unit, and the largest value of each field that has one.
_BYTES = frozenset({"memory", "ring"})
_LARGEST = {
    "ring": PORT_MAX,
    "attachments": 65_536,
    "pending": 65_536,
    "pending_per_peer": 65_536,
    "ports": 1 << 20,
    "connections": 1 << 20,
}


@dataclass(slots=True, eq=False)
class Rule:
    """One line of the list. `number` is its place in the file from 1; 0 is the built-in rule."""

    number: int
    source: str
    destination: str
    ports: tuple[tuple[int, int], ...]
    action: Action
    strict: bool = False
    same_group: bool = False
    priority: int | None = None
    weight: int | None = None
    #: Bits per second.
    rate: int | None = None
    hits: int = 0

    def covers(self, port: int) -> bool:
        return not self.ports or any(low <= port <= high for low, high in self.ports)

    def matches(self, source: Party, destination: Party, port: int) -> bool:
        return (
            _fits(self.source, source)
            and _fits(self.destination, destination)
            and (not self.same_group or source.group == destination.group)
            and self.covers(port)
        )

    @property
    def says(self) -> str:
        """The rule as `explain` and the logs name it."""
        return f"rule {self.number}" if self.number else "the built-in rule"

    @property
    def unenforced(self) -> tuple[str, ...]:
        """Settings that mean something only where somebody stands between the two ends."""
        settings = (("class", self.priority), ("weight", self.weight), ("rate", self.rate))
        return tuple(name for name, value in settings if value is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What becomes of a connection. `why` is the reason in words, without the names of the parties."""

    action: Action
    #: Number of the rule that decided; 0 is the built-in rule, or that no rule matched (`matched` is None).
    rule: int
    strict: bool
    why: str
    matched: Rule | None

    @property
    def accepted(self) -> bool:
        return self.action == "accept"


@dataclass(frozen=True, slots=True)
class DomainEntry:
    """A domain that the policy file declares."""

    name: str
    group: str
    uid: int | None
    limits: Limits
    kind: Kind = "container"
    addresses: tuple[Network, ...] = ()


NO_RULE = Decision("refuse", 0, False, "no rule accepts it", None)


def built_in_rule() -> Rule:
    """What holds where the policy has no rules: members of one group may talk to each other."""
    return Rule(0, "*", "*", (), "accept", same_group=True)


@dataclass(slots=True)
class Policy:
    """A whole policy, ready to decide."""

    domains: dict[str, DomainEntry] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=lambda: [built_in_rule()])
    limits: Limits = field(default_factory=Limits)
    #: Connections that a rule refused or dropped, and those that no rule matched.
    rejects: int = 0
    _remembered: dict[tuple[str, str, int], Decision] = field(default_factory=dict, repr=False)

    def look(self, source: Party, destination: Party, port: int) -> Decision:
        """Decide without counting. Pure for one policy, but see `forget`."""
        key = (source.name, destination.name, port)
        known = self._remembered.get(key)
        if known is not None:
            return known
        decision = NO_RULE
        for rule in self.rules:
            if rule.matches(source, destination, port):
                decision = Decision(rule.action, rule.number, rule.strict, _why(rule), rule)
                break
        if len(self._remembered) >= REMEMBERED_MAX:
            self._remembered.clear()
        self._remembered[key] = decision
        return decision

    def decide(self, source: Party, destination: Party, port: int) -> Decision:
        """Decide about a connection that somebody asks for, and count it."""
        decision = self.look(source, destination, port)
        if decision.matched is not None:
            decision.matched.hits += 1
        if decision.action != "accept":
            self.rejects += 1
        return decision

    def forget(self) -> None:
        """Call when a domain comes, goes or changes its group."""
        self._remembered.clear()

    def reachable(self, destination: Party, port: int) -> bool:
        """Whether some rule could let some source reach this port; a listener for anybody needs that."""
        for rule in self.rules:
            if not (_fits(rule.destination, destination) and rule.covers(port)):
                continue
            if rule.action == "accept":
                return True
            if rule.source == "*" and not rule.same_group:
                return False
        return False

    def segments(self, source: Party, destination: Party) -> list[tuple[int, int, Decision]]:
        """All ports, in ranges for each of which one decision holds."""
        edges = {1}
        for rule in self.rules:
            for low, high in rule.ports:
                edges.update((low, high + 1))
        starts = sorted(edge for edge in edges if edge <= PORT_MAX)
        found: list[tuple[int, int, Decision]] = []
        for low, after in zip(starts, [*starts[1:], PORT_MAX + 1], strict=True):
            decision = self.look(source, destination, low)
            if found and found[-1][2].matched is decision.matched:
                found[-1] = (found[-1][0], after - 1, decision)
            else:
                found.append((low, after - 1, decision))
        return found

    def notes(self, known_domains: Iterable[str] = ()) -> list[str]:
        """What the operator should know about a policy that is otherwise right."""
        names = {*self.domains, *known_domains}
        found = []
        for rule in self.rules:
            if rule.unenforced:
                found.append(
                    f"{rule.says}: {', '.join(rule.unenforced)} not enforced inside a node: "
                    "on sealed and put lanes nobody stands between the two ends"
                )
            for key, who in (("from", rule.source), ("to", rule.destination)):
                if who != "*" and not who.startswith("group:") and who not in names:
                    found.append(f"{rule.says}: {key}: there is no domain {who!r} yet")
        return found


def _fits(pattern: str, party: Party) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("group:"):
        return party.group == pattern[6:]
    return party.name == pattern


def _why(rule: Rule) -> str:
    verb = {"accept": "accepts", "refuse": "refuses", "drop": "drops"}[rule.action]
    return f"{rule.says} {verb}" if rule.number else "the built-in rule accepts members of one group"


# Reading. A `_Place` knows where in the file it is, so that no check has to compose its own complaint.


@dataclass(frozen=True, slots=True)
class _Place:
    text: str
    origin: str
    table: str = ""
    index: int = 0

    def wrong(self, key: str, reason: str) -> PolicyError:
        line = _line_of(self.text, self.table, self.index, key)
        at = f"{self.origin}:{line}" if line else self.origin
        where = f"{self.table} {self.index}" if self.index else self.table
        return PolicyError(": ".join(part for part in (at, where, key, reason) if part))


def parse(text: str, origin: str = "policy") -> Policy:
    """Read a policy.

    Parameters
    ----------
    text : str
        TOML, at most `TEXT_MAX_BYTES`.
    origin : str
        What errors call the text, usually the path of its file.

    Raises
    ------
    PolicyError
        Anything is wrong; says where.
    """
    if len(text) > TEXT_MAX_BYTES:
        raise PolicyError(f"{origin}: a policy has at most {TEXT_MAX_BYTES} bytes")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise PolicyError(f"{origin}: nested too deeply") from None
    except ValueError as error:
        raise PolicyError(f"{origin}: not TOML: {error}") from None
    top = _Place(text, origin)
    _known_keys(document, {"domain", "rule", "limits"}, top)
    limits = _limits(document.get("limits", {}), Limits(), _Place(text, origin, "limits"), "")
    policy = Policy(limits=limits)
    for index, entry in enumerate(_tables(document, "domain", top), 1):
        domain = _domain(entry, limits, _Place(text, origin, "domain", index))
        if domain.name in policy.domains:
            raise _Place(text, origin, "domain", index).wrong("name", f"{domain.name!r} is declared twice")
        policy.domains[domain.name] = domain
    rules = [
        _rule(e, i, _Place(text, origin, "rule", i)) for i, e in enumerate(_tables(document, "rule", top), 1)
    ]
    if rules:
        policy.rules = rules
    return policy


def _domain(entry: Mapping[str, Any], limits: Limits, place: _Place) -> DomainEntry:
    _known_keys(entry, {"name", "group", "uid", "kind", "addresses", "limits"}, place)
    if "name" not in entry:
        raise place.wrong("", "a domain needs a name")
    uid = None if "uid" not in entry else _number(entry, "uid", place, 0, 2**32 - 2)
    return DomainEntry(
        _name(entry["name"], "name", place),
        _name(entry.get("group", GROUP_DEFAULT), "group", place),
        uid,
        _limits(entry.get("limits", {}), limits, place, "limits"),
        _kind(entry.get("kind", "container"), place),
        _addresses(entry.get("addresses", []), place),
    )


def parse_network(text: object) -> Network:
    """An address or a network, such as 10.0.0.7, fd00::7 or 10.0.3.0/24.

    Raises
    ------
    ValueError
        It is none; says why.
    """
    if not isinstance(text, str):
        raise ValueError(f"{_short(text)} is not an address or a network, such as 10.0.0.7 or 10.0.3.0/24")
    network = ipaddress.ip_network(text)
    if network.is_loopback or network.is_multicast or network.network_address.is_unspecified:
        raise ValueError(f"{text!r} is nobody's own")
    return network


def _addresses(value: Any, place: _Place) -> tuple[Network, ...]:
    entries = value if isinstance(value, list) else [value]
    try:
        return tuple(parse_network(entry) for entry in entries)
    except ValueError as error:
        raise place.wrong("addresses", str(error)) from None


def _kind(value: Any, place: _Place) -> Kind:
    for kind in KINDS:
        if value == kind:
            return kind
    raise place.wrong("kind", f"{_short(value)} is not one of {', '.join(KINDS)}")


def _rule(entry: Mapping[str, Any], number: int, place: _Place) -> Rule:
    known = {"from", "to", "ports", "action", "strict", "same_group", "class", "weight", "rate"}
    _known_keys(entry, known, place)
    for key in ("from", "to", "action"):
        if key not in entry and not (key != "action" and entry.get("same_group") is True):
            raise place.wrong("", f"a rule needs {key!r}")
    action = entry["action"]
    if action not in ACTIONS:
        raise place.wrong("action", f"{_short(action)} is not one of accept, refuse, drop")
    strict = _truth(entry, "strict", place)
    if strict and action != "accept":
        raise place.wrong("strict", f"means nothing beside action {action!r}")
    return Rule(
        number,
        _who(entry.get("from", "*"), "from", place),
        _who(entry.get("to", "*"), "to", place),
        _ports(entry["ports"], place) if "ports" in entry else (),
        action,
        strict,
        _truth(entry, "same_group", place),
        _number(entry, "class", place, 0, CLASS_MAX) if "class" in entry else None,
        _number(entry, "weight", place, 1, WEIGHT_MAX) if "weight" in entry else None,
        _rate(entry["rate"], place) if "rate" in entry else None,
    )


def _limits(entry: Any, base: Limits, place: _Place, key: str) -> Limits:
    if not isinstance(entry, dict):
        raise place.wrong(key, "must be a table")
    names = [f.name for f in fields(Limits)]
    _known_keys(entry, set(names), place)
    values = {name: getattr(base, name) for name in names}
    for name in entry:
        if name in _BYTES and isinstance(entry[name], str):
            values[name] = _bytes(entry[name], name, place)
        else:
            values[name] = _number(entry, name, place, 0, 2**63 - 1)
        if values[name] > _LARGEST.get(name, 2**63 - 1):
            raise place.wrong(name, f"is at most {_LARGEST[name]}")
    for name in ("control_messages_per_second", "control_messages_burst"):
        if values[name] < 1:
            raise place.wrong(name, "is at least 1, or the domain could say nothing at all")
    return Limits(**values)


def _known_keys(entry: Mapping[str, Any], known: set[str], place: _Place) -> None:
    for key in entry:
        if key not in known:
            raise place.wrong(_short_key(key), f"is not known here; there are {', '.join(sorted(known))}")


def _tables(document: Mapping[str, Any], key: str, place: _Place) -> list[Mapping[str, Any]]:
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise place.wrong(key, f"write [[{key}]] above each one")
    return found


def _name(value: Any, key: str, place: _Place) -> str:
    if not isinstance(value, str):
        raise place.wrong(key, f"{_short(value)} is not a name")
    try:
        check_name(value)
    except ValueError as error:
        raise place.wrong(key, str(error)) from None
    return value


def _who(value: Any, key: str, place: _Place) -> str:
    if value == "*":
        return "*"
    if isinstance(value, str) and value.startswith("group:"):
        return "group:" + _name(value[6:], key, place)
    if not isinstance(value, str):
        raise place.wrong(key, f'{_short(value)} is not the name of a domain, "group:NAME" or "*"')
    return _name(value, key, place)


def _truth(entry: Mapping[str, Any], key: str, place: _Place) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise place.wrong(key, f"{_short(value)} is not true or false")
    return value


def _number(entry: Mapping[str, Any], key: str, place: _Place, low: int, high: int) -> int:
    value = entry[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise place.wrong(key, f"{_short(value)} is not a number from {low} to {high}")
    return value


def _bytes(value: str, key: str, place: _Place) -> int:
    found = re.fullmatch(r"([0-9]{1,15})\s?([A-Za-z]*)", value)
    if found is None or found[2] not in _UNITS:
        raise place.wrong(key, f"{_short(value)} is not a size such as 8GiB, 512MiB or 65536")
    return int(found[1]) * _UNITS[found[2]]


def _rate(value: Any, place: _Place) -> int:
    found = (
        re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s?([A-Za-z]+)", value)
        if isinstance(value, str)
        else None
    )
    if found is None or found[2] not in _RATES:
        raise place.wrong("rate", f"{_short(value)} is not a rate such as 10Gbit, 500Mbit or 64kbit")
    rate = round(float(found[1]) * _RATES[found[2]])
    if rate < 1:
        raise place.wrong("rate", "is at least 1bit")
    return rate


def _ports(value: Any, place: _Place) -> tuple[tuple[int, int], ...]:
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise place.wrong("ports", "is empty; leave it out for all ports")
    return tuple(_port_range(entry, place) for entry in entries)


def _port_range(value: Any, place: _Place) -> tuple[int, int]:
    low = high = -1
    if isinstance(value, int) and not isinstance(value, bool):
        low = high = value
    elif isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", value)
        if found is not None:
            low = int(found[1])
            high = int(found[2] or found[1])
    if not 1 <= low <= high <= PORT_MAX:
        raise place.wrong(
            "ports", f'{_short(value)} is not a port, "5000-5100" or a list of those (1 to {PORT_MAX})'
        )
    return low, high


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _short_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", key) else _short(key)


def _line_of(text: str, table: str, index: int, key: str) -> int | None:
    """Line of a key, best effort: TOML's reader does not tell, and an error is nicer with it."""
    lines = text.splitlines()
    names_key = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    header = re.compile(rf"\s*\[\[?\s*{re.escape(table)}[\s.\]]")
    begin, count = 0, 0
    if table:
        for number, line in enumerate(lines):
            if header.match(line) and (not index or line.lstrip().startswith("[[")):
                count += 1
                begin = number + 1
                if not index or count == index:
                    break
        else:
            return None
    if key:
        for number in range(begin, len(lines)):
            if names_key.match(lines[number]):
                return number + 1
            if index and lines[number].lstrip().startswith("[["):
                break
    return begin or None
