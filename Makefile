# Everything runs in .venv, which is made from constraints.txt: the exact versions the tests run on.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test parity errors torture lint

setup: .venv/dev            ## everything that development needs, torch included

demo: .venv/core            ## train a prefix on the small base model and show what it does
	.venv/bin/python examples/demo.py

test: .venv/dev             ## the whole suite
	.venv/bin/python -m pytest -q --numprocesses 2 --dist worksteal

parity: .venv/parity        ## every stage against PyTorch and DeepSpeed; writes docs/parity.md
	.venv/bin/python -m tests.parity.report
	.venv/bin/python -m pytest -q -m deepspeed

errors: .venv/dev           ## which test triggers which error message; writes docs/errors.md
	.venv/bin/python -m pytest -q --numprocesses 2 --dist worksteal --ignore=tests/test_errors.py \
		--record-errors=.pytest_cache/errors.jsonl
	.venv/bin/python -m tests.errors .pytest_cache/errors.jsonl

torture: .venv/dev          ## kills, lost hosts, long use, 21,000 broken inputs: docs/reliability.md
	.venv/bin/python -m tests.torture.kill
	.venv/bin/python -m tests.torture.pair
	.venv/bin/python -m tests.torture.soak
	.venv/bin/python -W ignore -m tests.torture.fuzz

lint: .venv/dev             ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15) and "needs Python 3.11 to 3.14: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/core
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

.venv/parity: .venv/dev     # DeepSpeed compiles its fused Adam at the first run: needs g++
	$(PIP) --editable '.[parity]'
	touch $@
