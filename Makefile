# Needs Python 3.11 or newer and make. Everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that wait without spinning: with a second busy process, spinning ones make a step ten times slower.
export OMP_WAIT_POLICY ?= passive
# One thread for a process: the tests run in as many processes as there are cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

.PHONY: help setup fetch demo test check format docs serve-env clean
.DEFAULT_GOAL := help

help:  ## Say what there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## Install the package and its tools into .venv.

# torch comes first and by its exact version: asked for by another package, it could bring gigabytes of CUDA along.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## Fine-tune the embedded model on film reviews and compare it with the frozen one.
	$(BIN)/moa demo

test: fetch  ## Run every test.
	$(TEST)

fetch: $(STAMP)  ## Fetch the embedded model and the demo's sentences into the user's cache.
	$(BIN)/python -m moa_peft.data.fetch

check: $(STAMP)  ## Format, lint, types, unmarked tests, docs.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(TEST) -m 'not slow'
	$(MAKE) docs

format: $(STAMP)  ## Format and sort what can be.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## Build the documentation; a warning is an error.
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

serve-env:  ## Make an environment with vLLM on a CPU in .venv-vllm (4 GB).
	PYTHON=$(PYTHON) scripts/serve_env.sh

clean:  ## Remove everything that was installed or built.
	rm -rf $(VENV) .venv-vllm docs/_build .pytest_cache .ruff_cache dist
