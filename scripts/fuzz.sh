#!/usr/bin/env bash
# Run every fuzz target for FUZZ_SECONDS (default 30) each. Stops at the first one that finds something.
# What cannot run is skipped aloud and is no failure: fuzzing needs a nightly Rust and cargo-fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${FUZZ_SECONDS:-30}

skip() { printf 'SKIPPED fuzz: %s\n' "$*"; exit 0; }

[ -e fuzz/Cargo.toml ] || skip "there is no fuzz/Cargo.toml"
command -v cargo-fuzz >/dev/null || skip "cargo-fuzz is not installed (cargo install --locked cargo-fuzz)"
cargo +nightly --version >/dev/null 2>&1 || skip "there is no nightly Rust (rustup toolchain install nightly --profile minimal)"

targets=$(cargo +nightly fuzz list)
[ -n "$targets" ] || { echo "fuzz: fuzz/Cargo.toml names no target" >&2; exit 1; }
for target in $targets; do
    printf '== %s, %s s\n' "$target" "$seconds"
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds"
done
