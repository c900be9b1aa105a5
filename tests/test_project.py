"""The checks of `make check` that are ours: each is fed what it exists to refuse, and refuses it."""

from __future__ import annotations

from email.message import Message
from importlib.metadata import Distribution
from typing import Any

import check_arrows
import check_licences
import pytest


def workspace(**arrows: list[str]) -> dict[str, Any]:
    """What cargo metadata would say of our crates, had each of them the dependencies given here."""
    ours = {**{name: [] for name in check_arrows.ALLOWED}, **arrows}
    full = {name: check_arrows.PREFIX + name for name in ours}
    edges = {full[name]: [full.get(other, other) for other in others] for name, others in ours.items()}
    edges |= {"numpy": ["pyo3"], "pyo3": [], "libc": []}
    return {
        "workspace_members": list(full.values()),
        "packages": [
            {"id": name, "name": name, "dependencies": [{"name": other} for other in others]}
            for name, others in edges.items()
        ],
        "resolve": {"nodes": [{"id": name, "dependencies": others} for name, others in edges.items()]},
    }


def test_a_workspace_as_designed_has_no_arrow_faults() -> None:
    every_arrow = {name: ["libc", *others] for name, others in check_arrows.ALLOWED.items()}
    every_arrow[check_arrows.PYTHON_CRATE].append("pyo3")
    assert check_arrows.arrow_faults(workspace(**every_arrow)) == []


@pytest.mark.parametrize(
    ("crate", "other"),
    [
        ("wire", "proto"),
        ("proto", "sys"),
        ("ring", "sys"),
        ("ring", "engine"),
        ("sys", "engine"),
        ("engine", "bench"),
        ("bench", "py"),
    ],
)
def test_an_arrow_the_design_forbids_is_refused(crate: str, other: str) -> None:
    [fault] = check_arrows.arrow_faults(workspace(**{crate: [other]}))
    assert fault.startswith(f"crates/{crate} depends on {other}; of our crates it may name: ")


def test_python_may_be_known_to_one_crate_only_however_it_is_reached() -> None:
    [fault] = check_arrows.arrow_faults(workspace(sys=["numpy"]))
    assert fault == "crates/sys reaches pyo3 (isthmus-sys -> numpy -> pyo3); only crates/py may know Python"


def test_a_crate_nobody_thought_about_is_refused() -> None:
    [fault] = check_arrows.arrow_faults(workspace(novel=[]))
    assert fault.startswith("crates/novel is not in the table of allowed arrows")


def test_a_crate_that_went_away_must_leave_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = workspace()
    monkeypatch.setitem(check_arrows.ALLOWED, "gone", set())
    [fault] = check_arrows.arrow_faults(before)
    assert "has no isthmus-gone" in fault


def test_a_pure_crate_must_say_so_outside_of_comments() -> None:
    assert check_arrows.purity_faults("wire", "#![no_std]\n#![forbid(unsafe_code)]\n") == []
    faults = check_arrows.purity_faults("wire", "// #![no_std]\n#![deny(unsafe_code)]\n")
    assert [fault.split(" does not say ")[1] for fault in faults] == [
        "#![no_std] on a line of its own",
        "#![forbid(unsafe_code)] on a line of its own",
    ]


@pytest.mark.parametrize(
    "expression",
    [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-3.0-only OR MIT",
        "(MIT OR GPL-2.0-only) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception",
        "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
    ],
)
def test_a_licence_that_can_be_met_is_accepted(expression: str) -> None:
    assert check_licences.is_allowed(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "GPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "(MIT OR Apache-2.0) AND AGPL-3.0-only",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "MIT OR",
        "MIT AND",
        "(MIT",
        "MIT)",
        "MIT Apache-2.0",
        "Copyright (c) somebody",
    ],
)
def test_a_licence_that_cannot_be_met_or_read_is_refused(expression: str) -> None:
    assert not check_licences.is_allowed(expression)


def test_a_dependency_with_no_licence_or_a_foreign_one_is_named() -> None:
    found = [("crate b 1", "GPL-3.0-only"), ("crate a 1", None), ("crate c 1", "MIT")]
    assert check_licences.licence_faults(found) == [
        "crate a 1 states no licence",
        "crate b 1 is under 'GPL-3.0-only', which is not on the list",
    ]


class Installed(Distribution):
    """A distribution that is nothing but its metadata."""

    def __init__(self, *headers: tuple[str, str]) -> None:
        self.headers = headers

    @property
    def metadata(self) -> Any:
        message = Message()
        for name, value in self.headers:
            message[name] = value
        return message

    def read_text(self, filename: str) -> None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


@pytest.mark.parametrize(
    ("headers", "licence"),
    [
        ([("License-Expression", "MIT OR Apache-2.0"), ("License", "see file")], "MIT OR Apache-2.0"),
        (
            [("Classifier", "License :: OSI Approved :: BSD License"), ("License", "text\ntext")],
            "BSD-3-Clause",
        ),
        ([("License", "MIT License\n\nPermission is")], "MIT"),
        ([("License", "Free, but not for you")], "Free, but not for you"),
        (
            [
                ("Classifier", "License :: OSI Approved :: MIT License"),
                ("Classifier", "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"),
            ],
            "MIT AND GNU General Public License v3 (GPLv3)",
        ),
        ([("Classifier", "Programming Language :: Python")], None),
    ],
)
def test_the_licence_of_a_python_package_is_what_it_says_of_itself(
    headers: list[tuple[str, str]], licence: str | None
) -> None:
    assert check_licences.python_licence(Installed(*headers)) == licence
