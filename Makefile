# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests docs

.PHONY: demo install test test-slow quality style docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,export,dev]"
	touch $@

demo: install
	$(BIN)/sparsevit run --config configs/digits.yaml

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m sparsevit_cli.config.reference --check

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: install
	$(BIN)/python -m sparsevit_cli.config.reference
	$(BIN)/python docs/make_pictures.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
