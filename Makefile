# `make help` lists what there is. Everything runs in .venv, which is made when missing.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip  # setuptools warns at length of every editable installation
PORT ?= 5000
export MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db
PROJECT_RUN := PATH="$$PWD/$(BIN):$$PATH" mlflow run . --env-manager local --experiment-name digits

.PHONY: help install demo test test-slow test-browser lint notebooks docs check chaos ui clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 20

install: .venv/installed  ## make .venv and install the project

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...'; exit 2; }
	@echo "Installing into .venv (about 6 GB with torch; minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need ..."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed  ## pretrain, control and DANN on the embedded digits; a table and pictures (minutes)
	$(PROJECT_RUN) -e adapt -P domain_adaptation.method.name=lambda_zero -P trainer.precision=auto
	$(PROJECT_RUN) -e adapt -P trainer.precision=auto
	@$(BIN)/python -m dann_experiments runs --tracking.experiment digits

test: .venv/installed-dev  ## every test that CI runs by default
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .venv/installed-dev  ## the slow tests as well
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not browser"

.venv/installed-browser: .venv/installed-dev
	$(PIP) install --quiet --constraint constraints.txt --editable '.[browser]'
	@touch $@

test-browser: .venv/installed-browser  ## open pages of MLflow and our reports in the system's Chromium; PICTURES=docs/images saves them
	$(BIN)/python -m pytest -m browser tests/browser

lint: .venv/installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

notebooks: .venv/installed-dev  ## run the notebooks, whose outputs `make docs` then shows (minutes; only if something has changed)
	$(BIN)/python -m benchmarks.notebooks

docs: .venv/installed-dev  ## build the site from docs/ into site/; fails at dead links, anchors and pages that are out of date
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open site/index.html in a browser."

check: lint docs test  ## lint, types, the site, fast tests

chaos: .venv/installed-dev  ## kill runs, servers and inputs for minutes, and write what was lost into docs/reliability.md
	$(BIN)/python -m benchmarks.chaos --write

ui: .venv/installed  ## serve the MLflow UI on http://127.0.0.1:5000, or another PORT=5001
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_BACKEND_STORE_URI="$$MLFLOW_TRACKING_URI" $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT)

clean:  ## remove the environment, caches and everything runs left behind, the MLflow store included
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .hypothesis mlruns mlartifacts outputs studies lightning_logs mlflow.db*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
