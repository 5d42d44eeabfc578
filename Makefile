# Two commands set everything up: `make train` trains a small Gemma privately, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
STEPS := 80
BATCH := 256
WORKDIR := runs/first
LOWEST := .venv-lowest

.PHONY: train test lint docs lowest clean
train: $(VENV)/.core
	$(VENV)/bin/dpgemma train --steps=$(STEPS) --batch_size=$(BATCH) --workdir=$(WORKDIR)

test: $(VENV)/.dev lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site in site/, from docs/ and the docstrings.
docs: $(VENV)/.dev
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/mkdocs build --strict

# The oldest versions that pyproject.toml allows, in an environment of their own: the main job, on a small scale.
lowest: | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv venv --quiet --python $(PYTHON) --clear $(LOWEST)
	$(VENV)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct .
	cd $(LOWEST) && bin/python -m dpgemma train --model=ladder_20k --steps=4 --batch_size=64 --workdir=run
	cd $(LOWEST) && bin/python -m dpgemma audit run
	rm -rf $(LOWEST)/run

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) $(LOWEST)
