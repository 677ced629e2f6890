# The few verbs of this repository. `make help` lists them.
#
# demo and test set up all they need on a fresh machine, and find it again the next time: Python
# packages in .venv, programs and images of the one-machine cluster in the user's cache.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLUSTER ?= devcluster
export CLUSTER CONTEXT REGISTRY

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit lint format generate up down constraints bench-recovery \
	bench-operator bench-gpu check-memory soak test-crash-points test-matrix

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[36m%-17s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Python packages, into .venv

demo: setup ## A cluster, a job on it, a pod killed on the way, and the end it reaches all the same
	@$(BIN)/python -m pretrain_demo

test: setup ## Everything CI runs: lint, unit tests, tests on a real cluster (root, Linux)
	@tests/run

unit: setup ## The tests that need no cluster (T=path picks some)
	@$(BIN)/python -m pytest -m "not cluster" $(T)

test-crash-points: setup ## The operator killed after every write of every workflow, as a table (about 20 minutes)
	@PRETRAIN_TEST_CRASH_POINTS=all $(BIN)/python -m pytest tests/apiserver/test_crash_points.py

test-matrix: setup ## Every layout against one process: numbers, resume, each other's checkpoints (half an hour or more)
	@PRETRAIN_TEST_MATRIX=all $(BIN)/python -m pytest tests/trainer/core/test_matrix.py $(ARGS)

lint: setup ## Style, types, layers, generated files: what must be clean before a test is worth running
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m pretrain_api.crd --check
	$(BIN)/python -m pretrain_docs --check

format: setup ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: setup ## The CRD from the models, the API reference from the CRD, the chart's README
	$(BIN)/python -m pretrain_api.crd
	cp manifests/base/crds/*.yaml charts/pretrain-operator/files/crds/
	$(BIN)/python -m pretrain_docs

up: setup ## A Kubernetes cluster on this machine, with our images and the operator
	@$(BIN)/python -m pretrain_demo --up

down: setup ## Remove that cluster; caches stay
	@$(BIN)/python -m pretrain_devcluster down

# Both want the machine to themselves. ARGS="--repeats 20", ARGS="--faults 50 --seed 7" and so on.
bench-recovery: setup ## Seconds that each fault costs, stage by stage, into docs/benchmarks.md (root)
	@$(BIN)/python -m pretrain_bench.recovery --write $(ARGS)

bench-operator: setup ## Pods per second, memory and requests for 200 jobs, beside the Job controller (root)
	@$(BIN)/python -m pretrain_bench.scale.throughput --write $(ARGS)

bench-gpu: setup ## Tokens per second, MFU and share of the roofline of Llama 3 8B on one GPU
	@$(BIN)/python -m pretrain_trainer.bench.gpu $(ARGS)

check-memory: setup ## The planner's memory beside what the trainer's own model takes (about 4 minutes)
	@$(BIN)/python -m pretrain_trainer.bench.memory $(ARGS)

soak: setup ## 200 random faults at one job, whose end must be the one of an undisturbed run (root)
	@$(BIN)/python -m pretrain_bench.soak $(ARGS)

constraints: setup ## Renew constraints.txt within the bounds of pyproject.toml
	@{ sed -n "/^#/p" constraints.txt; $(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --all-extras pyproject.toml; } > constraints.new
	@mv constraints.new constraints.txt

# uv keeps unpacked packages in the user's cache and hard-links them: the second environment on a
# machine takes seconds.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv==0.13.8; }
	@echo "installing Python packages into $(VENV)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,operator,trainer,cli]'
	@touch $@
