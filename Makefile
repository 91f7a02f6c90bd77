# Every target sets up what it needs; the set-up runs again only when what it reads has changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers
# What whet works with and does not bring along: vLLM's server; Ray, DeepSpeed and Megatron-Core.
VLLM := .venv-vllm
BACKENDS := .venv-backends

.PHONY: help demo test check integration setup format bench docs clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(READY) ## Train a tiny model from nothing: fine-tuning, then reinforcement learning
	@$(BIN)/whet demo

test: $(READY) ## Run every test
	@$(BIN)/pytest

check: $(READY) ## Check format, lint, types and layers, then run every test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/pytest -q tests/test_layers.py
	$(BIN)/pytest

integration: $(VLLM)/.ready $(BACKENDS)/.ready ## Test with real vLLM, Ray, DeepSpeed and Megatron, in environments of their own
	WHET_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python WHET_MEGATRON_PYTHON=$(CURDIR)/$(BACKENDS)/bin/python \
		$(BACKENDS)/bin/python -m pytest tests/integration tests/cluster
	$(BACKENDS)/bin/python -m pytest tests/contract/test_contract_backend.py -k deepspeed

setup: $(READY) ## Make .venv with everything in it

format: $(READY) ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) $(PEERS)/.ready ## Compare with TRL, in an environment of its own, on the same model, rows and steps
	$(BIN)/python -m benchmarks.run --peer $(PEERS)

docs: $(READY) ## Write the configuration reference anew from the schema
	$(BIN)/python -m whet.config.reference docs

clean: ## Remove caches and virtual environments; runs/ stays
	rm -rf .venv $(PEERS) $(VLLM) $(BACKENDS) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints-cpu.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

$(PEERS)/.ready: benchmarks/peer_env.sh constraints-cpu.txt
	@bash benchmarks/peer_env.sh $(PEERS)
	@touch $@

$(VLLM)/.ready: scripts/vllm_env.sh
	@scripts/vllm_env.sh $(VLLM)
	@touch $@

$(BACKENDS)/.ready: scripts/integration_env.sh pyproject.toml constraints-cpu.txt
	@scripts/integration_env.sh $(BACKENDS)
	@touch $@
