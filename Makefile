# Every target does its own set-up: it needs Python 3.11 or newer, make and a package index, nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
LOCKS  := deploy/requirements

# An environment of its own for one benchmark: torch, and what needs it. Torch is not in the lock, because its pinned
# wheels for Linux bring gigabytes of CUDA: pip takes whatever build of this version its configuration finds.
BENCH  := build/venvs/bench
TORCH  := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench protos api locks

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything pinned and hashed

$(STAMP): $(LOCKS)/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanofleet needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCKS)/dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup ## Run the whole system once on real digits; writes build/demo.json
	$(BIN)/nanofleet demo

test: setup ## Run every test (Ray, broker and fresh environments included)
	$(BIN)/python -m pytest

check: setup ## Lint, types, import contracts, generated protos and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check
	$(BIN)/python -m controller.api.reference --check

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup $(BENCH)/installed ## Run the benchmarks; prints one JSON object each
	$(BIN)/python -m benchmarks.footprint --json
	$(BIN)/python -m benchmarks.hot_path --json
	$(BIN)/python -m benchmarks.overload --json
	$(BIN)/python -m benchmarks.residency --json
	$(BIN)/python -m benchmarks.tracing --json
	$(BIN)/python -m benchmarks.offload --json
	$(BIN)/python -m benchmarks.session --json
	$(BIN)/python -m benchmarks.fetch --json
	$(BIN)/python -m benchmarks.dashboard --json
	$(BIN)/python -m benchmarks.peer_oip --json
	$(BIN)/python -m benchmarks.soak --minutes 1.5
	$(BENCH)/bin/python -m benchmarks.delta --json

$(BENCH)/installed: $(LOCKS)/bench.lock
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(LOCKS)/bench.lock
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

protos: setup ## Regenerate the code of protos/**/*.proto
	$(BIN)/python -m protos.generate

api: setup ## Regenerate docs/api.md from the REST
	$(BIN)/python -m controller.api.reference

COMPILE = uv pip compile --generate-hashes --universal --python-version 3.11 --no-header --no-annotate --quiet

locks: ## Resolve the pinned dependencies again (needs uv)
	$(COMPILE) pyproject.toml --extra dev --output-file $(LOCKS)/dev.lock
	$(COMPILE) pyproject.toml --extra agent --output-file $(LOCKS)/agent.lock
	$(COMPILE) pyproject.toml --extra controller --extra heavy --extra postgresql --output-file $(LOCKS)/controller.lock
	$(COMPILE) pyproject.toml --extra controller --output-file $(LOCKS)/gateway.lock
	$(COMPILE) pyproject.toml --extra bench --override $(LOCKS)/bench.overrides --no-emit-package torch --output-file $(LOCKS)/bench.lock
	$(COMPILE) $(LOCKS)/build.in --constraint $(LOCKS)/dev.lock --output-file $(LOCKS)/build.lock
	$(COMPILE) $(LOCKS)/ansible.in --output-file $(LOCKS)/ansible.lock
	$(COMPILE) $(LOCKS)/conformance.in --output-file $(LOCKS)/conformance.lock
	$(COMPILE) $(LOCKS)/protoc.in --output-file $(LOCKS)/protoc.lock
	$(COMPILE) $(LOCKS)/mlserver.in --output-file $(LOCKS)/mlserver.lock
