# make setup | demo | results | test | lab | lint | format, and make NAME-check for the tests marked NAME.
# Machines without a GPU that would rather not download CUDA: make setup PIP_ARGS="--extra-index-url URL-OF-CPU-WHEELS"
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo results test lab lint format browser-check
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (several minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[all]'
	@touch $@

demo: setup
	@$(BIN)/metis demo

results: setup
	@$(BIN)/python -m recipes.nano.build results

test: setup
	@$(BIN)/python -m pytest -q

browser-check: setup
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[browser]'
	@$(BIN)/python -m pytest -q -m browser

%-check: setup
	@$(BIN)/python -m pytest -q -m '$(subst -,_,$*)'

lab: setup
	@$(BIN)/metis lab

lint: setup
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --quiet --check . || { echo "run: make format"; exit 1; }
	@find notebooks eval -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -print0 | xargs -0 -r $(BIN)/nbstripout --verify
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --quiet --fix --exit-zero --output-format concise .
	@$(BIN)/ruff format --quiet .
