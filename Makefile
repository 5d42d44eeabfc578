# Two commands set everything up: `make train` trains a small Gemma privately, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
STEPS := 80
BATCH := 256
WORKDIR := runs/first

.PHONY: train test lint clean
train: $(VENV)/.core
	$(VENV)/bin/dpgemma train --steps=$(STEPS) --batch_size=$(BATCH) --workdir=$(WORKDIR)

test: $(VENV)/.dev lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV)
