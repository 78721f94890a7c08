PYTHON ?= python3
UV_COMPILE = .venv/bin/uv pip compile --quiet --upgrade --no-emit-index-url \
  --no-annotate --custom-compile-command "make lock" --extra dev pyproject.toml

.PHONY: help setup quickstart test test-all lock format

help:
	@echo "make setup       make .venv from the lock (PYTHON=... picks the interpreter)"
	@echo "make quickstart  train the embedded model: one to two minutes on two cores"
	@echo "make test        the tests"
	@echo "make test-all    lint, types, the newest jax, the wheel and all tests"
	@echo "make format      sort imports and lay out the code"
	@echo "make lock        bring requirements/ up to date"

setup:
	@.ci/environment .venv requirements/lock.txt "$(PYTHON)"

quickstart: setup
	.venv/bin/jaxrl-post train configs/quickstart.yaml

test: setup
	.venv/bin/python -m pytest -q -n 2 -m "not slow"

test-all: setup
	@PYTHON="$(PYTHON)" .ci/test-all

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: setup
	.venv/bin/python -m pip install --quiet uv
	$(UV_COMPILE) --universal --python-version 3.11 --output-file requirements/lock.txt
	echo jax==0.10.2 | $(UV_COMPILE) --python-version 3.12 --constraint - \
	  --output-file requirements/oldest.txt
