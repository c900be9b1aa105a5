# Everything this project does at a desk or in CI. Each target prepares what it needs; nothing else has to be run first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A fresh rustup is not on PATH yet, `ip` is often not on an ordinary user's.
export PATH := $(CURDIR)/.venv/bin:$(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/sbin:/sbin
export VIRTUAL_ENV := $(CURDIR)/.venv
# One Python for every cargo command, or pyo3 is built again each time another one comes first on PATH.
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python
unexport CONDA_PREFIX PYTHONHOME

FUZZ_SECONDS ?= 30
export FUZZ_SECONDS

.PHONY: help demo test check bench soak fuzz wheel clean env build

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s  %s\n", $$1, $$2 }' Makefile

env:
	@scripts/bootstrap.sh

build:
	@scripts/bootstrap.sh build

demo: build ## Two isolated containers exchange arrays, and say which path they took
	isthmus demo

test: check ## make check, then every test of Rust and Python (minus soak)
	cargo test --workspace --exclude isthmus-py
	@if [ -e crates/ring/tests/loom.rs ]; then set -x; \
	  RUSTFLAGS="$${RUSTFLAGS:-} --cfg loom" cargo test -p isthmus-ring --release --test loom --target-dir target/loom; \
	fi
	pytest

check: build ## Formatting, lints, types, crate arrows, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	ruff format --check
	ruff check
	mypy
	@if [ -e src/isthmus/_native.pyi ]; then set -x; python -m mypy.stubtest --mypy-config-file pyproject.toml isthmus._native; fi
	python scripts/check_arrows.py
	python scripts/check_licences.py
	python scripts/compatibility.py --check

bench: build ## Us and what you use today, side by side; tables and plots in out/bench
	isthmus bench all --out out/bench

soak: build ## The long tests: minutes of churn, kills and restarts
	pytest -m soak

fuzz: env ## Each fuzz target for FUZZ_SECONDS (30); needs nightly and cargo-fuzz
	@scripts/fuzz.sh

wheel: env ## The wheel a user installs, in out/wheels
	python scripts/link_myriexpress.py --package
	maturin build --release --out out/wheels

clean: ## Remove what make made: .venv, target, out and the caches
	rm -rf .venv target out fuzz/target src/isthmus/_myriexpress .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/isthmus/_native*.so
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
