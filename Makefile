# Two commands do everything: `make demo` (try the project) and `make test` (check it).
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/runtime
	$(VENV)/python demo.py

test: .venv/dev
	$(VENV)/python -m pytest

lint: .venv/dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

bench: .venv/dev
	$(VENV)/python -m benchmarks

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-dev.txt requirements-export.txt requirements-prepare.txt requirements-video.txt requirements-peers.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(VENV)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	touch $@

clean:
	rm -rf .venv outputs/demo
