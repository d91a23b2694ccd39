# Everything that a person or CI runs here. Each target sets up what it needs first; `make help` lists them.
PYTHON ?= python3
# Where its packages are: `make test PYTHON=python3.14 VENV=build/python3.14` leaves those of another Python alone.
VENV ?= .venv
export UNISANDBOX_VENV := $(VENV)
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# The files of tests are shared out among workers, in the order of tests/conftest.py, each with places of its own
# (tests/places.py), which needs root. One more than there are processors: tests also wait.
WORKERS ?= $(shell [ "$$(id -u)" = 0 ] && expr $$(nproc) + 1 || echo 0)
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What is long runs on one of the two event loops; `make test TURNS=` runs all on both, as `make test-long` does.
TURNS ?= --by-turns
# The wheels of pyright and node are complete; this keeps pyright from asking the network for news of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# The tests start Python hundreds of times: it shall not compile everything anew each time.
export PYTHONDONTWRITEBYTECODE :=

PYTHONS ?= python3.12 python3.13 python3.14 python3.14t
OF_PYTHON := ./tests/unit ./tests/wire ./tests/wasm --pyargs unisandbox.conformance --backend runc \
  $(patsubst %,./tests/integration/test_%.py,engine imports init keeper launch namespaces notebook runtime sdk)

# Brings up a real containerd; see tools/test_serve.sh.
CONTAINERD_LAB ?= $(or $(UNISANDBOX_CONTAINERD_LAB),$(abspath ../shared/lab/containerd-lab.sh))

.DEFAULT_GOAL := help
.PHONY: help demo test check test-long test-v2 test-hosts test-pythons of-python test-runtimes test-serve lint types proto fmt bench bench-serve docs checks setup setup-demo clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: setup-demo ## run real programs in sandboxes and print a short report (examples/tour.py)
	$(BIN)/python examples/tour.py

test: checks ## all checks and all tests, big counts at a tenth (ten minutes)
	$(PYTEST) $(SHARED) $(TURNS) ./tests --pyargs unisandbox.conformance

check: lint ## the quick part: format, lint, types, rooms, unit tests (under a minute)
	$(PYTEST) -q tests/unit

test-long: checks ## the same with the big counts in full
	$(PYTEST) --long --timeout 3600 $(SHARED) ./tests --pyargs unisandbox.conformance

test-v2: setup ## cgroups and conformance in a virtual machine with cgroup v2
	tools/test_v2.sh

test-hosts: setup ## an ordinary user, services, containers, in a virtual machine with cgroup v2 and systemd
	tools/test_hosts.sh

test-pythons: ## what depends on the Python, with each of PYTHONS= that is here (each has packages of its own in build/)
	@set -e; for python in $(PYTHONS); do \
	  $$python -c "" 2>/dev/null || { echo "test-pythons: skipped: there is no $$python"; continue; }; \
	  $(MAKE) --no-print-directory of-python PYTHON=$$python VENV=build/pythons/$$(basename $$python); done

of-python: setup
	$(PYTEST) $(SHARED) $(TURNS) --junitxml $(VENV).xml $(OF_PYTHON)

test-runtimes: setup ## the namespace backend with each OCI runtime that is here, or with RUNTIMES="PATH..."
	tools/test_runtimes.sh $(RUNTIMES)

test-serve: setup ## the server with a real containerd, crictl and critest
	tools/test_serve.sh

# Side by side: each uses but one processor.
checks: setup
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint types

lint: setup ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

types: setup ## the public names have complete types; what is committed and made by a tool is what the tool makes
	$(BIN)/python tools/public_types.py
	$(BIN)/python tools/build_native.py --check
	$(BIN)/python tools/build_guest.py --check
	$(BIN)/python tools/generate_proto.py --check
	$(BIN)/python tools/hosts_table.py --check

proto: setup ## generate the Python code of src/unisandbox/api/proto from its .proto files
	$(BIN)/python tools/generate_proto.py

fmt: setup ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## measure against the bare tools; table, JSON and plot in bench-results/
	$(BIN)/python -m benchmarks

bench-serve: setup ## measure pods against containerd's own shim, with a real containerd
	UNISANDBOX_CONTAINERD_LAB=$(CONTAINERD_LAB) $(BIN)/python -m benchmarks.pods

docs: setup ## run every example of README and docs
	$(PYTEST) -q tests/integration/test_docs.py

setup: ## prepare this working copy for development
	@$(PYTHON) tools/setup.py dev

setup-demo:
	@$(PYTHON) tools/setup.py demo

clean: ## remove what the targets above have made, .venv too
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist bench-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
