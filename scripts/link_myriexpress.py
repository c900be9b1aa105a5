"""Build libmyriexpress.so from crates/capi.

Cargo could make a shared library by itself, but not this one: it hands the linker a list of what to export,
and a linker takes no second list, as the versions of MX need (crates/capi/myriexpress.map). So cargo makes an
archive, and the rest happens here: the archive becomes one object file, everything in it that is not MX
becomes local to it, and that file is linked with the versions.

    python scripts/link_myriexpress.py [--profile release] [--out FILE] [--package]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cargo_workspace import ROOT, load_metadata

PACKAGE = "isthmus-capi"
#: Programs record this name, so it carries no version.
SONAME = "libmyriexpress.so"
CRATE = ROOT / "crates" / "capi"
INCLUDE = CRATE / "include"
#: Where the Python package has both, for `isthmus mx cflags` and the wheel.
PACKAGED = ROOT / "src" / "isthmus" / "_myriexpress"
VERSIONS = CRATE / "myriexpress.map"
#: What C sees of the library, as objcopy writes patterns.
EXPORTED = ("mx_*", "MX_ERRORS_*")
#: What Rust's own library needs; those that turn out not to be needed are not recorded.
LIBRARIES = ("gcc_s", "pthread", "m", "dl", "c")


def build(profile: str = "release", out: Path | None = None) -> Path:
    """Build the library and return where it is.

    Parameters
    ----------
    profile : str
        A profile of cargo.
    out : Path, optional
        The file to make; by default it lies beside what cargo makes.

    Raises
    ------
    SystemExit
        A tool failed or is missing. Its own words are on stderr.
    """
    _run("cargo", "build", "--quiet", "--locked", f"--package={PACKAGE}", f"--profile={profile}")
    # Cargo's name for the directory of its oldest profile is not that profile's name.
    directory = Path(load_metadata()["target_directory"]) / {"dev": "debug"}.get(profile, profile)
    library = out or directory / SONAME
    link(directory / "libmyriexpress.a", library)
    return library


def link(archive: Path, library: Path) -> None:
    """Make the shared `library` of an `archive`: only what is MX, and with its versions."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".myriexpress-") as scratch:
        whole, narrow, shared = (Path(scratch) / name for name in ("whole.o", "narrow.o", SONAME))
        _run("cc", "-r", "-nostdlib", f"-o{whole}", "-Wl,--whole-archive", str(archive))
        keep = [f"--keep-global-symbol={pattern}" for pattern in EXPORTED]
        _run("objcopy", "--wildcard", *keep, str(whole), str(narrow))
        flags = f"-Wl,-soname,{SONAME}", f"-Wl,--version-script={VERSIONS}"
        tidy = "-Wl,--gc-sections", "-Wl,--strip-debug", "-Wl,-z,relro,-z,now,-z,noexecstack", "-Wl,-z,defs"
        libraries = [f"-l{name}" for name in LIBRARIES]
        command = (
            "cc",
            "-shared",
            "-nodefaultlibs",
            f"-o{shared}",
            str(narrow),
            *flags,
            *tidy,
            "-Wl,--as-needed",
        )
        _run(*command, *libraries)
        # In one step, so that nobody ever sees half a library.
        shared.replace(library)


def package(library: Path) -> None:
    """Put a copy of `library` and of the headers into the Python package."""
    with tempfile.TemporaryDirectory(dir=PACKAGED.parent, prefix=".myriexpress-") as scratch:
        made = Path(scratch) / PACKAGED.name
        shutil.copytree(INCLUDE, made / "include")
        (made / "lib").mkdir()
        shutil.copyfile(library, made / "lib" / SONAME)
        # Programs that run keep the library that they have open.
        if PACKAGED.exists():
            PACKAGED.rename(Path(scratch) / "before")
        made.rename(PACKAGED)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]}: not found; scripts/bootstrap.sh says what to install") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{command[0]}: exit status {error.returncode}; its own words are above") from None


def main(arguments: list[str] | None = None) -> int:
    """Build as the command line says, and print where the library is."""
    parser = argparse.ArgumentParser(description="Build libmyriexpress.so.")
    parser.add_argument("--profile", default="release", help="of cargo (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the file to make (default: beside what cargo makes)")
    parser.add_argument("--package", action="store_true", help="copy it and the headers into src/isthmus")
    options = parser.parse_args(arguments)
    library = build(options.profile, options.out)
    if options.package:
        package(library)
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
