"""Prove that the crates depend on each other only in the directions the design allows.

The arrows are the design: a parser that cannot reach a socket cannot misuse one. ``cargo metadata`` knows
every dependency, so it is asked, and this table is compared with the answer.
"""

from __future__ import annotations

import sys
from typing import Any

from cargo_workspace import ROOT, load_metadata

PREFIX = "isthmus-"

#: Each crate of ours, and the crates of ours it may name. Tests and build scripts count like everything else.
ALLOWED: dict[str, set[str]] = {
    "wire": set(),
    "proto": {"wire"},
    "ring": {"wire"},
    "sys": {"wire"},
    "engine": {"wire", "proto", "ring", "sys"},
    "mx": {"wire", "proto", "sys", "engine"},
    "bench": {"engine", "sys"},
    "switch": {"wire", "proto", "ring", "sys", "engine"},
    "card": {"wire", "proto", "sys", "engine"},
    "supervisor": {"wire", "sys", "engine"},
    "py": {"wire", "proto", "ring", "sys", "engine", "bench", "card", "mx", "supervisor", "switch"},
    "capi": {"wire", "proto", "sys", "engine", "mx"},
}

#: The one crate that knows Python exists.
PYTHON_CRATE = "py"

#: Crates that a stranger's bytes reach first, and what their lib.rs must say.
PURE = ("wire", "proto")
PURE_ATTRIBUTES = ("#![no_std]", "#![forbid(unsafe_code)]")


def arrow_faults(metadata: dict[str, Any]) -> list[str]:
    """Return a sentence for each arrow that should not be there; none when the design holds."""
    members = set(metadata["workspace_members"])
    packages = {package["id"]: package for package in metadata["packages"]}
    ours = {packages[member]["name"].removeprefix(PREFIX): packages[member] for member in members}
    faults = [
        f"crates/{name} is not in the table of allowed arrows; add it to ALLOWED in scripts/check_arrows.py"
        for name in sorted(ours.keys() - ALLOWED.keys())
    ]
    faults += [
        f"the table of allowed arrows names {name}, but the workspace has no {PREFIX}{name}"
        for name in sorted(ALLOWED.keys() - ours.keys())
    ]
    for name in sorted(ours.keys() & ALLOWED.keys()):
        every = (dependency["name"] for dependency in ours[name]["dependencies"])
        named = {other.removeprefix(PREFIX) for other in every if other.startswith(PREFIX)}
        for other in sorted(named - ALLOWED[name]):
            may = ", ".join(sorted(ALLOWED[name])) or "none of ours"
            faults.append(f"crates/{name} depends on {other}; of our crates it may name: {may}")
    for name in sorted(ours.keys() - {PYTHON_CRATE}):
        if way := _way_to(metadata, ours[name]["id"], "pyo3"):
            faults.append(f"crates/{name} reaches pyo3 ({way}); only crates/{PYTHON_CRATE} may know Python")
    return faults


def _way_to(metadata: dict[str, Any], start: str, target: str) -> str | None:
    """Return one chain of package names from `start` to the package named `target`, if there is one."""
    names = {package["id"]: package["name"] for package in metadata["packages"]}
    edges = {node["id"]: node["dependencies"] for node in metadata["resolve"]["nodes"]}
    seen, ways = {start}, [[start]]
    while ways:
        way = ways.pop()
        if names[way[-1]] == target:
            return " -> ".join(names[step] for step in way)
        for following in edges[way[-1]]:
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def purity_faults(crate: str, source: str) -> list[str]:
    """Return what `source`, the lib.rs of `crate`, fails to promise."""
    lines = {line.strip() for line in source.splitlines()}
    return [
        f"crates/{crate}/src/lib.rs does not say {attribute} on a line of its own"
        for attribute in PURE_ATTRIBUTES
        if attribute not in lines
    ]


def main() -> int:
    """Check the workspace this script lives in."""
    faults = arrow_faults(load_metadata())
    for crate in PURE:
        faults += purity_faults(crate, (ROOT / "crates" / crate / "src" / "lib.rs").read_text())
    for fault in faults:
        print(f"arrows: {fault}", file=sys.stderr)
    if not faults:
        print(f"arrows: {len(ALLOWED)} crates, every dependency points the way the design allows")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
