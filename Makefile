# `make demo` and `make test` set everything up on a fresh machine.
#   TORCH='torch==2.11.0'    the torch requirement to install
#   VENV=/some/dir           where the environment is made
#   PYTHON=/path/to/python   an existing environment, used as it is: nothing is installed into it

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BASE_PYTHON ?= python3

# An unpinned torch brings gigabytes of CUDA libraries: only where there is a GPU to run them.
ifndef TORCH
TORCH := $(shell if nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)
endif

ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
TEST_READY := $(VENV)/.ready-test
DEMO_READY := $(VENV)/.ready-demo
endif

.PHONY: help demo test lint ruff types unit interpreter docs clean

help:
	@echo 'make demo    fuse a small model and show what was fused'
	@echo 'make test    lint, type check and both test suites'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make docs    write the pages that are made from docstrings, and the pictures'
	@echo 'make clean   remove builds and caches; the environment goes with `rm -r $(VENV)`'

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)'

$(VENV)/.ready-%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)' -e '.[$*]'
	touch $@

demo: $(DEMO_READY)
	$(PYTHON) -m fusion_passes demo

test: lint unit interpreter

lint: ruff types

ruff: $(TEST_READY)
	$(PYTHON) -m ruff check .

types: $(TEST_READY)
	$(PYTHON) -m mypy

unit: $(TEST_READY)
	$(PYTHON) -m pytest $(PYTEST_ARGS)

interpreter: $(TEST_READY)
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/interpreter $(PYTEST_ARGS)

docs: $(TEST_READY)
	$(PYTHON) docs/generate.py
	$(PYTHON) docs/pictures.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
