PYTHON ?= python3.11
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: setup demo test lint docs bench mutants clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "cograd needs Python >= 3.11; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c "import torch; assert torch.version.cuda is None or '$(CUDA)', 'a CUDA build of torch came in; run with CUDA=1 if that is wanted'"
	@touch $@

demo: setup
	$(BIN)/cograd demo

lint: setup
	$(BIN)/ruff format --check src tests bench docs examples scripts
	$(BIN)/ruff check src tests bench docs examples scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest --cov=cograd.core --cov-report=term --cov-fail-under=90

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m bench.dgc_step

mutants: setup
	$(BIN)/python tests/mutants.py

clean:
	rm -rf .venv build dist site runs .pytest_cache .mypy_cache .ruff_cache .coverage
