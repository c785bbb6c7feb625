# make train: set up, then train on the built-in faces. make test: set up, then run the fast tests.
# make test-faults: kill and starve real trainings, print what came of it.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-all test-faults lint clean

train: $(READY)
	$(BIN)/dist-train train --config configs/quickstart.yaml --run_dir $(RUN) --overwrite

test: $(READY)
	$(BIN)/pytest

test-all: $(READY)
	$(BIN)/pytest -m "slow or not slow"

test-faults: $(READY)
	$(BIN)/pytest -m faults -rfEP --show-capture stdout

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/slurm/*.sbatch tests/e2e/slurm/*.sh

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
