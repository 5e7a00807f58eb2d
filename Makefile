# make demo: the whole chain on phantoms, pictures at the end.  make test: the full suite.  Both do all set-up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m launch.demo --out build/demo

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed requirements-test.txt
	$(BIN)/pip install --quiet --requirement requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) build
