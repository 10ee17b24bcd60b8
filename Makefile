# make demo | make test | make install | make lint | make types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The demo and the tests run on the CPU everywhere, so that they show the same thing everywhere.
export DS_ACCELERATOR ?= cpu
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test lint types check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: install
	$(BIN)/skipvision demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
