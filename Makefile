# Every target sets up what it needs: the environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := -n 2 --dist loadfile

OLDEST := .venv-oldest

.PHONY: test test-fast test-all test-oldest coverage check docs notebooks demo clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable ".[test,oracles,lime,docs]"
	touch $(READY)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "not peers"

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m core

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.campaigns manifests --sample 20000
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.campaigns mutants --seconds 300
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.campaigns kills --count 60

# The oldest versions that pyproject.toml allows, in an environment of their own; no extras.
$(OLDEST)/.ready: pyproject.toml tests/oldest-constraints.txt
	test -x $(OLDEST)/bin/python || python3.11 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest-constraints.txt \
		--editable . pytest pytest-timeout hypothesis
	touch $@

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -m core
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q $(patsubst %,tests/test_%.py,build cli_words \
		evaluate explain images index methods_laws network pairs prototypes render report)

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) --cov=embedcam --cov-branch --cov-report=term:skip-covered

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

docs: $(READY)
	$(BIN)/python scripts/docs.py

notebooks: $(READY)
	$(BIN)/python scripts/notebooks.py

demo: $(READY)
	$(BIN)/embedcam demo demo-output

clean:
	rm -rf $(VENV) $(OLDEST) demo-output site .site-source
