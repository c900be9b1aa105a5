"""Which domain has an IP address now.

The operator gives addresses and networks to domains (``addresses`` in the policy); nobody else can. A
single address belongs to its domain as long as that exists. Inside a network that was given to it, a
domain's programs say which addresses they have, and are believed for a while: so an address can move from
one domain to another without the operator. Two that claim the same address have none of it.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .answers import Fault, Refuse

if TYPE_CHECKING:
    from .attachment import Attachment
    from .directory import Domain

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: How long a claim holds; programs repeat theirs three times as often.
LEASE_S = 30.0
#: Addresses that one program may claim.
CLAIMS_MAX = 64


class Addresses:
    """All addresses of the node's domains."""

    def __init__(self, domains: Callable[[], Iterable[Domain]], clock: Callable[[], float]) -> None:
        self._domains = domains
        self._clock = clock
        #: Who claims an address, and until when.
        self._claims: dict[Address, dict[Attachment, float]] = {}

    def claim(self, attachment: Attachment, text: str) -> None:
        """Take over what a program says its network's addresses are, as far as they are its domain's.

        Raises
        ------
        Fault
            That is no list of addresses.
        """
        words = text.split()
        if len(words) > CLAIMS_MAX:
            raise Fault(f"addresses: more than {CLAIMS_MAX}")
        try:
            claimed = {parse(word) for word in words}
        except ValueError:
            raise Fault("addresses: not a list of IP addresses") from None
        self.forget(attachment)
        until = self._clock() + LEASE_S
        for address in claimed:
            if owns(attachment.domain, address):
                self._claims.setdefault(address, {})[attachment] = until

    def forget(self, attachment: Attachment) -> None:
        """Whatever this program claimed, it does no more."""
        for address in [address for address, claims in self._claims.items() if attachment in claims]:
            del self._claims[address][attachment]
            if not self._claims[address]:
                del self._claims[address]

    def owner(self, address: Address) -> Domain | None:
        """The domain that has this address now.

        Raises
        ------
        Refuse
            More than one might.
        """
        found = {d for d in self._domains() if any(_is_single(n) and address in n for n in d.addresses)}
        if not found:
            now = self._clock()
            claims = self._claims.get(address, {})
            found = {a.domain for a, until in claims.items() if until > now and owns(a.domain, address)}
        if len(found) > 1:
            names = " and ".join(sorted(domain.name for domain in found))
            raise Refuse("unknown-domain", f"{address}: {names} both have this address")
        return next(iter(found), None)

    def of(self, domain: Domain) -> list[Address]:
        """Addresses that this domain has now, those in claims first."""
        now = self._clock()
        known = [
            address
            for address, claims in self._claims.items()
            if owns(domain, address)
            and any(a.domain is domain and until > now for a, until in claims.items())
        ]
        single = [n.network_address for n in domain.addresses if _is_single(n)]
        return list(dict.fromkeys([*known, *single]))


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Address:
    """An IP address; one of IPv4 inside IPv6 is the one of IPv4."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def owns(domain: Domain, address: Address) -> bool:
    """Whether the operator gave this address, or a network with it, to the domain."""
    return any(address in network for network in domain.addresses)


def _is_single(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return network.prefixlen == network.max_prefixlen
