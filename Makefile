# Everything a checkout can do. `make quickstart` and `make test` need only Python 3.11+ (and set up the rest).
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
SGLANG_VENV ?= .venv-sglang
TEST_WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-sglang check format chaos bench clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "agentrl needs Python 3.11 or newer; set PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)  ## Make the virtual environment

quickstart: $(STAMP)  ## Train a small tool-calling model on this machine, and show the result
	$(BIN)/agentrl quickstart

test: $(STAMP)  ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMP)  ## Lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(SGLANG_VENV)/.installed: tests/rigs/sglang/install.sh
	bash tests/rigs/sglang/install.sh $(SGLANG_VENV)
	@touch $@

test-sglang: $(STAMP) $(SGLANG_VENV)/.installed  ## Contract suite and a training run against a real SGLang (CPU)
	OMP_NUM_THREADS=1 AGENTRL_SGLANG_VENV=$(abspath $(SGLANG_VENV)) $(BIN)/python -m pytest tests/contract tests/integration/test_sglang_training.py tests/integration/test_serving_sglang_broadcast.py

chaos: $(STAMP)  ## Kill processes at random, break network, disk and clocks, and audit what is left
	@rm -f .chaos.jsonl
	OMP_NUM_THREADS=1 AGENTRL_CHAOS_KILLS=$${AGENTRL_CHAOS_KILLS:-100} AGENTRL_CHAOS_REPORT=.chaos.jsonl $(BIN)/python -m pytest -m chaos
	@$(BIN)/python tests/chaos/chaos_report.py .chaos.jsonl

bench: $(STAMP)  ## Measure; results go to the terminal
	@for script in bench/*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:  ## Remove environments and caches (runs/ stays)
	rm -rf $(VENV) $(SGLANG_VENV) .pytest_cache .ruff_cache .hypothesis
