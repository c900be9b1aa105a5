"""Every format has a fuzz target, and every target can be run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def formats() -> set[str]:
    """The formats of the wire crate: its public modules."""
    return set(re.findall(r"^pub mod (\w+);", (ROOT / "crates/wire/src/lib.rs").read_text(), re.M))


def targets() -> set[str]:
    return {path.stem for path in (ROOT / "fuzz/fuzz_targets").glob("*.rs")}


def test_every_format_has_a_fuzz_target() -> None:
    assert formats(), "no format was found"
    assert formats() <= targets(), f"without a target: {sorted(formats() - targets())}"


def test_every_target_is_built_and_calls_what_it_is_named_for() -> None:
    manifest = (ROOT / "fuzz/Cargo.toml").read_text()
    named = dict(re.findall(r'^name = "(\w+)"\npath = "([^"]+)"', manifest, re.M))
    assert named == {name: f"fuzz_targets/{name}.rs" for name in targets()}
    for name in formats():
        assert f"isthmus_wire::{name}::" in (ROOT / "fuzz" / named[name]).read_text()
