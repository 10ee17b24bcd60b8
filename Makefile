# make demo | make test | make test-lmms-eval | make install | make lint | make types | make reference
PYTHON ?= python3
VENV ?= .venv
LMMS_VENV ?= .venv-lmms
BIN := $(VENV)/bin
PURELIB := "import sysconfig; print(sysconfig.get_path('purelib'))"
# DeepSpeed runs on the CPU in the demo and the tests. The demo hides GPUs from its stages as well, so that it shows the same
# thing everywhere; the tests see them, because some need one (tests/plans/test_on_gpu.py).
export DS_ACCELERATOR ?= cpu
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test test-lmms-eval lint types reference check clean

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

# lmms-eval and Hydra need different versions of antlr4 (docs/benchmarks.md), so it has an environment of its own. That lies over
# the project's, so that torch is not on the disk twice: what is installed here comes first. pip then calls Hydra's antlr4 a
# conflict, which it is: tests/lmms_eval/conftest.py hides Hydra.
$(LMMS_VENV)/.installed: pyproject.toml $(VENV)/.installed
	$(PYTHON) -m venv $(LMMS_VENV)
	$(BIN)/python -c $(PURELIB) > $$($(LMMS_VENV)/bin/python -c $(PURELIB))/under.pth
	$(LMMS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS_VENV)/bin/python -m pip install --quiet --group lmms-eval
	$(LMMS_VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-lmms-eval: $(LMMS_VENV)/.installed
	$(LMMS_VENV)/bin/python -m pytest tests/lmms_eval

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# docs/configuration.md from the schemas, docs/api.md from the docstrings, docs/images/accuracy.svg from docs/results.md
reference: install
	$(BIN)/python -m skipvision_train.config.reference
	$(BIN)/python -m skipvision_train.config.api_reference
	$(BIN)/python docs/images/draw.py

check: lint types test

clean:
	rm -rf $(VENV) $(LMMS_VENV) outputs build dist *.egg-info
