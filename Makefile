# Every command a contributor needs. `make` lists them; CONTRIBUTING.md explains them.
OUT ?= runs/quickstart
ARGS ?=
# Two at a time: pytest-xdist keeps a file together, and what starts many processes (tests/conftest.py).
JOBS ?= -n 2 --no-loadscope-reorder
IMAGE ?= flextron
BASE ?=
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-llama-cpp quickstart test test-newest test-gpu image lint format bench clean

help: ## list the commands
	@echo "usage: make COMMAND [ARGS=\"more arguments\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## create .venv with this package in it (PYTHON=... picks the interpreter)
	@scripts/setup.sh

setup-llama-cpp: setup ## llama.cpp in .venv, built from source (some minutes), for the tests that run exported GGUF files
	@scripts/llama-cpp.sh

quickstart: setup ## the whole chain on this machine, CPU or GPU; results in OUT (default runs/quickstart)
	.venv/bin/flextron quickstart out=$(OUT) $(ARGS)

test: setup ## all tests, or those named in ARGS, on the CPU
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q $(JOBS) $(or $(ARGS),tests)

test-newest: ## the same on Python 3.12 or 3.13 with the newest supported Megatron-Core
	@scripts/test-newest.sh $(JOBS) $(ARGS)

test-gpu: setup ## the tests of one GPU: the chain in bf16, and the same numbers as on the CPU
	$(PY) -m pytest -q -rs $(or $(ARGS),tests/gpu)

image: ## the container image IMAGE (default flextron) on BASE, with docker; docs/containers.md for a machine without a registry
	docker build --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) $(ARGS) .

lint: setup ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup ## repair style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup ## run the benchmarks (side-by-side ratios)
	$(PY) -m benchmarks $(ARGS)

clean: ## remove environments, caches and build products; runs/ stays
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .venv .venv-newest
	rm -rf --one-file-system .cache-newest
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
