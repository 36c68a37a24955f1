# `make demo` tries the project, `make test` checks it, `make gpu` proves it on a GPU.
PYTHON ?= python3
VENV := .venv/bin
CONSTRAINTS := $(CURDIR)/requirements/constraints.txt
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
       $(VENV)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench gpu clean

demo: .venv/runtime
	$(VENV)/python -m demo

test: .venv/dev
	$(VENV)/python -m pytest

lint: .venv/dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

bench: .venv/dev
	$(VENV)/python -m benchmarks

# Takes PyTorch as it is installed. Where no package index is reached, wheels/ may hold the rest.
gpu:
	test ! -d wheels || $(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade \
	    --target wheels/installed wheels/*.whl
	export PYTHONPATH=wheels/installed:$$PYTHONPATH; \
	$(PYTHON) -m pytest -m gpu -n 4 tests/test_gpu.py; tests=$$?; \
	$(PYTHON) -m benchmarks --device cuda --json outputs/gpu.json && exit $$tests

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	touch $@

.venv/runtime: .venv/python requirements.txt
	$(PIP) -r requirements.txt
	touch $@

.venv/dev: .venv/python requirements.txt $(wildcard requirements/*.txt)
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/peers.txt
	touch $@

clean:
	rm -rf .venv outputs/demo
