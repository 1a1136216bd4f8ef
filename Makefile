# Every target sets up what it needs, in $(VENV) and nowhere else; a second run reuses it.
# `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
# A process per core; a file's tests stay together, for what they prepare once.
XDIST ?= -n auto --dist loadfile

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/.stamps
CONSTRAINTS := $(STAMPS)/constraints.txt
# The environment's cmake and ninja come before older ones of the system.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(PY) -m pip --quiet

NATIVE := CMakeLists.txt setup.py tools/build_backend.py tools/build_tools.py tools/cuda_config.py $(shell find csrc -type f ! -name '*.md' 2>/dev/null)
CXX_FILES := $(shell find csrc tests bench -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

FIND_NVCC := $(PY) -c 'import sys; sys.path.insert(0, "tools"); import cuda_config; sys.exit(cuda_config.find_nvcc() is None)'

.DEFAULT_GOAL := help
.PHONY: help claims demo test test-wheel test-all lint format bench readme docs cuda-check build clean distclean FORCE
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=$(TORCH)  PYTEST_ARGS=  DEMO_ARGS=  MAX_JOBS=  ARCORE_CUDA=auto|on|off"

demo: $(STAMPS)/build $(STAMPS)/train  ## train a small next-scale image model on handwritten digits, write out/demo/
	$(PY) -m arcore demo $(DEMO_ARGS)

test: $(STAMPS)/build $(STAMPS)/test  ## run the tests
	$(PY) -m pytest $(XDIST) $(PYTEST_ARGS)

test-all: $(STAMPS)/build $(STAMPS)/test  ## run the tests, the slow ones too, and compile for GPUs where nvcc is
	$(PY) -m pytest --runslow $(XDIST) $(PYTEST_ARGS)
	@if $(FIND_NVCC); then $(MAKE) cuda-check; else echo "cuda-check: skipped, nvcc was not found"; fi

# As packagers run the tests: against an installed wheel, in an environment of its own, from the checkout.
test-wheel: $(STAMPS)/torch $(STAMPS)/test  ## build a wheel into VENV and run the tests against it; give it a VENV of its own
	@rm -rf $(VENV)/wheel
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(VENV)/wheel .
	@$(PIP) uninstall --yes arcore
	@$(PIP) install --no-deps $(VENV)/wheel/*.whl
	$(PY) -m pytest $(XDIST) $(PYTEST_ARGS)

lint: $(STAMPS)/dev  ## check style, types, layers and duplication
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	PYTHONPATH=python $(BIN)/lint-imports
	$(PY) tools/check_dup.py
	$(PY) tools/check_zoo.py
	$(BIN)/codespell
	@if $(FIND_NVCC); then $(PY) tools/cuda_check.py --quick; else echo "cuda-check: skipped, nvcc was not found"; fi

format: $(STAMPS)/dev  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: $(STAMPS)/build $(STAMPS)/bench  ## run the benchmarks on one thread
	$(PY) -m pytest bench $(PYTEST_ARGS)

claims: $(STAMPS)/build $(STAMPS)/train  ## check every paper's claim in full, write bench/results/claims.json
	$(PY) -m arcore check --all --json bench/results/claims.json

readme: $(STAMPS)/build $(STAMPS)/dev  ## generate README's tables and figure anew
	$(PY) tools/bench_table.py
	$(PY) tools/zoo_table.py

docs: $(STAMPS)/build $(STAMPS)/dev  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "docs: open site/index.html"

cuda-check: $(STAMPS)/cuda third_party/cutlass/VERSION  ## compile every CUDA file with nvcc; needs no GPU
	$(PY) tools/cuda_check.py

build: $(STAMPS)/build  ## build the extension into the environment, editable

clean:  ## remove what was built
	rm -rf build dist site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf python/arcore.egg-info python/arcore/_ops.so python/arcore/_C*.so $(STAMPS)/build
	find python tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove what was built, and the environment
	rm -rf $(VENV)

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "arcore: $(PYTHON) was not found; name a Python >= 3.10 with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "arcore: Python >= 3.10 is needed but $(PYTHON) is $$($(PYTHON) -V 2>&1); name a newer one with PYTHON=..." >&2; exit 1; }
	@echo "arcore: making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || tools/venv_without_ensurepip.sh $(PYTHON) $(VENV)

# Holds the wanted torch; its time changes only when the wish does.
$(STAMPS)/torch.wanted: FORCE | $(PY)
	@mkdir -p $(STAMPS)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch comes first and becomes a constraint: no later package may replace it by another build.
$(STAMPS)/torch: $(STAMPS)/torch.wanted
	@echo "arcore: installing $(TORCH) and the build tools"
	@$(PIP) install '$(TORCH)' 'setuptools>=77' 'cmake>=3.24' ninja
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(CONSTRAINTS)
	@touch $@

third_party/cutlass/VERSION: tools/cutlass.py | $(STAMPS)/torch
	@rm -f $@
	@$(PY) tools/cutlass.py

$(STAMPS)/build: $(STAMPS)/torch $(NATIVE) pyproject.toml
	@for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit 0; done; \
	  echo "arcore: no C++ compiler was found; install g++ >= 11 or clang++ >= 14, or name one with CXX=..." >&2; exit 1
	@echo "arcore: building the extension"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/train $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/cuda $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/torch pyproject.toml tools/extras.py
	@echo "arcore: installing the packages of the extra '$*'"
	@$(PY) tools/extras.py $* > $(STAMPS)/$*.txt
	@$(PIP) install --constraint $(CONSTRAINTS) --requirement $(STAMPS)/$*.txt
	@touch $@
