# Two commands on a fresh machine with python3 >= 3.11 (and its venv module) and make:
#   make run     sets up .venv, runs the main job             ACCELERATOR=cuda13 (cuda12, tpu) where there is one
#   make test    sets up .venv; ruff, mypy, the whole suite   PYTHON=python3.12 for another Python
# Also: setup, lint, lock, notebooks, docs, clean. ARGS is passed on: make run ARGS=--help, make test ARGS='-k wrap'.

PYTHON ?= python3
ACCELERATOR ?=
UV ?= 1
WORKERS ?= 2
ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# A Python chosen by name has an environment of its own beside the default one, so that both stay.
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(VERSION)
endif

BIN := $(VENV)/bin
MADE := $(VENV)/made-with-$(VERSION)
INSTALLED := $(VENV)/installed$(ACCELERATOR:%=-%)
INSTALL := install -c constraints.txt -e '.[experiments,test,dev$(ACCELERATOR:%=,%)]'

# Without an accelerator the CPU is named, so that jax does not look for one and warn.
ifeq ($(ACCELERATOR),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: run test setup lint lock notebooks docs clean

run: setup
	$(BIN)/python -m experiments.vision_digits $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(INSTALLED)

$(MADE):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"got Python {v[0]}.{v[1]}; mpjax needs 3.11 or newer; choose one: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(INSTALLED): $(MADE) pyproject.toml constraints.txt
	@echo "setup: installing into $(VENV) (about 900 MB on disk)"
	@if [ "$(UV)" != 0 ] && $(BIN)/python -m pip install --quiet -c constraints.txt uv \
	    && $(BIN)/uv pip $(INSTALL) --quiet --python $(BIN)/python; \
	then echo "setup: done, with uv"; \
	else echo "setup: uv is switched off or did not work; trying plain pip, which is slower"; \
	  $(BIN)/python -m pip $(INSTALL) --quiet && echo "setup: done, with pip"; fi
	@touch $@

# One file serves every Python and platform by its markers. uv writes no index into it unless told to.
lock: $(MADE)
	@$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-python-downloads \
	  --no-header --no-annotate --all-extras $(ARGS) pyproject.toml -o constraints.txt

# The .py is what people edit; the .ipynb is made from it, without outputs.
notebooks: setup
	$(BIN)/jupytext --quiet --update --to ipynb notebooks/*.py

# The API reference, from the docstrings; open docs/site/index.html.
docs: setup
	$(BIN)/python -m docs.reference docs/site

clean:
	rm -rf .venv .venv-* build dist docs/site runs .mypy_cache .ruff_cache .pytest_cache
	find docs mpjax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
