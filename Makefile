# make train | test | lint; ARGS="..." goes to the command, PYTHON=python3.12 names an interpreter;
# CONSTRAINTS= installs the newest versions instead of those that were tested.
PYTHON ?= python3
ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: train test lint

train: .venv/.train
	$(BIN)/python launch/train.py $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Training needs no torch; the tests compare with it.
.venv/.train: pyproject.toml $(CONSTRAINTS) .venv/.created
	@echo "installing lens-jax into .venv, once"
	@$(PIP) --editable .
	@touch $@

.venv/.test: pyproject.toml $(CONSTRAINTS) .venv/.created
	@echo "installing lens-jax and its tests' needs into .venv, once"
	@$(PIP) --editable ".[test]"
	@touch $@

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python3 names another one"; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@touch $@
