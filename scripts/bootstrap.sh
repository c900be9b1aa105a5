#!/usr/bin/env bash
# Make this checkout able to build and test itself. Safe to run at any time, and quick when there is nothing to do.
#
#   scripts/bootstrap.sh          the tools, and .venv with the development requirements
#   scripts/bootstrap.sh build    the same, the extension module, built in release mode into .venv, and libmyriexpress
#
# As root on Debian it installs what is missing with apt. Anybody else is told, in one line, what to install.
# Everything it makes is in the checkout. PYTHON=/path/to/python chooses the Python that .venv is made from.
set -euo pipefail

self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/.."
root=$PWD
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin"
venv=$root/.venv
requirements_stamp=$venv/.isthmus-requirements
build_stamp=$venv/.isthmus-build

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
can_apt() { [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && have apt-get; }

apt_install() {
    say "installing $* with apt"
    if [ -z "${apt_updated:-}" ]; then
        apt-get -qq update >&2 || return 1
        apt_updated=yes
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >&2
}

# --- What comes from the system ---------------------------------------------------------------------------------

# Without these nothing can be built. $1 is a command that proves the thing is there, $2.. are its Debian packages.
need() {
    local proof=$1
    shift
    "$proof" && return
    if can_apt && apt_install "$@"; then
        hash -r
        "$proof" && return
    fi
    die "install these first: $* (Debian names)"
}

# Without these the tests and the demo that build containers or boot guests skip themselves, saying so.
wish() {
    local missing=() packages=()
    while [ $# -gt 0 ]; do
        { [ "$1" = kernel ] && compgen -G '/boot/vmlinuz-*' >/dev/null; } ||
            { [ "$1" = postgres ] && compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; } ||
            have "$1" || { missing+=("$1"); packages+=("$2"); }
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] && return
    if can_apt && apt_install "${packages[@]}"; then return; fi
    say "no ${missing[*]}: what needs containers or guests may be skipped; install ${packages[*]} (Debian names)"
}

linker() { have cc && have objcopy; }

# The first Python that is new enough and can make virtual environments. Shims that lead nowhere fail the trial.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{14,13,12,11,10}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            found_python=$candidate
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON: not a Python 3.10 or later with venv and ensurepip"
    done
    return 1
}

# Cargo, no older than the workspace asks for, with the two components that `make check` runs.
cargo_problem() {
    local wanted version
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || true
    if [ -z "$version" ]; then
        echo "no working cargo"
    elif [ "$(printf '%s\n' "$wanted" "$version" | sort -V | head -n1)" != "$wanted" ]; then
        echo "cargo is $version, and $wanted or later is needed"
    elif ! cargo clippy --version >/dev/null 2>&1 || ! cargo fmt --version >/dev/null 2>&1; then
        echo "cargo has no clippy or no rustfmt"
    fi
}

ensure_cargo() {
    local problem
    problem=$(cargo_problem)
    [ -z "$problem" ] && return
    # A distribution's cargo may be years behind, so rustup is asked, and installed where apt knows it.
    if ! have rustup && can_apt && apt-cache show rustup >/dev/null 2>&1; then apt_install rustup || true; fi
    if have rustup; then
        case $problem in
            "no working cargo") rustup default stable --quiet >&2 || true ;;
            "cargo has no"*) rustup component add clippy rustfmt >&2 || true ;;
        esac
        hash -r
        problem=$(cargo_problem)
    fi
    [ -z "$problem" ] || die "$problem: install a current Rust with clippy and rustfmt (rustup update stable, see rustup.rs)"
}

# --- What lives in the checkout ---------------------------------------------------------------------------------

ensure_venv() {
    local wanted
    # The path is part of it because a virtual environment that was moved with its checkout is a broken one.
    wanted=$(printf '%s\n' "$root" | cat - requirements-dev.txt | sha256sum)
    if [ "$(cat "$requirements_stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then return; fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || ! grep -qsF "$root" "$venv/bin/activate"; then
        need find_python python3 python3-venv
        say "making .venv with $found_python"
        rm -rf "$venv"
        "$found_python" -m venv "$venv"
    fi
    say "installing requirements-dev.txt into .venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt >&2 ||
        die "pip could not install requirements-dev.txt (its own words are above); mend that and run this again"
    printf '%s\n' "$wanted" >"$requirements_stamp"
}

# Directories count too: theirs is the time that changes when a source file is deleted.
build_is_current() {
    [ -e "$build_stamp" ] && compgen -G 'src/isthmus/_native*.so' >/dev/null &&
        [ -e src/isthmus/_myriexpress/lib/libmyriexpress.so ] &&
        [ -z "$(find crates Cargo.toml Cargo.lock pyproject.toml -newer "$build_stamp" -print -quit)" ]
}

build() {
    build_is_current && return
    say "building the extension module"
    # No --extras: requirements-dev.txt has them already, and maturin would ask the package index for the extra
    # that names this package itself.
    # The stamp carries the time before the build, so that what is edited during it is built next time.
    local started=$build_stamp.started
    touch "$started"
    env -u CONDA_PREFIX VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" \
        "$venv/bin/maturin" develop --quiet --release >&2
    say "building libmyriexpress.so"
    PATH="$venv/bin:$PATH" python scripts/link_myriexpress.py --package >&2
    mv "$started" "$build_stamp"
}

case ${1:-} in
    '' | build) ;;
    *) die "unknown argument '$1'; usage: scripts/bootstrap.sh [build]" ;;
esac

# One at a time per checkout: two `make` side by side would build the same .venv.
have flock || die "install util-linux first: flock is missing"
exec 9<"$self"
flock 9

need linker gcc libc6-dev binutils
ensure_cargo
wish ip iproute2 bwrap bubblewrap unshare util-linux
wish redis-server redis-server socat socat nginx nginx-light curl curl iperf3 iperf3 wrk wrk
wish postgres postgresql
wish linux.uml user-mode-linux qemu-system-x86_64 qemu-system-x86 busybox busybox-static kernel linux-image-cloud-amd64
ensure_venv
if [ "${1:-}" = build ]; then build; fi
