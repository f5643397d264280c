# `make demo` and `make test` set everything up. PYTHON chooses the interpreter for .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py MANIFEST.in pyproject.toml $(shell find csrc tools -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name 'build_*.py')
CODE := setup.py vlfast tests benchmarks tools
NATIVE := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# One test process a core; each holds PyTorch and a few models, about 2 GB.
PARALLEL := -n auto --maxprocesses 8

.PHONY: install rebuild demo test test-all bench gpu methods lint format clean

install: .venv/installed

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# After installing a compiler or nvcc, or to change VLFAST_CUDA_ARCHS.
rebuild:
	rm -f .venv/installed
	$(MAKE) install

demo: install
	$(BIN)/vlfast demo

test: install
	$(BIN)/python -m pytest $(PARALLEL)

test-all: install
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The table of all recipes in docs/methods.md; takes the better part of an hour.
methods: install
	$(BIN)/python -m benchmarks.methods

# What only a GPU can tell: parity of the CUDA kernels, then the benchmarks, which take the GPU.
gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf build dist *.egg-info .venv/installed
