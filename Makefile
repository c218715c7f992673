# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
PIP_QUIET := --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup dev check test demo bench gpu-check gpu-venv gpu-wheels fmt model guests clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with glowplug (editable)

dev: $(DEV)  ## the same with the tools that tests and checks need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_QUIET) --upgrade 'pip>=24'
	$(BIN)/python -m pip install $(PIP_QUIET) -c constraints.txt -e .
	touch $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python -m pip install $(PIP_QUIET) -c constraints.txt -e '.[dev]'
	touch $(DEV)

check: dev  ## format, lint, types, import contracts, rebuilt guests equal the shipped ones, kernels are of their sources
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m guests.build --check
	$(BIN)/python -m worker.backends.kernels.build --check

model: dev  ## fetch the real model that tests and demo use (once)
	$(BIN)/python tests/fetch_test_model.py

test: model  ## the whole test suite; starts and stops its own servers
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: setup  ## build the real model, wake it from zero, stream, scale to zero, wake again (KEEP=1 leaves it up)
	$(BIN)/python -m loadtest demo $(if $(KEEP),--keep)

bench: model  ## measure over HTTP; writes loadtest/results/latest.json
	$(BIN)/python -m loadtest bench $(BENCH_ARGS)

# On a bare machine: GPU_PYTHON is the interpreter that has CuPy, GPU_WHEELS a folder of what else it needs (see
# loadtest/gpu-wheels.txt); nothing is downloaded, and nothing of the interpreter's own is touched.
gpu-check: $(if $(GPU_PYTHON),gpu-venv,dev)  ## all that this machine can show of the GPU backend; JSON in loadtest/results/gpu/
	$(if $(GPU_PYTHON),.gpu-venv/bin/python,$(BIN)/python) -m loadtest gpu-check $(GPU_ARGS)

gpu-venv:
	$(GPU_PYTHON) loadtest/bare_python.py .gpu-venv $(if $(GPU_WHEELS),--wheels $(GPU_WHEELS))

gpu-wheels:  ## download what a bare GPU machine with Python 3.12 and CuPy lacks, into .gpu-wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
		$(foreach tag,2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17,--platform manylinux_$(tag)_x86_64) \
		--platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
		-d .gpu-wheels -r loadtest/gpu-wheels.txt

fmt: dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

guests: dev  ## rebuild the shipped WebAssembly guests from C
	$(BIN)/python -m guests.build

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
