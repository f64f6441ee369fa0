# make help lists the commands. Everything runs in .venv, which the first command that needs it makes.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# The first Python that is new enough and has its venv module; 3.11 is the one that is tested.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
  && echo $$p && break; done)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt
# One thread a test worker: the workers are the parallelism.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types layers check-long bench docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the project with everything it can use

# torch goes first, by its pin alone, so that nothing that depends on it can choose another build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || test -n "$(PYTHON)" || { echo "attnlens needs Python 3.11 or later\
	 with its venv and ensurepip modules (Debian: python3-venv), and found none." \
	 "If it has another name: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes the first time"
	@$(PIP) torch
	@$(PIP) -e '.[all,test,dev]'
	@touch $@

demo: setup ## profile the shipped model into demo-out/
	@$(BIN)/attnlens demo --out demo-out
	@echo "Open demo-out/index.html in a browser"

test: lint types layers ## lint, types, layers and all tests but the long ones
	@$(PYTEST)

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . \
	  || { echo "These files are not in the house's format: run 'make format'" >&2; \
	       $(BIN)/ruff format --check . >&2; exit 1; }

format: setup ## bring the code into the house's format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

types: setup ## pyright, strict, over attnlens/
	@$(BIN)/pyright

layers: setup ## import-linter: a room imports only rooms below it
	@$(BIN)/lint-imports --no-cache --no-logo

check-long: setup ## the tests that take minutes
	@$(PYTEST) -m long

bench: setup ## every benchmark, as tables, beside the peers
	@$(PIP) -e '.[bench]'
	@for script in benchmarks/[!_]*.py; do \
	  name=$$(basename $$script .py); echo "== $$name"; \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

docs: setup ## make docs/models.md anew
	@$(BIN)/python -m scripts.models_table

clean: ## remove what the commands made, the environment included
	rm -rf $(VENV) demo-out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
