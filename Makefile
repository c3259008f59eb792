# `make train` and `make test` work on a fresh Linux machine with Python 3.11-3.13, g++ and make.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin

.PHONY: train tune compare test fast chaos long bench lint clean

train: .venv/ready
	$(BIN)/rayduce train configs/quickstart.yaml

tune: .venv/ready
	$(BIN)/rayduce tune configs/digits_lru.yaml name=quick train.steps=400 --space timing --samples 4 --search random

compare: .venv/ready
	$(BIN)/rayduce compare configs/digits_lru.yaml name=quick train.steps=400 --seeds 2 \
		--methods full,scratch,hankel,random,smallest,magnitude,distill,hsv_regularized

test: .venv/ready
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

fast: .venv/ready
	$(BIN)/pytest -m "not cluster and not long"

chaos: .venv/ready
	$(BIN)/pytest tests/chaos -m cluster --numprocesses 2 --maxschedchunk 1

long: .venv/ready
	$(BIN)/pytest -m long

bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.scans

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Rayduce needs Python 3.11, 3.12 or 3.13 on the PATH (or make PYTHON=/path/to/python)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'pip>=25'  # before, its resolver takes minutes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
