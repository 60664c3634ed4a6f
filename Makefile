# `make demo` and `make test` each create .venv and install what they need, so each works alone on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
PICTURES ?= 8000
RECIPE ?=
# Of the tests: one more than cores, as some of them wait for a host, a time limit or a process; 4 at most.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 3 ] && echo $$((n + 1)) || echo 4)

.PHONY: install demo test lint clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Draw the characters, train a small ViT with the IFA head on two ranks, evaluate, and say where to look.
# Smaller, with an empty data/demo: make demo PICTURES=800 RECIPE='--train.epochs 10 --optim.warmup_steps 20'
demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" RANKS=$(RANKS) PICTURES=$(PICTURES) launch/demo.sh $(RECIPE)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info runs/demo data/demo
