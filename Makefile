PYTHON ?= python3
ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help train test test-compiled lint

help:
	@echo 'make train          trains and evaluates the tiny model (configs/tiny.yaml, 10 minutes): runs/tiny/report.html'
	@echo 'make test           runs the tests'
	@echo 'make test-compiled  runs those that compile for TPUs or have published sizes'
	@echo 'make lint           checks style'
	@echo
	@echo 'Each installs what it needs into .venv first. ARGS="--grpo.steps 3" goes on to the command;'
	@echo 'PYTHON=python3.12 names another Python; CONSTRAINTS= takes the newest packages, not the tested.'

train: .venv/.train
	$(BIN)/python launch/train.py $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest $(ARGS)

test-compiled: .venv/.test
	$(BIN)/python -m pytest -m compiled $(ARGS)

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
