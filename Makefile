# Every command a contributor needs. `make` lists them; CONTRIBUTING.md explains them.
OUT ?= runs/quickstart
STUDY ?= runs/study
ARGS ?=
# Two pytest workers. The tests of a file share a worker, and so do all tests that start many processes (tests/conftest.py).
JOBS ?= -n 2 --no-loadscope-reorder
IMAGE ?= flextron
BASE ?=
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-llama-cpp quickstart study test test-newest faults test-gpu image lint format docs bench clean

help: ## list the commands
	@echo "usage: make COMMAND [ARGS=\"more arguments\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## create .venv with this package (PYTHON=... chooses the interpreter)
	@scripts/setup.sh

setup-llama-cpp: setup ## build llama.cpp into .venv (some minutes), for the tests that run exported GGUF files
	@scripts/llama-cpp.sh

quickstart: setup ## run the whole chain on this machine, CPU or GPU; results in OUT (default runs/quickstart)
	.venv/bin/flextron quickstart 'out=$(subst ','\'',$(OUT))' $(ARGS)

study: setup ## run the chain on SmolLM2-135M-Instruct, and train baselines, some hours on a CPU; results in STUDY (default runs/study)
	$(PY) scripts/study_inputs.py '$(subst ','\'',$(STUDY))/inputs'
	.venv/bin/flextron quickstart recipe=smollm2 'input=$(subst ','\'',$(STUDY))/inputs' 'out=$(subst ','\'',$(STUDY))/run' $(ARGS)
	$(PY) scripts/study_peers.py '$(subst ','\'',$(STUDY))/run' '$(subst ','\'',$(STUDY))/peers'

test: setup ## run all tests, or those named in ARGS, on the CPU
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q $(JOBS) $(or $(ARGS),tests)

test-newest: ## run the tests on Python 3.12 or 3.13 with the newest supported Megatron-Core and the newest transformers
	@scripts/test-newest.sh $(JOBS) $(ARGS)

faults: setup ## kill every stage, or fail its disk, at MOMENTS (default 20) file-system events; kill ranks and Slurm jobs; some hours
	FLEXTRON_FAULTS=$(or $(MOMENTS),20) $(PY) -m pytest -q tests/faults tests/parallel/test_ranks.py tests/slurm/test_interruptions.py $(ARGS)

test-gpu: setup ## run the tests that need one GPU: the whole chain in bf16, and results equal to the CPU's
	$(PY) -m pytest -q -rs $(or $(ARGS),tests/gpu)

image: ## build the container image IMAGE (default flextron) on BASE with docker (docs/containers.md)
	docker build --tag '$(IMAGE)' $(if $(BASE),--build-arg 'BASE=$(BASE)') $(ARGS) .

lint: setup ## check style, formatting and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib

format: setup ## repair style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: ## build the documentation site in build/site, from docs/ and the docstrings; warnings are errors
	@scripts/docs.sh

bench: setup ## run the benchmarks (side-by-side ratios)
	$(PY) -m benchmarks $(ARGS)

clean: ## remove environments, caches and build products; runs/ stays
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .venv .venv-newest .venv-docs
	rm -rf --one-file-system .cache-newest
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
