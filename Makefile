# The two commands of the README. Each makes its own virtual environment where there is none.
PYTHON ?= python3
VENV ?= .venv

.PHONY: run test check chaos soak mutants clean

run: $(VENV)/installed
	$(VENV)/bin/kvledger run

test: check
	$(VENV)/bin/python -m pytest

# A thousand kills of engines and workers under load, some minutes; SEED=n draws others.
chaos: $(VENV)/tested
	$(VENV)/bin/python -m tests.chaos --kills 1000 --seed $(or $(SEED),0)

# Style, types and the direction of imports.
check: $(VENV)/tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Hours of simulated crashes; stops at the first failure and says how to repeat it.
SOAK_SECONDS ?= 14400
soak: $(VENV)/installed
	$(VENV)/bin/kvledger simulate --seconds $(SOAK_SECONDS) --seed $$(date +%s)

# Faults planted on purpose, some minutes; every one has to be found by a test. Writes the table of docs/testing.md.
mutants: $(VENV)/tested
	$(VENV)/bin/python -m tests.mutants

$(VENV)/tested: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvledger needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
