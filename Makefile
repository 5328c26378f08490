# Everything starts here: `make demo` trains a GPT, `make test` tests the package, each from a bare clone.
PYTHON ?= python3
VENV ?= .venv
# The torch of the development environment; the package itself runs on any from 2.10 on.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := $(wildcard setup.py csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
FORMATTED := $(filter-out setup.py,$(SOURCES)) $(wildcard tests/*.cpp tests/*.cu tests/*.cuh tests/*.h benchmarks/*.cpp)

.PHONY: demo test lint format bench gpu gpu-quick clean

demo: $(VENV)/installed
	$(BIN)/python -m fastgpt.gpt.demo

# A process for each core, with a thread each: most of the time Triton's interpreter takes, on one.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# What a reviewer would say first: formatting, lint, types.
lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

# On a machine with a GPU, with the Python, torch and Triton that it has, and without a network.
gpu:
	$(PYTHON) -m benchmarks.gpu

gpu-quick:
	$(PYTHON) -m benchmarks.gpu --quick

# The environment, remade when the build or the dependencies change.
$(VENV)/installed: pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m fastgpt.info
	touch $@

clean:
	rm -rf build $(VENV) fastgpt/*.so fastgpt/_build.json *.egg-info
