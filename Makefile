# Everything a developer does here; `make help` lists it. PYTHON=... chooses the interpreter of .venv.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check

# Stamps. The package waits for psutil alone, so that `make demo` is quick; each extra comes on top of it.
venv := $(VENV)/.made-by-$(subst /,-,$(PYTHON))
package := $(VENV)/.package
test-extra := $(VENV)/.extra-test
dev-extra := $(VENV)/.extra-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-asan test-differential test-kill test-portable test-pythons lint build bench pictures stress stress-smoke stress-selftest clean

help: ## Explain every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

demo: $(package) ## Count the words of a real corpus in parallel (examples/wordcount.py)
	$(VENV_PYTHON) examples/wordcount.py

test: $(package) $(test-extra) ## Run the test suite on all processors
	$(VENV_PYTHON) -m pytest -n auto

lint: $(package) $(dev-extra) ## Check style and types, the stub against the module, and the C code for warnings
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/stubtest posix_ipc --allowlist tools/stubtest-allowlist --ignore-unused-allowlist
	POSIX_IPC_DEVELOP=1 $(VENV_PYTHON) setup.py --quiet build_ext --force --build-temp build/lint --build-lib build/lint
	POSIX_IPC_DEVELOP=1 POSIX_IPC_PORTABLE=1 $(VENV_PYTHON) setup.py --quiet build_ext --force --build-temp build/lint --build-lib build/lint

build: $(package) $(test-extra) ## Build the source distribution and, from it, the wheel into dist/
	$(VENV_PYTHON) -m build

bench: $(package) $(dev-extra) ## Measure against the standard library, posix_ipc 1.3.2 and plain C
	$(VENV_PYTHON) -m benchmarks

pictures: $(package) $(dev-extra) ## Draw the terminal pictures of docs/command-line.md anew
	$(VENV_PYTHON) docs/make_pictures.py

# Other sequences: make test-differential SEED=1000
SEED := 0
test-differential: $(package) $(test-extra) ## Compare 10,000 random sequences of calls with posix_ipc 1.3.2
	POSIX_IPC_DIFFERENTIAL=10000 POSIX_IPC_DIFFERENTIAL_SEED=$(SEED) $(VENV_PYTHON) -m pytest -n auto -v tests/test_differential.py

test-asan: $(package) $(test-extra) $(dev-extra) ## Run the suite on the extension built with address and undefined-behaviour sanitizers
	tools/test-variant asan

test-portable: $(package) $(test-extra) $(dev-extra) ## Run the tests of the plain classes on a build as for other systems
	tools/test-variant portable

# All of it, also what is slow: make test-pythons PYTHONS='--full 3.13t'
PYTHONS :=
test-pythons: $(package) $(test-extra) ## Run the quick part of the suite under every supported Python found on this system
	tools/test-pythons $(PYTHONS)

# Other runs: make stress STRESS='--duration 8h --soak', or .venv/bin/python -m stress --help
STRESS :=
stress: $(package) ## Run every stress scenario under every start method, 10 minutes in all (docs/stress.md)
	$(VENV_PYTHON) -m stress --duration 10m $(STRESS)

stress-smoke: $(package) ## Run every stress scenario for a moment, under 2 minutes in all
	$(VENV_PYTHON) -m stress --duration 40s --method forkserver

stress-selftest: $(package) ## Put a fault into each stress scenario, and demand that it is reported
	$(VENV_PYTHON) -m stress --selftest

test-kill: $(package) ## Prove what survives 2,000 kills, 200 killed groups, sweeps beside life and 100,000 tasks
	$(VENV_PYTHON) -m stress pickling kill reaper --full

clean: ## Remove everything made here, .venv included
	rm -rf $(VENV) build dist *.egg-info .*_cache .hypothesis posix_ipc/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(venv):
	@tools/preflight $(PYTHON)
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(package): $(venv) pyproject.toml setup.py $(wildcard posix_ipc/*.c posix_ipc/_native/*)
	$(PIP_INSTALL) --editable .
	@touch $@

# Some tests use numpy; where it would have to be compiled first, they are skipped.
$(test-extra): pyproject.toml | $(package)
	$(PIP_INSTALL) 'posix_ipc[test]'
	$(PIP_INSTALL) --only-binary numpy numpy || echo 'no numpy for this Python: its tests will be skipped'
	@touch $@

# The package is there already, so this installs no more than what the extra names.
$(VENV)/.extra-%: pyproject.toml | $(package)
	$(PIP_INSTALL) 'posix_ipc[$*]'
	@touch $@
