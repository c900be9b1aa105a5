"""The broker, spoken to by real programs through real doors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_client import Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run") as node:
        node.add("a", "b")
        yield node


def test_two_programs_of_one_group_connect_and_close(node: Node) -> None:
    with node.attach("a") as a, node.attach("b") as b:
        assert b.bind(5000) == 5000
        ours, theirs = a.connect("b", 5000, b)
        assert ours.fields["carrier"] == "sealed"
        assert theirs.fields["from_name"] == "a"
        assert len(ours.fds) == len(theirs.fds) == 2
        assert node.holds("a")[:2] == (1, 2)
        ours.close()
        theirs.close()
        a.ask("resolve", name="b")
        b.ask("resolve", name="b")
        assert node.holds("a") == (0, 0, 0, 0, 0)
        assert node.holds("b") == (0, 0, 0, 0, 1)
