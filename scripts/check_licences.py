"""Check that every dependency, of Rust and of Python, has a licence this project can live with.

Rust dependencies are what ``cargo metadata`` resolves; Python dependencies are what is installed beside the
Python that runs this script (`.venv`). Some Python packages say their licence only in a classifier or in a
few words; `ALIASES` gives those their SPDX names. Nothing is guessed from the text of a licence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

from cargo_workspace import load_metadata

OURS = "isthmus"

#: SPDX names. Permissive, or (MPL) copyleft that stops at the file's edge.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    "mpich2",
}

#: Words that stand in older Python metadata, and the SPDX name for each.
ALIASES = {
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "LicenseRef-MPICH": "mpich2",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def is_allowed(expression: str) -> bool:
    """Say whether the SPDX `expression` can be met with the allowed licences alone.

    ``A/B`` is cargo's old spelling of ``A OR B``. An exception (``WITH``) only ever permits more.
    """
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))
    position = 0

    def take(*wanted: str) -> bool:
        nonlocal position
        if position < len(tokens) and tokens[position].upper() in wanted:
            position += 1
            return True
        return False

    def either() -> bool:
        met = both()
        while take("OR"):
            met = both() or met
        return met

    def both() -> bool:
        met = one()
        while take("AND"):
            met = one() and met
        return met

    def one() -> bool:
        nonlocal position
        if take("("):
            met = either()
            return take(")") and met
        name = tokens[position] if position < len(tokens) else ""
        position += 1
        if take("WITH"):
            position += 1
        return name in ALLOWED

    return either() and position == len(tokens)


def python_licence(distribution: Distribution) -> str | None:
    """Return the SPDX expression of an installed distribution, or its own words where they are not SPDX."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [line.split(" :: ") for line in metadata.get_all("Classifier") or []]
    licences = [line[-1] for line in classifiers if line[:2] == ["License", "OSI Approved"] and len(line) > 2]
    if not licences and "License" in metadata:
        # The field should be a name. Some put the whole text there; its first line is then on no list.
        licences = metadata["License"].splitlines()[:1]
    return " AND ".join(ALIASES.get(licence, licence) for licence in licences) or None


def rust_licences() -> Iterable[tuple[str, str | None]]:
    """Yield each resolved crate that is not ours, as ``name version`` and its licence."""
    for package in load_metadata()["packages"]:
        if package["source"] is not None:
            yield f"crate {package['name']} {package['version']}", package["license"]


def python_licences() -> Iterable[tuple[str, str | None]]:
    """Yield each installed distribution that is not ours, as ``name version`` and its licence."""
    for distribution in distributions():
        if distribution.name != OURS:
            yield f"package {distribution.name} {distribution.version}", python_licence(distribution)


def licence_faults(dependencies: Iterable[tuple[str, str | None]]) -> list[str]:
    """Return a sentence for each dependency whose licence is missing or not allowed."""
    faults = []
    for name, licence in sorted(dependencies):
        if licence is None:
            faults.append(f"{name} states no licence")
        elif not is_allowed(licence):
            faults.append(f"{name} is under {licence!r}, which is not on the list")
    return faults


def main() -> int:
    """Check what this workspace resolves and what this Python has installed."""
    dependencies = [*rust_licences(), *python_licences()]
    faults = licence_faults(dependencies)
    for fault in faults:
        print(f"licences: {fault}; see ALLOWED in scripts/check_licences.py", file=sys.stderr)
    if not faults:
        print(f"licences: {len(dependencies)} dependencies, all under licences on the list")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
