"""Tickets: what a restarted broker believes about a connection it does not remember.

A ticket is an HMAC over the terms on which one side holds a connection. The sides have different tickets,
so neither can pass for the other, and the key never leaves the broker. Ring sizes are not in it: the
accepter's ticket is made before its ring is known, and the descriptor that comes with `resume` shows them
anyway. Nor is the rule: a restarted broker asks today's policy.
"""

from __future__ import annotations

import hmac


class Tickets:
    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(
        self,
        connection: int,
        opener: int,
        opener_port: int,
        accepter: int,
        accepter_port: int,
        kind: str,
        carrier: str,
        role: str,
    ) -> bytes:
        ends = f"{opener}:{opener_port} {accepter}:{accepter_port}"
        terms = f"isthmus ticket 1 {connection} {ends} {kind} {carrier} {role}"
        return hmac.digest(self._key, terms.encode("ascii"), "sha256")

    def check(self, ticket: bytes, *terms: int | str) -> bool:
        return hmac.compare_digest(ticket, self.make(*terms))  # type: ignore[arg-type]
